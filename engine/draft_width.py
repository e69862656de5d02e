"""How many slots of each block are drafted: none that would hardly ever be verified.

A slot costs a row of the drafter's pass, or a pass of its own. Slot k of a block is worth what verifying it brings beyond
its price, on average over recent blocks; of B blocks the width w is drafted that maximises

    B · Σ_{k ≤ w} worth_k - λ T_draft(B, w)

A device drafts whole blocks: its step is of fixed sizes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEMORY_BLOCKS = 128.0
WIDE_PERIOD_STEPS = 32
"""One step in so many drafts whole blocks, if any: what the last slots are worth must be seen now and then."""


class DraftWidth:
    """One thread; γ = `block_size`."""

    def __init__(self, block_size: int, narrowest: int) -> None:
        """narrowest: slots that a block always has."""
        self._narrowest = narrowest
        self.width = block_size
        """Slots that were chosen last."""
        self._widths = np.arange(1, block_size + 1)
        self._worth = np.full(block_size, np.inf)  # of a slot that was never drafted: it has to be seen
        self._steps_since_wide = 0

    def learn(self, survival: NDArray[np.float32], proposed: NDArray[np.int32], row_price: NDArray[np.float64]) -> None:
        """Take in blocks of the drafter: [m, γ], of which `proposed` [m] slots were drafted.

        row_price: [γ], accepted tokens that a row of the target's pass must bring, for the m rows at each slot.
        """
        drafted = self._widths <= proposed[:, None]
        counts = drafted.sum(axis=0)
        worth = np.where(drafted, np.maximum(survival - row_price, 0.0), 0.0).sum(axis=0) / np.maximum(counts, 1)
        first = (counts > 0) & np.isinf(self._worth)
        self._worth[first] = worth[first]
        seen = np.isfinite(self._worth)
        rate = 1.0 - np.exp(-counts[seen] / MEMORY_BLOCKS)
        self._worth[seen] += rate * (worth[seen] - self._worth[seen])

    def choose(self, blocks: int, price: float, draft_s: NDArray[np.float64]) -> int:
        """Slots to draft of each of `blocks` blocks.  price: λ, tokens/s.  draft_s: [γ], seconds of drafting 1 … γ slots."""
        self._steps_since_wide += 1
        if self._steps_since_wide >= WIDE_PERIOD_STEPS or np.isinf(self._worth).any():
            self._steps_since_wide = 0
            self.width = len(self._widths)
        else:
            net = blocks * self._worth.cumsum() - price * draft_s
            net[: self._narrowest - 1] = -np.inf
            self.width = len(net) - int(net[::-1].argmax())  # of equals the widest
        return self.width

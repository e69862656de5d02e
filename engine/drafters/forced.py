"""Drafting what a request's grammar leaves no choice about: names and punctuation of JSON, the rest of an enum's value.

The grammar fixes the text, not where its tokens end, so the target may still cut it otherwise: these are drafts, not facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.drafters.drafter import GRAMMAR, Draft, DraftRow

LOG_ODDS = 3.0
"""Confidence that a forced token is the target's; calibrated online."""


class ForcedDrafter:
    """Proposes up to γ = `block_size` tokens for rows whose grammar forces some."""

    name = GRAMMAR
    sources: tuple[str, ...] = (name,)
    proposes_free = False
    feature_layers: tuple[int, ...] = ()

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def bytes_per_block(self, block_size: int) -> int:
        return 0

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        """Nothing to make: the grammar is the context."""

    def observe(self, features: torch.Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        """Nothing to inject: the grammar is the context."""

    def forget(self, sequence_id: int) -> None:
        """Nothing is kept for a sequence."""

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        tokens = np.zeros((len(rows), self.block_size), np.int64)
        lengths = np.zeros(len(rows), np.int32)
        for block, (i, row) in zip(tokens, enumerate(rows), strict=True):
            forced = row.forced[: self.block_size]
            block[: forced.size], lengths[i] = forced, forced.size
        return Draft(tokens, lengths, np.full(tokens.shape, LOG_ODDS, np.float32))

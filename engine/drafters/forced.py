"""Drafting what a request's grammar leaves no choice about: names and punctuation of JSON, the rest of an enum's value.

The grammar fixes the text, not where its tokens end, so the target may still cut it otherwise: these are drafts, not facts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dspark.engine.drafters.drafter import GRAMMAR, ContextFree, Draft, DraftRow

LOG_ODDS = 3.0
"""Confidence that a forced token is the target's; calibrated online."""


class ForcedDrafter(ContextFree):
    """Proposes up to γ = `block_size` tokens for rows whose grammar forces some."""

    name = GRAMMAR
    sources: tuple[str, ...] = (name,)
    proposes_free = False

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        tokens = np.zeros((len(rows), self.block_size), np.int64)
        lengths = np.zeros(len(rows), np.int32)
        for block, (i, row) in zip(tokens, enumerate(rows), strict=True):
            forced = row.forced[: self.block_size]
            block[: forced.size], lengths[i] = forced, forced.size
        return Draft(tokens, lengths, np.full(tokens.shape, LOG_ODDS, np.float32))

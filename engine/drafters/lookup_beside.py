"""A model drafter and lookup side by side: for each sequence the block with the larger expected accepted length wins.

Lookup is free and right for long where text repeats itself; a model drafter is right more often everywhere else. The
choice looks at the drafted tokens, so it is lossless under coupled verification only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.calibration import CalibrationTable
from dspark.engine.drafters.drafter import Draft, Drafter, DraftRow
from dspark.engine.drafters.lookup import LookupDrafter

MODEL, LOOKUP = 0, 1
SURE_SHARE = 0.75
"""Expected accepted share of the block from which on a lookup's block is taken without asking the model."""


class LookupBeside:
    """Proposes what `model` or `lookup` proposes; `Draft.source` says which. Lookup is what it has for nothing."""

    proposes_free = True

    def __init__(self, model: Drafter, lookup: LookupDrafter, calibration: Callable[[], CalibrationTable]) -> None:
        """lookup: with the model's block size. calibration: the newest table, with a kind per source."""
        self.name = f"{model.name}+{lookup.name}"
        self.sources = (*model.sources, *lookup.sources)
        self.block_size = model.block_size
        self.feature_layers = model.feature_layers
        self._model = model
        self._lookup = lookup
        self._calibration = calibration

    def bytes_per_block(self, block_size: int) -> int:
        return self._model.bytes_per_block(block_size)

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        self._model.allocate_context(num_blocks, block_size)

    def observe(self, features: torch.Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        self._model.observe(features, positions, slots)

    def forget(self, sequence_id: int) -> None:
        self._model.forget(sequence_id)
        self._lookup.forget(sequence_id)

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        sampled = np.array([row.temperature > 0 for row in rows], np.bool_)
        draft = self._lookup.propose(rows)
        expected = self._expected_accepted(draft, sampled, LOOKUP)
        source = np.full(len(rows), LOOKUP, np.int8)
        free_only = np.array([row.free_only for row in rows], np.bool_)
        unsure = np.flatnonzero((expected < SURE_SHARE * self.block_size) & ~free_only)
        if unsure.size:
            modelled = self._model.propose([rows[i] for i in unsure.tolist()])
            better = self._expected_accepted(modelled, sampled[unsure], MODEL) > expected[unsure]
            taken = unsure[better]
            draft.tokens[taken] = modelled.tokens[better]
            draft.lengths[taken] = modelled.lengths[better]
            draft.confidence[taken] = modelled.confidence[better]
            source[taken] = MODEL
        return Draft(draft.tokens, draft.lengths, draft.confidence, source=source)

    def _expected_accepted(self, draft: Draft, sampled: NDArray[np.bool_], source: int) -> NDArray[np.float32]:
        """[B], drafts of the block that the target is expected to accept."""
        survival = self._calibration().survival(draft.confidence, sampled, source)
        proposed = np.arange(self.block_size) < draft.lengths[:, None]
        return np.where(proposed, survival, np.float32(0.0)).sum(axis=1)

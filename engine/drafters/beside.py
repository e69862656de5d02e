"""Two drafters side by side, of which one costs nothing: for each sequence the block that promises more wins.

Lookup is right for long where text repeats itself, a prediction where the client knew the answer; a model drafter is right
more often everywhere else. The choice looks at the drafted tokens, so it is lossless under coupled verification only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.calibration import CalibrationTable, Source
from dspark.engine.drafters.drafter import Draft, Drafter, DraftRow

SURE_SHARE = 0.75
"""Expected accepted share of the block from which on the free drafter's is taken without asking the other."""


class Beside:
    """Proposes what `main` or `free` proposes; `Draft.source` says which: `main`'s sources, then `free`."""

    def __init__(self, main: Drafter, free: Drafter, calibration: Callable[[], CalibrationTable]) -> None:
        """free: a drafter without a context and of one source, with `main`'s block size, which it shares the work with.

        calibration: the newest table, with a kind per source.
        """
        # one that has something only for requests with a prediction is not part of what the operator chose
        self.name = f"{main.name}+{free.name}" if free.proposes_free else main.name
        self.proposes_free = main.proposes_free or free.proposes_free
        self.sources = (*main.sources, *free.sources)
        self.block_size = main.block_size
        self.feature_layers = main.feature_layers
        self._main = main
        self._main_has_free = main.proposes_free or isinstance(main, Beside)
        self._free = free
        self._calibration = calibration

    def bytes_per_block(self, block_size: int) -> int:
        return self._main.bytes_per_block(block_size)

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        self._main.allocate_context(num_blocks, block_size)

    def observe(self, features: torch.Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        self._main.observe(features, positions, slots)

    def forget(self, sequence_id: int) -> None:
        self._main.forget(sequence_id)
        self._free.forget(sequence_id)

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        draft = self._free.propose(rows)
        asked = np.array([self._main_has_free or not row.free_only for row in rows], np.bool_)
        if asked.all() and not draft.lengths.any():
            return self._main.propose(rows)
        sampled = np.array([row.temperature > 0 for row in rows], np.bool_)
        source = np.full(len(rows), len(self._main.sources), np.int8)
        expected = self._expected_accepted(draft, rows, sampled, source)
        unsure = np.flatnonzero(asked & (expected < SURE_SHARE * self.block_size))
        if unsure.size:
            unsure_rows = [rows[i] for i in unsure.tolist()]
            other = self._main.propose(unsure_rows)
            other_source: Source = 0 if other.source is None else other.source
            better = self._expected_accepted(other, unsure_rows, sampled[unsure], other_source) > expected[unsure]
            taken = unsure[better]
            draft.tokens[taken] = other.tokens[better]
            draft.lengths[taken] = other.lengths[better]
            draft.confidence[taken] = other.confidence[better]
            source[taken] = 0 if other.source is None else other.source[better]
        return Draft(draft.tokens, draft.lengths, draft.confidence, source=source)

    def _expected_accepted(
        self, draft: Draft, rows: Sequence[DraftRow], sampled: NDArray[np.bool_], source: Source
    ) -> NDArray[np.float32]:
        """[B], drafts of the block that the target is expected to accept: none beyond what the row's grammar allows."""
        survival = self._calibration().survival(draft.confidence, sampled, source)
        legal = [
            length if row.legal is None else row.legal(tokens[:length])
            for row, tokens, length in zip(rows, draft.tokens, draft.lengths.tolist(), strict=True)
        ]
        proposed = np.arange(self.block_size) < np.array(legal)[:, None]
        return np.where(proposed, survival, np.float32(0.0)).sum(axis=1)

"""Which context positions of a drafter hold valid K/V, for drafters whose context costs a pass of their own.

Such a drafter does not follow the target at every step: nothing is computed while nobody wants drafts. Asked to propose,
it first catches up, in chunks under a budget of tokens per call; a sequence that is not there yet gets no proposal this
time.

The K/V of position p are a function of the tokens 0 … p alone and lie under the target's block ids. So validity is
content-addressed: for each block we keep the name (`block_name`, a hash chain) of the tokens that its K/V were computed
from. A block whose name is the one that the sequence's own tokens give is valid, whoever filled it and whenever. Prefix
hits, preemption, eviction and re-use of blocks therefore need no messages. A block that is being written has no name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark.engine.drafters.drafter import DraftRow
from dspark.engine.kv_cache import block_name

_ROOT = b""
_NO_TOKENS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class ContextChunks:
    """What to compute now for B sequences: positions starts[i] … ends[i]-1 of sequence i, perhaps none.

    starts, ends: [B] int32. ready: [B] bool, all positions before the anchor are valid once that is done.
    """

    starts: NDArray[np.int32]
    ends: NDArray[np.int32]
    ready: NDArray[np.bool_]


@dataclass(slots=True)
class _Progress:
    """Of one sequence. valid: positions 0 … valid-1 hold its K/V. names: of its full blocks, as far as known.

    drafted: tokens whose K/V lie at position `valid` and behind it: valid as well if the sequence goes on with them.
    """

    valid: int = 0
    names: list[bytes] = field(default_factory=list)
    drafted: NDArray[np.int64] = field(default_factory=lambda: _NO_TOKENS)


class CatchUp:
    """Bookkeeping only; no tensor. For each call: `plan`, compute the chunks, `computed`, and perhaps `drafted`."""

    def __init__(self, tokens_per_call: int, round_tokens: int) -> None:
        """tokens_per_call: shared by the sequences of a call, the oldest first.

        round_tokens: that each sequence may always compute, the most that one round adds. Without it a large batch of
        sequences that lag by their last round only would use up the budget and leave some without drafts.
        """
        self._tokens_per_call = tokens_per_call
        self._round_tokens = round_tokens
        self._block_size = 0
        self._sequences: dict[int, _Progress] = {}
        self._names: dict[int, bytes] = {}

    def allocate(self, block_size: int) -> None:
        """The K/V tensors were made: blocks of `block_size` positions, none of which holds anything."""
        self._block_size = block_size
        self._sequences, self._names = {}, {}

    def plan(self, rows: Sequence[DraftRow]) -> ContextChunks:
        """What to compute in this call. The blocks that this and drafting may write lose their names."""
        starts = np.array([self._advance(row) for row in rows], np.int32)
        missing = np.array([row.position for row in rows], np.int32) - starts
        counts = np.minimum(missing, self._round_tokens)
        left = max(0, self._tokens_per_call - int(counts.sum()))
        for i in sorted(range(len(rows)), key=lambda i: rows[i].sequence_id):  # ids ascend in order of arrival
            more = min(int(missing[i] - counts[i]), left)
            counts[i] += more
            left -= more
        ends = starts + counts
        for row, start, end in zip(rows, starts.tolist(), ends.tolist(), strict=True):
            self.overwrite(row.block_table[start // self._block_size : -(-end // self._block_size)].tolist())
            self.overwrite(row.block_table[row.position // self._block_size :].tolist())
        return ContextChunks(starts, ends, counts == missing)

    def computed(self, rows: Sequence[DraftRow], chunks: ContextChunks) -> None:
        """The chunks' K/V are in place."""
        for row, end in zip(rows, chunks.ends.tolist(), strict=True):
            self._extend(row, self._sequences[row.sequence_id], end)

    def drafted(self, row: DraftRow, tokens: NDArray[np.int64]) -> None:
        """K/V of `tokens` (the anchor, then drafts) lie at the anchor's position and behind it.

        Those beyond the row's own blocks do not count: they lie in blocks that the next call overwrites.
        """
        own = len(row.block_table) * self._block_size - row.position
        self._sequences[row.sequence_id].drafted = tokens[: max(0, own)].copy()

    def overwrite(self, blocks: Iterable[int]) -> None:
        """What the K/V of these blocks were computed from no longer holds."""
        for block in blocks:
            self._names.pop(block, None)

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended or was preempted; its full blocks keep their names."""
        self._sequences.pop(sequence_id, None)

    def _advance(self, row: DraftRow) -> int:
        """Take in accepted drafts and blocks that others filled; returns the first position to compute."""
        progress = self._sequences.setdefault(row.sequence_id, _Progress())
        if len(progress.drafted):
            known = row.tokens[progress.valid : progress.valid + len(progress.drafted)]
            same = progress.drafted[: len(known)] == known
            came_true = len(known) if same.all() else int(same.argmin())
            self._extend(row, progress, min(progress.valid + came_true, row.position))
            progress.drafted = _NO_TOKENS
        while progress.valid < row.position:
            block = progress.valid // self._block_size
            end = (block + 1) * self._block_size
            if end > row.position or self._names.get(int(row.block_table[block])) != self._name(row, progress, block):
                break
            progress.valid = end
        return progress.valid

    def _extend(self, row: DraftRow, progress: _Progress, valid: int) -> None:
        """Positions up to `valid` hold K/V now; name the blocks that have become full."""
        for block in range(progress.valid // self._block_size, valid // self._block_size):
            self._names[int(row.block_table[block])] = self._name(row, progress, block)
        progress.valid = valid

    def _name(self, row: DraftRow, progress: _Progress, block: int) -> bytes:
        names = progress.names
        while len(names) <= block:
            start = len(names) * self._block_size
            names.append(block_name(names[-1] if names else _ROOT, row.tokens[start : start + self._block_size]))
        return names[block]

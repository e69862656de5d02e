"""What the load controller remembers: how good recent draft blocks were, and how each sequence's drafts fared."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MEMORY_BLOCKS = 128.0
"""Blocks after which an old one counts 1/e in the picture of recent drafts."""
SURVIVAL_BINS = 64
SEQUENCE_MEMORY_ROUNDS = 64.0
SEQUENCE_PRIOR_ROUNDS = 2.0
MOST_ROUNDS = 200.0
"""Evidence that counts against the prior, at most; the means themselves forget sooner."""
TRIAL_RATE = 0.25
"""Weight of a round that follows a skip: what a trial shows counts more than what was so long ago."""
LONGEST_SKIP_ROUNDS = 64


class RecentBlocks:
    """How good recent draft blocks were: a decayed histogram of their survivals."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.seen = 0
        # starts with one block of mild optimism, so that there is a price before the first block
        self.replace(0.8 ** np.arange(1, block_size + 1, dtype=np.float32)[None, :])

    def replace(self, survival: NDArray[np.float32]) -> None:
        """Forget everything but these blocks: [m, γ], 0 where nothing was proposed."""
        self._count = np.zeros(SURVIVAL_BINS)
        self._sum = np.zeros(SURVIVAL_BINS)
        self._count_above = np.zeros(SURVIVAL_BINS + 1)
        self._sum_above = np.zeros(SURVIVAL_BINS + 1)
        self._blocks = 0.0
        self.add(survival)

    def add(self, survival: NDArray[np.float32]) -> None:
        """Take in blocks: [m, γ], 0 where nothing was proposed."""
        self.seen += len(survival)
        flat = survival.ravel()
        # likeliest first; bin SURVIVAL_BINS is that of survival 0, not proposed, and is dropped
        bins = ((1.0 - flat) * SURVIVAL_BINS).astype(np.intp)
        decay = math.exp(-len(survival) / MEMORY_BLOCKS)
        self._count *= decay
        self._count += np.bincount(bins, minlength=SURVIVAL_BINS + 1)[:SURVIVAL_BINS]
        self._sum *= decay
        self._sum += np.bincount(bins, weights=flat, minlength=SURVIVAL_BINS + 1)[:SURVIVAL_BINS]
        self._blocks = self._blocks * decay + len(survival)
        self._count.cumsum(out=self._count_above[1:])
        self._sum.cumsum(out=self._sum_above[1:])

    @property
    def mean_accepted(self) -> float:
        """Expected accepted drafts of a whole block."""
        return float(self._sum_above[-1]) / self._blocks

    def expected(self, sequences: int, limit: int, quality: float = 1.0) -> NDArray[np.float64]:
        """[limit + 1] float64, expected accepted drafts when the 0..limit likeliest of `sequences` blocks are verified.

        quality: of those sequences, relative to the recent ones.
        """
        scale = sequences / self._blocks
        counts = np.arange(limit + 1)
        expected = np.interp(counts, self._count_above * scale, self._sum_above * scale)
        return np.minimum(expected * quality, counts)


class SequenceRecords:
    """Per sequence: how its drafts fared lately, and the rounds it is not drafted for."""

    def __init__(self) -> None:
        self._slot: dict[int, int] = {}
        self._free: list[int] = []
        self._grow(64)

    def _grow(self, capacity: int) -> None:
        held = len(self._slot)
        for name, kind in (
            ("rounds", np.float64),  # rounds in the means below
            ("expected_block", np.float64),  # mean expected accepted drafts of a whole block
            ("expected", np.float64),  # mean expected accepted drafts among those verified
            ("accepted", np.float64),  # mean accepted drafts
            ("attempted", np.bool_),  # the next block was drafted, or tried
            ("skip", np.int64),  # rounds still to skip
            ("backoff", np.int64),  # skips in a row
        ):
            fresh = np.zeros(capacity, dtype=kind)
            if held:
                fresh[:held] = getattr(self, name)
            setattr(self, name, fresh)
        self._free = list(range(capacity - 1, held - 1, -1))

    rounds: NDArray[np.float64]
    expected_block: NDArray[np.float64]
    expected: NDArray[np.float64]
    accepted: NDArray[np.float64]
    attempted: NDArray[np.bool_]
    skip: NDArray[np.int64]
    backoff: NDArray[np.int64]

    def slots(self, sequence_ids: Iterable[int]) -> NDArray[np.intp]:
        """Index of each sequence in the arrays; a new sequence gets a clean one."""
        return np.array([self._slot.get(i) if i in self._slot else self._open(i) for i in sequence_ids], dtype=np.intp)

    def _open(self, sequence_id: int) -> int:
        if not self._free:
            self._grow(2 * len(self._slot))
        slot = self._free.pop()
        self._slot[sequence_id] = slot
        for values in (self.rounds, self.expected_block, self.expected, self.accepted):
            values[slot] = 0.0
        self.attempted[slot] = False
        self.skip[slot] = self.backoff[slot] = 0
        return slot

    @property
    def capacity(self) -> int:
        """Sequences that fit without growing."""
        return len(self.rounds)

    def known(self, sequence_ids: Iterable[int]) -> NDArray[np.bool_]:
        """[B] bool: the sequence has a slot, it was not forgotten."""
        return np.array([i in self._slot for i in sequence_ids], dtype=np.bool_)

    def forget(self, sequence_id: int) -> None:
        slot = self._slot.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def learn(
        self,
        slots: NDArray[np.intp],
        expected_block: NDArray[np.float64],
        expected: NDArray[np.float64],
        accepted: NDArray[np.float64],
    ) -> None:
        """Take in one drafted round of each of `slots`."""
        rounds = np.minimum(self.rounds[slots] + 1.0, MOST_ROUNDS)
        self.rounds[slots] = rounds
        rate = np.maximum(1.0 / np.minimum(rounds, SEQUENCE_MEMORY_ROUNDS), TRIAL_RATE * (self.backoff[slots] > 0))
        for mean, value in (
            (self.expected_block, expected_block),
            (self.expected, expected),
            (self.accepted, accepted),
        ):
            mean[slots] += rate * (value - mean[slots])

    def quality(self, slots: NDArray[np.intp], mean_accepted: float) -> NDArray[np.float64]:
        """[B] float64, expected accepted drafts relative to the recent mean block's; 1 without a record.

        Lowered where clearly fewer drafts were accepted than expected (two standard deviations of a Poisson count): a
        drafter without a confidence head expects the same of every sequence.
        """
        rounds = self.rounds[slots]
        counted = np.minimum(rounds, SEQUENCE_MEMORY_ROUNDS)
        accepted = self.accepted[slots] * counted
        honest = np.minimum(
            (accepted + 2.0 + 2.0 * np.sqrt(accepted + 1.0)) / (self.expected[slots] * counted + 2.0), 1.0
        )
        own = self.expected_block[slots] * honest / max(mean_accepted, 1e-6)
        return np.minimum((SEQUENCE_PRIOR_ROUNDS + rounds * own) / (SEQUENCE_PRIOR_ROUNDS + rounds), 4.0)

    def eligible(self, slots: NDArray[np.intp]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Count one round: ([B] not being skipped, [B] a skip ran out: one trial round, whatever the record says)."""
        skip = self.skip[slots]
        skipped = skip > 0
        if not skipped.any():
            return ~skipped, skipped
        skip -= skipped
        self.skip[slots] = skip
        return ~skipped, skipped & (skip == 0)

    def judge(self, drafted: NDArray[np.intp], rejected: NDArray[np.intp]) -> None:
        """Drafting paid for the first, whose back-off ends, and not for the others: skip 2, 4, 8, ... rounds each."""
        self.backoff[drafted] = 0
        if rejected.size:
            self.backoff[rejected] += 1
            self.skip[rejected] = np.minimum(2 ** self.backoff[rejected], LONGEST_SKIP_ROUNDS)

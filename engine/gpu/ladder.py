"""The sizes that device work is padded to, so that a few captured CUDA graphs serve every step."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

DENSE_UP_TO = 8
"""Powers of two up to here, multiples of it behind: at most 7 rows are computed for nothing."""
SPARSE_FROM = 64
"""From here on steps of a quarter of the power of two below: at most a fifth is computed for nothing."""


def ladder(largest: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, …, 64, 80, 96, 112, 128, 160, … below `largest`, then `largest`."""
    rungs = [1]
    while rungs[-1] < largest:
        last = rungs[-1]
        if last < DENSE_UP_TO:
            step = last
        else:
            step = DENSE_UP_TO if last < SPARSE_FROM else 1 << (last.bit_length() - 3)
        rungs.append(min(last + step, largest))
    return rungs


def doubling(largest: int) -> list[int]:
    """1, 2, 4, … below `largest`, then `largest`: for what padding costs next to nothing of."""
    return [*(1 << power for power in range((largest - 1).bit_length())), largest]


def padded(size: int, rungs: Sequence[int]) -> int | None:
    """The smallest rung of at least `size`; None beyond the ladder."""
    index = bisect_left(rungs, size)
    return rungs[index] if index < len(rungs) else None

from __future__ import annotations

import pytest

from dspark.engine.gpu.ladder import doubling, ladder, padded


def test_the_ladder_is_dense_below_and_a_quarter_apart_above() -> None:
    assert ladder(160) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160]
    assert doubling(64) == [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize("largest", [1, 2, 3, 7, 60, 64, 65, 511, 512])
def test_both_ladders_rise_to_the_largest_size_and_waste_little(largest: int) -> None:
    for rungs in (ladder(largest), doubling(largest)):
        assert rungs == sorted(set(rungs))
        assert rungs[-1] == largest
        for size in range(1, largest + 1):
            rung = padded(size, rungs)
            assert rung is not None
            assert size <= rung <= largest
            assert rung < 2 * size
    assert all((padded(size, ladder(largest)) or 0) - size < max(8, size / 4) for size in range(1, largest + 1))


def test_beyond_the_ladder_nothing_is_padded() -> None:
    assert padded(65, ladder(64)) is None

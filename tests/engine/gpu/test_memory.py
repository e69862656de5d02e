from __future__ import annotations

import pytest

from dspark.engine.errors import ConfigError
from dspark.engine.gpu.memory import SMALLEST_RESERVE, DeviceMemory, plan_blocks

GIB = 1 << 30
CARD = DeviceMemory(total=24 * GIB, free=10 * GIB, step=2 * GIB)
RESERVE = int(0.05 * CARD.total)
BLOCK = 2 << 20


def test_the_pool_gets_what_a_step_and_the_reserve_leave() -> None:
    assert plan_blocks(CARD, BLOCK, 1 << 20, None) == (8 * GIB - RESERVE) // BLOCK


def test_a_small_card_keeps_a_fixed_reserve() -> None:
    small = DeviceMemory(total=4 * GIB, free=2 * GIB, step=0)
    assert plan_blocks(small, BLOCK, 1 << 20, None) == (2 * GIB - SMALLEST_RESERVE) // BLOCK


def test_never_more_than_all_sequences_can_use() -> None:
    assert plan_blocks(CARD, BLOCK, 100, None) == 100


def test_what_is_asked_for_is_given() -> None:
    assert plan_blocks(CARD, BLOCK, 1 << 20, GIB) == GIB // BLOCK


@pytest.mark.parametrize(
    ("memory", "asked"),
    [(CARD, 8 * GIB), (CARD, BLOCK), (DeviceMemory(24 * GIB, 3 * GIB, 2 * GIB), None)],
    ids=["more than there is", "less than two blocks", "no room"],
)
def test_refusals_name_the_option_and_the_sizes(memory: DeviceMemory, asked: int | None) -> None:
    with pytest.raises(ConfigError, match="bytes") as error:
        plan_blocks(memory, BLOCK, 1 << 20, asked)
    assert error.value.field == "kv_cache_memory"
    assert str(memory.free) in str(error.value)

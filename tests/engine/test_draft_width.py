"""Slots that are hardly ever worth verifying are not drafted, unless drafting them costs nothing."""

from __future__ import annotations

import numpy as np
import pytest
from virtual_engine import BLOCK, PROFILES, TABLES, Texts, VirtualEngine, controller_profiled_on

from dspark.engine.draft_width import WIDE_PERIOD_STEPS, DraftWidth

BY_NAME = {profile.name: profile for profile in PROFILES}


def blocks(count: int, acceptance: float, width: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    survival = np.cumprod(np.full((count, BLOCK), acceptance, np.float32), axis=1)
    survival[:, width:] = 0.0
    return survival, np.full(count, width, np.int32)


def choose(width: DraftWidth, slot_s: float) -> int:
    return width.choose(4, price=100.0, draft_s=0.002 + slot_s * np.arange(BLOCK))


def test_whole_blocks_are_drafted_until_each_slot_was_seen_once() -> None:
    width = DraftWidth(BLOCK, 1)
    assert choose(width, 1.0) == BLOCK
    width.learn(*blocks(8, 0.5, width=3), np.zeros(BLOCK))
    assert choose(width, 1.0) == BLOCK
    width.learn(*blocks(8, 0.5), np.zeros(BLOCK))
    assert choose(width, 1.0) == 1


def test_the_width_is_where_a_slot_stops_paying() -> None:
    width = DraftWidth(BLOCK, 1)
    width.learn(*blocks(64, 0.5), np.zeros(BLOCK))
    # 4 blocks, 0.5^k tokens each; a slot costs 100 · 1 ms = 0.1 tokens: 4 · 0.5^5 pays, 4 · 0.5^6 does not
    assert choose(width, 0.001) == 5
    assert choose(width, 0.0) == BLOCK
    assert choose(width, 1.0) == 1


def test_a_slot_whose_row_costs_the_target_more_than_it_brings_is_not_drafted() -> None:
    width = DraftWidth(BLOCK, 1)
    row_price = np.array([0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.0])
    for _ in range(2):
        width.learn(*blocks(64, 0.9), row_price)
    assert choose(width, 0.02) == 3  # 4 · (0.9^5 + …) would pay for slot 4 in passing, were a slot cheaper


def test_where_narrow_blocks_cannot_be_had_whole_ones_are_drafted() -> None:
    width = DraftWidth(BLOCK, BLOCK)
    width.learn(*blocks(64, 0.5), np.zeros(BLOCK))
    assert choose(width, 1.0) == BLOCK


def test_now_and_then_a_whole_block_shows_what_the_last_slots_are_worth_now() -> None:
    width = DraftWidth(BLOCK, 1)
    width.learn(*blocks(64, 0.3), np.zeros(BLOCK))
    chosen = []
    for _ in range(40 * WIDE_PERIOD_STEPS):
        chosen.append(choose(width, 0.003))
        width.learn(*blocks(4, 0.95, chosen[-1]), np.zeros(BLOCK))
    assert min(chosen[: WIDE_PERIOD_STEPS - 1]) == max(chosen[: WIDE_PERIOD_STEPS - 1]) < 3
    assert chosen[WIDE_PERIOD_STEPS - 1] == BLOCK
    assert set(chosen[-WIDE_PERIOD_STEPS:]) == {BLOCK}


@pytest.mark.parametrize(("machine", "name"), [("zen4_cpu", "decaying"), ("memory_bound_gpu", "high")])
def test_in_virtual_time_blocks_are_as_wide_as_pays(machine: str, name: str) -> None:
    table = next(table for table in TABLES if table.name == machine)
    texts = Texts(BY_NAME[name], 24, 200)
    trace = VirtualEngine(table, texts, controller_profiled_on(table), 4).run()
    late = slice(len(trace.width) // 2, None)
    widths = [width for width, drafted in zip(trace.width[late], trace.drafting[late], strict=True) if drafted]
    assert np.median(widths) > 5 if name == "high" else np.median(widths) < 5

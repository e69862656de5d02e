"""off | fixed | adaptive side by side: engines that take turns, and a comparison with the mode that is the better one."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from dspark.benchmarks import side_by_side
from dspark.benchmarks.modes import check_same_answers, measure, table
from dspark.benchmarks.side_by_side import TakingTurns
from dspark.benchmarks.slices import MODES, Load, Mode, Slice
from dspark.engine import Engine, EngineConfig

PROMPTS = [(5, 6, 7, 5, 6, 7, 5, last) for last in range(8, 20)]


class Watched(Engine):
    """Notes when each step began and ended."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.step_times_s: list[tuple[float, float]] = []

    async def _step(self) -> bool:
        began_s = time.perf_counter()
        worked = await super()._step()
        if worked:
            self.step_times_s.append((began_s, time.perf_counter()))
        return worked


class WatchedTurns(TakingTurns, Watched):
    pass


def _slice(mode: Mode, repeat: int, speed: float, answer: tuple[int, ...] = ()) -> Slice:
    return Slice(Load(clients=1), mode, repeat, speed, 1.0, 1.0, 0.1, 4, 3, 2, 5, {(1,): answer})


def test_three_engines_take_turns_and_give_the_same_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "TURN_S", 0.02)
    folder = write_tiny_model(tmp_path / "model")
    config = EngineConfig(
        model=str(folder), cache_dir=tmp_path / "cache", dtype="float32", threads=1, max_num_seqs=4,
        max_num_batched_tokens=64, kv_cache_bytes=1 << 20, drafter="lookup",
    )  # fmt: skip
    engines = {mode: WatchedTurns.load(config) for mode in MODES}
    args = argparse.Namespace(temperature=0.0, max_tokens=32, slice_s=0.3, concurrency=[2], rates=[20.0], repeats=2)
    slices = asyncio.run(measure(args, engines, PROMPTS))
    assert [(str(one.load), one.mode, one.repeat) for one in slices[:6]] == [
        ("2 clients", mode, repeat) for repeat in (0, 1) for mode in MODES
    ]
    assert len(slices) == 12
    assert all(one.speed > 0 and one.answers for one in slices)
    assert any(one.accepted for one in slices), "nothing was accepted: equal answers would prove nothing"
    steps = sorted((*times_s, mode) for mode, engine in engines.items() for times_s in engine.step_times_s)
    assert all(one[1] <= later[0] for one, later in itertools.pairwise(steps)), "two engines computed at the same time"
    changes = sum(one[2] != later[2] for one, later in itertools.pairwise(steps))
    assert 12 < changes < len(steps) / 2, f"{changes} turns in {len(steps)} steps"


def test_adaptive_is_compared_with_the_mode_that_is_better_over_all_repeats() -> None:
    speeds: dict[Mode, list[float]] = {"off": [10, 12, 11], "fixed": [11, 9, 10], "adaptive": [10, 12, 11]}
    slices = [_slice(mode, repeat, speed) for mode in MODES for repeat, speed in enumerate(speeds[mode])]
    header, _, row = table(slices, floor_ms=1.0).splitlines()
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert cells["÷ best"] == "1.000", "in repeat 0 fixed was faster, but off is the better mode"


def test_different_answers_end_the_run_and_what_was_cut_off_is_not_a_difference() -> None:
    check_same_answers([_slice("off", 0, 1.0, (1, 2, 3)), _slice("fixed", 0, 1.0, (1, 2))])
    with pytest.raises(SystemExit, match="fixed and off gave different tokens"):
        check_same_answers([_slice("off", 0, 1.0, (1, 2, 3)), _slice("fixed", 0, 1.0, (1, 4))])

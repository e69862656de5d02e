"""What a step costs: profile, drift, residuals, persistence."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_engine import BLOCK, TABLES, CostTable

from dspark.engine.cost_model import CostModel, SizeCurve, ladder

ROWS = 512
BY_NAME = {table.name: table for table in TABLES}


class CountingTimer:
    """A recorded table that counts what it was asked to measure."""

    rows_per_sequence = 8
    block_size = BLOCK

    def __init__(self, table: CostTable, context_s: float = 0.0, draft_context_s: float = 0.0) -> None:
        self.table, self.context_s, self.draft_context_s = table, context_s, draft_context_s
        self.spent_s = 0.0
        self.passes: Counter[int] = Counter()

    def verify_s(self, rows: int, context_tokens: int) -> float:
        drafts = rows - -(-rows // self.rows_per_sequence)
        seconds = self.table.verify_s(rows) + (self.context_s + self.draft_context_s * drafts) * context_tokens
        self.spent_s += seconds
        self.passes[rows] += 1
        return seconds

    def draft_s(self, slots: int) -> float:
        return self.table.draft_s(slots)


def _profiled(name: str, budget_s: float = 1e9) -> CostModel:
    return CostModel.profile(BY_NAME[name], ROWS, 64, budget_s=budget_s)


def test_the_ladder_is_dense_at_small_sizes_and_ends_at_the_largest() -> None:
    assert ladder(20) == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20]
    assert ladder(5) == [1, 2, 3, 4, 5]
    assert ladder(1) == [1]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_predicts_what_was_measured_between_the_rungs_too(table: CostTable) -> None:
    rows = np.arange(1, ROWS + 1)
    predicted = _profiled(table.name).verify_s(rows)
    np.testing.assert_allclose(predicted, table.verify[1:], rtol=0.1)
    assert np.median(np.abs(predicted / table.verify[1:] - 1)) < 0.01


def test_finds_the_jumps_between_the_rungs() -> None:
    model = _profiled("jagged")
    for edge in (16, 32, 64, 128):
        assert float(model.verify_s(edge + 1) / model.verify_s(edge)) == pytest.approx(
            BY_NAME["jagged"].verify_s(edge + 1) / BY_NAME["jagged"].verify_s(edge), rel=0.03
        )


def test_a_small_budget_stops_the_climb_and_extrapolates() -> None:
    timer = CountingTimer(BY_NAME["zen4_cpu"])
    model = CostModel.profile(timer, ROWS, 8, budget_s=0.5)
    assert timer.spent_s < 1.0
    assert max(timer.passes) < ROWS
    assert model.max_rows == ROWS
    assert float(model.verify_s(ROWS)) == pytest.approx(BY_NAME["zen4_cpu"].verify_s(ROWS), rel=0.3)


def test_a_slow_machine_is_measured_as_far_as_a_full_batch_with_a_draft_each() -> None:
    slow = CountingTimer(BY_NAME["jagged"])
    model = CostModel.profile(slow, ROWS, 64, budget_s=1e-3)
    assert max(slow.passes) == 128
    for rows in (64, 83, 100, 128):
        assert float(model.verify_s(rows)) == pytest.approx(BY_NAME["jagged"].verify_s(rows), rel=0.1)


def test_a_draft_row_costs_its_context_again_at_the_price_that_was_measured() -> None:
    timer = CountingTimer(BY_NAME["amx_cpu"], context_s=3e-6, draft_context_s=1e-6)
    model = CostModel.profile(timer, ROWS, 64, context_tokens=4096)
    plain, verifying = model.verify_curve(2000), model.verify_curve(2000, anchors=4, draft_context=500.0)
    np.testing.assert_allclose(verifying[:5], plain[:5])
    np.testing.assert_allclose(verifying[5:] - plain[5:], np.arange(1, ROWS - 3) * 500e-6, rtol=1e-6)


def test_what_draft_rows_read_is_not_taken_for_a_slower_machine() -> None:
    timer = CountingTimer(BY_NAME["amx_cpu"], context_s=3e-6, draft_context_s=1e-6)
    model = CostModel.profile(timer, ROWS, 64, context_tokens=4096)
    for _ in range(50):
        model.observe_verify(20, 2000, float(model.verify_curve(2000, 4, 500.0)[20]), draft_context_tokens=16 * 500)
    assert model.drift == pytest.approx(1.0, abs=1e-3)


def test_context_costs_what_was_measured() -> None:
    model = CostModel.profile(CountingTimer(BY_NAME["amx_cpu"], context_s=1e-6), ROWS, 64, context_tokens=4096)
    added = float(model.verify_s(8, 10_000) - model.verify_s(8, 0))
    assert added == pytest.approx(10_000 * 1e-6, rel=0.01)
    assert model.verify_curve(10_000)[8] == pytest.approx(float(model.verify_s(8, 10_000)))


def test_drafting_for_nobody_costs_nothing_and_a_slow_outlier_does_not_bend_the_curve() -> None:
    model = _profiled("zen4_cpu")
    assert model.draft_s(0) == 0.0
    np.testing.assert_allclose(model.draft_curve(3, 2), [0.0, model.draft_s(2), model.draft_s(4), model.draft_s(6)])
    curve = SizeCurve([1, 2, 4, 8], [1.0, 9.0, 1.2, 1.3])
    assert curve.one(2) <= curve.one(4) == pytest.approx(1.2)


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.floats(1e-4, 10.0), min_size=6, max_size=6),
    seen=st.lists(st.tuples(st.integers(1, 40), st.floats(1e-5, 100.0)), max_size=40),
)
def test_stays_monotone_and_positive_whatever_is_measured_and_seen(
    seconds: list[float], seen: list[tuple[int, float]]
) -> None:
    model = CostModel(SizeCurve([1, 2, 4, 8, 16, 32], seconds), SizeCurve([1], [0.001]))
    for rows, taken_s in seen:
        model.observe_verify(rows, 0, taken_s)
    predicted = model.verify_s(np.arange(1, 60))
    assert (np.diff(predicted) >= -1e-12).all()
    assert (predicted > 0).all()
    assert np.isfinite(predicted).all()


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_table_wrong_by_two_is_right_after_twenty_steps_at_all_sizes(factor: float) -> None:
    model, truth = _profiled("zen4_cpu"), BY_NAME["zen4_cpu"].scaled(factor)
    for _ in range(20):
        model.observe_verify(8, 0, truth.verify_s(8))
    for rows in (1, 8, 32, 128):
        assert float(model.verify_s(rows)) == pytest.approx(truth.verify_s(rows), rel=0.05)
    assert model.draft_s(8) == pytest.approx(truth.draft_s(8), rel=0.05)
    assert model.error_ratio > 0.02


def test_one_stalled_step_moves_no_prediction_by_more_than_three_percent() -> None:
    model = _profiled("amx_cpu")
    for _ in range(20):
        model.observe_verify(8, 0, 0.0101)
    before = float(model.verify_s(8))
    model.observe_verify(8, 0, 2.0)
    assert float(model.verify_s(8)) == pytest.approx(before, rel=0.03)


def test_a_wrong_shape_is_learned_where_it_is_visited() -> None:
    model, truth = _profiled("memory_bound_gpu"), BY_NAME["zen4_cpu"]
    for step in range(400):
        rows = (2, 32, 128)[step % 3]
        model.observe_verify(rows, 0, truth.verify_s(rows))
    for rows in (2, 32, 128):
        assert float(model.verify_s(rows)) == pytest.approx(truth.verify_s(rows), rel=0.15)


def test_draft_and_host_times_follow_what_is_seen() -> None:
    model = _profiled("amx_cpu")
    for _ in range(200):
        model.observe_draft(4, 0.008)
        model.observe_host(4, 0.002)
        model.observe_host(40, 0.005)
    assert model.draft_s(4) == pytest.approx(0.008, rel=0.05)
    assert model.host_s(4) == pytest.approx(0.002)
    assert model.host_s(64) == pytest.approx(0.005)
    assert model.host_s(1) == pytest.approx(0.002)


def test_a_saved_model_predicts_the_same(tmp_path: Path) -> None:
    model = _profiled("amx_cpu")
    for _ in range(30):
        model.observe_verify(8, 0, 0.013)
    model.observe_host(4, 0.002)
    path = tmp_path / "costs" / "model.json"
    model.save(path, "cpu amx smollm2 1")
    loaded = CostModel.load(path, "cpu amx smollm2 1")
    assert loaded is not None
    np.testing.assert_allclose(loaded.verify_curve(100), model.verify_curve(100))
    assert loaded.draft_s(5) == pytest.approx(model.draft_s(5))
    assert loaded.host_s(4) == pytest.approx(0.002)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.json"]


def test_a_missing_file_is_no_model(tmp_path: Path) -> None:
    assert CostModel.load(tmp_path / "none.json", "key") is None


def _text_of(broken: str, path: Path) -> str:
    state = json.loads(path.read_text())
    if broken == "cut":
        return path.read_text()[:40]
    if broken == "list":
        return "[1, 2]"
    if broken == "negative":
        state["verify"]["seconds"][0] = -1.0
    elif broken == "misshapen":
        state["verify"]["residual"] = [0.0]
    elif broken == "drift":
        state["drift"] = float("nan")
    elif broken == "missing":
        del state["draft"]
    elif broken == "foreign":
        state["key"] = "other machine"
    return json.dumps(state)


@pytest.mark.parametrize("broken", ["cut", "list", "negative", "misshapen", "drift", "missing", "foreign"])
def test_a_corrupt_or_foreign_file_is_logged_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    path = tmp_path / "model.json"
    _profiled("amx_cpu").save(path, "key")
    path.write_text(_text_of(broken, path))
    with caplog.at_level(logging.INFO, logger="dspark.engine.cost_model"):
        assert CostModel.load(path, "key") is None
    assert str(path) in caplog.text


@pytest.mark.parametrize(
    ("sizes", "seconds"), [([], []), ([2, 3], [1.0, 1.0]), ([1, 1], [1.0, 1.0]), ([1, 2], [1.0, 0.0])]
)
def test_refuses_a_curve_that_is_none(sizes: list[int], seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="must"):
        SizeCurve(sizes, seconds)

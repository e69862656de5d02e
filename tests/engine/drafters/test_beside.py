"""A drafter beside one that costs nothing: per sequence, the block that promises more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark.engine.calibration import Calibration
from dspark.engine.drafters.beside import Beside
from dspark.engine.drafters.drafter import Draft, DraftRow
from dspark.engine.drafters.forced import ForcedDrafter
from dspark.engine.drafters.lookup import LookupDrafter
from dspark.engine.drafters.prediction import PredictionDrafter

GAMMA = 4
MODEL, LOOKUP = 0, 1
REPEATS, NEW = [5, 6, 7, 8, 9, 10, 11, 12, 13, 5, 6, 7, 8, 9], [1, 2, 3, 4]


class FixedModel:
    """Proposes token 50 with the same log-odds everywhere; counts what it is asked for."""

    name = "model"
    sources = (name,)
    proposes_free = False
    block_size = GAMMA
    feature_layers = (1,)

    def __init__(self, log_odds: float, proposed: int = GAMMA) -> None:
        self.log_odds = log_odds
        self.proposed = proposed
        self.asked: list[int] = []

    def bytes_per_block(self, block_size: int) -> int:
        return 10 * block_size

    def allocate_context(self, num_blocks: int, block_size: int) -> None: ...

    def observe(self, features: torch.Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None: ...

    def forget(self, sequence_id: int) -> None: ...

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        self.asked += [row.sequence_id for row in rows]
        shape = (len(rows), GAMMA)
        lengths = np.full(len(rows), self.proposed, np.int32)
        return Draft(np.full(shape, 50, np.int64), lengths, np.full(shape, self.log_odds, np.float32))


def row(sequence_id: int, tokens: list[int], temperature: float = 0.0) -> DraftRow:
    table = np.zeros(1, np.int32)
    return DraftRow(sequence_id, np.array(tokens, np.int64), len(tokens) - 1, temperature, 0, table)


def beside(model: FixedModel, calibration: Calibration | None = None) -> Beside:
    calibration = calibration or Calibration(GAMMA, sources=2)
    return Beside(model, LookupDrafter(GAMMA, proposes_free=True), calibration.table)


def test_each_sequence_gets_the_block_that_promises_more() -> None:
    draft = beside(FixedModel(log_odds=0.0)).propose([row(1, REPEATS), row(2, NEW)])
    assert draft.source is not None
    assert draft.source.tolist() == [LOOKUP, MODEL]
    assert draft.tokens.tolist() == [[10, 11, 12, 13], [50] * GAMMA]
    assert draft.lengths.tolist() == [GAMMA, GAMMA]
    assert draft.confidence[1].tolist() == [0.0] * GAMMA


def test_a_confident_model_wins_over_a_short_match() -> None:
    draft = beside(FixedModel(log_odds=5.0)).propose([row(1, [5, 6, 7, 8, 9, 5, 6])])
    assert draft.source is not None
    assert draft.source.tolist() == [MODEL]


def test_where_the_model_proposes_nothing_a_weak_match_is_taken() -> None:
    draft = beside(FixedModel(log_odds=5.0, proposed=0)).propose([row(1, [5, 6, 7, 5]), row(2, NEW)])
    assert draft.tokens[0].tolist() == [6, 7, 5, 6]
    assert draft.lengths.tolist() == [GAMMA, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_choice_follows_what_each_source_turned_out_to_be_worth(temperature: float) -> None:
    calibration = Calibration(GAMMA, sources=2)
    drafter = beside(FixedModel(log_odds=1.0), calibration)
    request = row(1, REPEATS, temperature)
    before = drafter.propose([request])
    assert before.source is not None
    assert before.source.tolist() == [LOOKUP]
    verified, rejected = np.array([GAMMA], np.int32), np.array([0], np.int32)
    for _ in range(20):
        calibration.observe(before.confidence, np.array([temperature > 0]), verified, rejected, before.source)
    after = drafter.propose([request])
    assert after.source is not None
    assert after.source.tolist() == [MODEL]


def test_the_model_is_not_asked_where_lookup_is_nearly_certain() -> None:
    calibration = Calibration(GAMMA, sources=2)
    model = FixedModel(log_odds=0.0)
    drafter = beside(model, calibration)
    draft = drafter.propose([row(1, REPEATS)])
    verified = np.array([GAMMA], np.int32)
    for _ in range(50):
        calibration.observe(draft.confidence, np.array([False]), verified, verified, draft.source)
    model.asked.clear()
    drafter.propose([row(1, REPEATS), row(2, NEW)])
    assert model.asked == [2]


def test_for_a_free_only_row_the_model_is_not_asked() -> None:
    model = FixedModel(log_odds=5.0)
    rows = [replace(row(1, [5, 6, 7, 8, 9, 5, 6]), free_only=True), replace(row(2, NEW), free_only=True)]
    draft = beside(model).propose(rows)
    assert model.asked == []
    assert draft.lengths.tolist() == [GAMMA, 0]
    assert draft.source is not None
    assert draft.source[0] == LOOKUP


def test_what_the_grammar_forbids_promises_nothing() -> None:
    """The model is surer of its four tokens than lookup, but none of them is allowed."""
    model = FixedModel(log_odds=5.0)
    allowed = replace(row(1, [5, 6, 7, 8, 9, 5, 6]), legal=len)
    cut = replace(allowed, sequence_id=2, legal=lambda tokens: 0 if tokens[0] == 50 else len(tokens))
    draft = beside(model).propose([allowed, cut])
    assert draft.source is not None
    assert draft.source.tolist() == [MODEL, LOOKUP]


def test_what_the_grammar_forces_is_drafted_as_far_as_a_block_goes() -> None:
    forced = ForcedDrafter(GAMMA)
    rows = [row(1, NEW), replace(row(2, NEW), forced=np.array([30, 31])), replace(row(3, NEW), forced=np.arange(9))]
    draft = forced.propose(rows)
    assert draft.lengths.tolist() == [0, 2, GAMMA]
    assert draft.tokens[1, :2].tolist() == [30, 31]
    assert draft.tokens[2].tolist() == [0, 1, 2, 3]


def test_it_is_the_model_for_everything_but_proposing() -> None:
    drafter = beside(FixedModel(0.0))
    assert (drafter.name, drafter.sources) == ("model+lookup", ("model", "lookup"))
    assert drafter.bytes_per_block(16) == 160
    assert drafter.feature_layers == (1,)
    assert drafter.propose([]).tokens.shape == (0, GAMMA)


def test_a_prediction_stands_beside_both_and_is_asked_for_first() -> None:
    calibration = Calibration(GAMMA, sources=3)
    model = FixedModel(log_odds=1.0)
    inner = Beside(model, LookupDrafter(GAMMA, proposes_free=True), calibration.table)
    drafter = Beside(inner, PredictionDrafter(GAMMA), calibration.table)
    assert (drafter.name, drafter.sources) == ("model+lookup", ("model", "lookup", "prediction"))
    predicted = np.array([20, 21, 22, 23, 24, 25], np.int64)
    rows = [
        replace(row(1, [*NEW, 20]), prompt_length=4, predicted=predicted),
        row(2, REPEATS),
        row(3, NEW),
        replace(row(4, [*NEW, 20]), prompt_length=4, predicted=predicted, free_only=True),
        replace(row(5, [5, 6, 7, 8, 9, 5, 6]), free_only=True),
    ]
    draft = drafter.propose(rows)
    assert draft.source is not None
    assert draft.source.tolist() == [2, LOOKUP, MODEL, 2, LOOKUP]
    assert draft.tokens[0].tolist() == draft.tokens[3].tolist() == [21, 22, 23, 24]
    assert not {4, 5} & set(model.asked)


def test_without_predictions_the_drafter_beside_them_is_asked_alone() -> None:
    lookup = LookupDrafter(GAMMA)
    drafter = Beside(lookup, PredictionDrafter(GAMMA), Calibration(GAMMA, sources=2).table)
    assert (drafter.name, drafter.proposes_free) == ("lookup", False)
    draft = drafter.propose([row(1, REPEATS), row(2, NEW)])
    assert draft.source is None
    assert draft.lengths.tolist() == [GAMMA, 0]

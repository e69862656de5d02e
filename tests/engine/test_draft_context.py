"""A drafter's context lives in the target's blocks: it is right wherever those are, and its drafts show it.

dspark makes its context at every step, draft_model and eagle3 catch up when they are asked to draft.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import OpenEngine, RunningEngine, totals
from numpy.typing import NDArray

from dspark.engine import Request, SamplingParams

PROMPTS = [tuple(np.random.default_rng(i).integers(3, 320, 40).tolist()) for i in range(6)]
REQUESTS = [Request(prompt, SamplingParams(max_tokens=40, ignore_eos=True, seed=i)) for i, prompt in enumerate(PROMPTS)]

Drafts = dict[tuple[int, int], NDArray[np.int64]]


def record_drafts(engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> Drafts:
    """What is proposed from now on, by the sequence's noise key and its anchor's position."""
    drafter, drafts = engine.parts.runner.drafter, {}
    propose = drafter.propose

    def recorded(rows: Any) -> Any:
        draft = propose(rows)
        for row, tokens, length in zip(rows, draft.tokens, draft.lengths, strict=True):
            if length:
                drafts[row.noise_key, row.position] = tokens
        return draft

    monkeypatch.setattr(drafter, "propose", recorded)
    return drafts


def assert_same_where_both_drafted(drafts: Drafts, expected: Drafts) -> None:
    common = drafts.keys() & expected.keys()
    assert len(common) > 40
    for place in common:
        assert drafts[place].tolist() == expected[place].tolist(), place


@pytest.fixture(scope="module", params=["draft_checkpoint", "draft_model", "eagle3_checkpoint"])
def drafter(request: pytest.FixtureRequest) -> str:
    """Folder of each kind of drafter that has a context."""
    folder: Path = request.getfixturevalue(request.param)
    return str(folder)


@pytest.fixture(scope="module")
def cold(open_engine: OpenEngine, drafter: str) -> Drafts:
    """Every request alone, nothing cached."""
    engine = open_engine(drafter=drafter, lookup=False, speculation="fixed")
    with pytest.MonkeyPatch.context() as patch:
        drafts = record_drafts(engine, patch)
        engine.answer_one_at_a_time(REQUESTS)
    return drafts


def test_drafts_after_a_prefix_hit_are_those_of_a_cold_start(
    open_engine: OpenEngine, drafter: str, cold: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(drafter=drafter, lookup=False, speculation="fixed")
    engine.answer_together(REQUESTS)
    drafts = record_drafts(engine, monkeypatch)
    assert all(answer.facts.cached_tokens == 32 for answer in engine.answer_one_at_a_time(REQUESTS))
    assert_same_where_both_drafted(drafts, cold)


def test_drafts_after_plain_decoding_are_those_of_a_cold_start(
    open_engine: OpenEngine, drafter: str, cold: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that were filled while nothing was drafted hold the drafter's context too, or what it is made from."""
    engine = open_engine(drafter=drafter, lookup=False, speculation="off")
    engine.answer_together(REQUESTS)
    engine.engine.controller.mode = "fixed"
    drafts = record_drafts(engine, monkeypatch)
    assert all(answer.facts.cached_tokens == 32 for answer in engine.answer_one_at_a_time(REQUESTS))
    assert_same_where_both_drafted(drafts, cold)


def test_drafts_in_a_crowd_with_preemption_and_chunks_are_those_of_a_cold_start(
    open_engine: OpenEngine, drafter: str, cold: Drafts, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a block of the drafter's context is as large as the target's (eagle3: half as large again), so this is a pool of 16
    engine = open_engine(
        drafter=drafter, lookup=False, speculation="fixed", num_blocks=32, max_num_seqs=8, max_num_batched_tokens=24
    )
    drafts = record_drafts(engine, monkeypatch)
    engine.answer_together(REQUESTS)
    assert totals(engine.steps)["preemptions"] > 0
    assert_same_where_both_drafted(drafts, cold)

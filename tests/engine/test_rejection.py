"""Rejection mode end to end: a real engine, a random drafter of each kind that has probabilities, fixed draft lengths."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chi_square import p_value
from draft_checkpoints import TARGET_CONFIG, draft_config, random_tensors, write_draft_checkpoint
from fakes import OpenEngine, RunningEngine, totals
from numpy.typing import NDArray
from tiny_models import tiny_model

from dspark.engine import Request, SamplingParams

VOCAB_SIZE = 16
PROMPT = (3, 1, 4, 1, 5, 9)
SAMPLES = 3000


@pytest.fixture(scope="module")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary so small that every continuation can be counted."""
    folder = tmp_path_factory.mktemp("small") / "target"
    tiny_model("LlamaForCausalLM", vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["dspark", "draft_model"])
def small_draft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "draft_model":
        folder = tmp_path_factory.mktemp("small") / "model"
        tiny_model("LlamaForCausalLM", seed=1, vocab_size=VOCAB_SIZE).save_pretrained(folder)
        return folder
    target = {**TARGET_CONFIG, "vocab_size": VOCAB_SIZE, "hidden_size": 64, "num_hidden_layers": 2}
    config = draft_config(target, block_size=4, num_layers=1, target_layer_ids=(-1, 0))
    return write_draft_checkpoint(tmp_path_factory.mktemp("small") / "draft", config, random_tensors(config))


@pytest.fixture(scope="module")
def rejecting(open_engine: OpenEngine, small_target: Path, small_draft: Path) -> RunningEngine:
    return open_engine(
        model=str(small_target),
        drafter=str(small_draft),
        speculation="fixed",
        verification="rejection",
        max_queued_requests=SAMPLES,
    )


def exact_triples(params: SamplingParams) -> NDArray[np.float64]:
    """P(first three tokens) by transformers, [V, V, V]; temperature and top_k only."""
    model = tiny_model("LlamaForCausalLM", vocab_size=VOCAB_SIZE)

    def following(contexts: list[list[int]]) -> NDArray[np.float64]:
        with torch.no_grad():
            logits = model(torch.tensor(contexts)).logits[:, -1].double() / params.temperature
        if params.top_k:
            logits[logits < logits.topk(params.top_k).values[:, -1:]] = -torch.inf
        return logits.softmax(dim=-1).numpy()

    ids = range(VOCAB_SIZE)
    first = following([[*PROMPT]])[0]
    second = following([[*PROMPT, a] for a in ids])
    third = following([[*PROMPT, a, b] for a in ids for b in ids]).reshape(VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE)
    return first[:, None, None] * second[:, :, None] * third


@pytest.mark.parametrize(
    ("small_draft", "top_k"),
    [
        ("dspark", 0),
        ("draft_model", 5),
        pytest.param("dspark", 5, marks=pytest.mark.slow),
        pytest.param("draft_model", 0, marks=pytest.mark.slow),
    ],
    indirect=["small_draft"],
)
def test_tokens_follow_the_targets_distribution(rejecting: RunningEngine, top_k: int) -> None:
    params = SamplingParams(temperature=1.5, top_k=top_k, max_tokens=4, ignore_eos=True)
    steps = len(rejecting.steps)
    answers = rejecting.answer_together([Request(PROMPT, replace(params, seed=seed)) for seed in range(SAMPLES)])
    counts = np.zeros((VOCAB_SIZE,) * 3)
    for answer in answers:
        counts[tuple(answer.tokens[0][:3])] += 1
    exact = exact_triples(params)
    for others in ((1, 2), (0, 2), (0, 1), (2,), (0,)):  # each token by itself, then neighbours in pairs
        assert p_value(counts.sum(axis=others), exact.sum(axis=others)) > 1e-3
    sums = totals(rejecting.steps[steps:])
    assert min(sums["accepted"], sums["rejected_mismatch"]) > SAMPLES / 10


def test_greedy_answers_are_those_of_plain_decoding(
    rejecting: RunningEngine, open_engine: OpenEngine, small_target: Path
) -> None:
    plain = open_engine(model=str(small_target), speculation="off")
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True, repetition_penalty=1.2)
    requests = [Request(tuple(rng.integers(3, VOCAB_SIZE, 20).tolist()), params) for _ in range(20)]
    before = totals(rejecting.steps).get("accepted", 0)
    answers = rejecting.answer_together(requests)
    assert [a.tokens for a in answers] == [a.tokens for a in plain.answer_together(requests)]
    assert totals(rejecting.steps)["accepted"] > before


def test_a_seed_makes_an_answer_reproducible_alone(rejecting: RunningEngine) -> None:
    request = Request(PROMPT, SamplingParams(max_tokens=30, ignore_eos=True, seed=5))
    assert rejecting.answer(request).tokens == rejecting.answer(request).tokens

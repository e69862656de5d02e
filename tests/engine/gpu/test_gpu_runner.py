"""The device's runner gives the tokens that the CPU's gives, bit for bit; here both run on the CPU, with the same kernels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import Answer, OpenEngine, RandomAllocation, RunningEngine, totals
from host_device import GAMMA, Oracle, running_on_host_device
from identities import assert_identities
from random_grammars import AutomatonGrammar, random_automaton
from random_requests import random_requests

from dspark.engine import EngineConfig, Reason, Request, SamplingParams
from dspark.engine.gpu.host_sampling import needs_host

VOCAB_SIZE, EOS_TOKEN_ID = 320, 2
BLOCK_BYTES = 8192
CRAMPED: dict[str, Any] = {"max_num_seqs": 10, "max_num_batched_tokens": 24, "kv_cache_bytes": 14 * BLOCK_BYTES}
"""Prompts are computed in chunks; the pool holds a few sequences' blocks, so preemption is frequent."""
ROOMY: dict[str, Any] = {"max_num_seqs": 24, "max_num_batched_tokens": 256}
ONLY_ON_HOST = {
    name: getattr(SamplingParams(), name)
    for name in (
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "min_tokens",
        "logprobs",
    )
}
"""What a request must leave as it is to be sampled on the device."""


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Half for the device's sampler, some with grammars, and some that grow long together."""
    drawn = random_requests(14, VOCAB_SIZE, EOS_TOKEN_ID, seed=1)
    device = [replace(one, sampling=replace(one.sampling, **ONLY_ON_HOST)) for one in drawn[:9]]
    return [*device, *drawn[9:], *(with_grammar(seed) for seed in range(4)), *(growing(seed) for seed in range(4))]


def with_grammar(seed: int) -> Request:
    automaton = random_automaton(seed, VOCAB_SIZE, EOS_TOKEN_ID)
    sampling = SamplingParams(temperature=seed % 2, max_tokens=20, min_tokens=10, seed=seed)
    return Request((5, 6, 7), sampling, make_grammar=lambda: AutomatonGrammar(automaton))


def growing(seed: int) -> Request:
    prompt = np.random.default_rng(seed).integers(3, VOCAB_SIZE, 20).tolist()
    return Request(tuple(prompt), SamplingParams(temperature=seed % 2, max_tokens=70, ignore_eos=True, seed=seed))


@pytest.fixture(scope="module")
def answers(requests: list[Request], open_engine: OpenEngine) -> list[Answer]:
    """By the CPU's runner, plain decoding."""
    return open_engine(speculation="off").answer_together(requests)


@pytest.fixture
def open_device(tiny_target: Path, engine_cache: Path, requests: list[Request], answers: list[Answer]) -> Iterator[Any]:
    with ExitStack() as engines:

        def start(oracle: bool = False, controller: Any = None, **options: Any) -> RunningEngine:
            fields: dict[str, Any] = {
                "model": str(tiny_target),
                "dtype": "float32",
                "threads": 1,
                "max_queued_requests": 1000,
                "cache_dir": engine_cache,
                "lag": 1,
            } | options
            given = {} if controller is None else {"controller": controller}
            if oracle:
                given["markov_block"] = Oracle(requests, answers, VOCAB_SIZE)
            return engines.enter_context(running_on_host_device(EngineConfig(**fields), **given))

        yield start


def assert_same(given: Sequence[Answer], plain: Sequence[Answer], requests: Sequence[Request]) -> None:
    for answer, expected, request in zip(given, plain, requests, strict=True):
        assert answer.text == expected.text, request


def test_the_requests_use_both_samplers_and_every_way_to_end(requests: list[Request], answers: list[Answer]) -> None:
    device = [request for request in requests if not needs_host(request)]
    assert len(requests) > len(device) > 10
    assert {request.sampling.greedy for request in device} == {True, False}
    assert any(request.n > 1 for request in device)
    assert any(request.make_stop_check for request in requests)
    assert any(request.sampling.stop_token_ids for request in device)
    assert any(request.sampling.top_k for request in device)
    assert {reason for answer in answers for reason in answer.finish_reasons} == {"stop", "length"}
    assert any(answer.logprobs[0] for answer in answers)


def test_same_tokens_without_a_drafter(open_device: Any, requests: list[Request], answers: list[Answer]) -> None:
    engine = open_device(drafter="none", speculation="off", **CRAMPED)
    given = engine.answer_together(requests)
    assert_same(given, answers, requests)
    sums = totals(engine.steps)
    assert sums["preemptions"] > 0
    on_host = [answer for answer, request in zip(given, requests, strict=True) if needs_host(request)]
    assert sum(a.facts.generated_tokens for a in on_host) <= sums["host_sampled_rows"] < sums["generated"]
    assert max(answer.facts.prompt_tokens for answer in answers) > 2 * CRAMPED["max_num_batched_tokens"]


@pytest.mark.parametrize("policy", ["adaptive", "any lengths"])
def test_same_tokens_with_accepted_drafts(
    open_device: Any, draft_checkpoint: Path, requests: list[Request], answers: list[Answer], policy: str
) -> None:
    sizes, controller = (ROOMY, None) if policy == "adaptive" else (CRAMPED, RandomAllocation)
    engine = open_device(oracle=True, drafter=str(draft_checkpoint), controller=controller, **sizes)
    given = engine.answer_together(requests)
    assert_same(given, answers, requests)
    assert {delta.accepted_drafts for answer in given for delta in answer.deltas} == set(range(GAMMA + 1))
    for step in engine.steps:
        assert_identities(step)
    sums = totals(engine.steps)
    if policy == "any lengths":
        assert any(step.truncated.get(Reason.GRAMMAR) for step in engine.steps)
    assert sums["rejected_mismatch"] > 0
    assert (sums["preemptions"] > 0) == (sizes is CRAMPED)
    again = engine.answer_together(requests)
    assert_same(again, answers, requests)
    assert any(answer.facts.cached_tokens for answer in again) or sizes is CRAMPED  # the small pool keeps nothing


def test_same_tokens_with_a_draft_checkpoint(
    open_device: Any, draft_checkpoint: Path, requests: list[Request], answers: list[Answer]
) -> None:
    engine = open_device(drafter=str(draft_checkpoint), speculation="fixed", **ROOMY)
    assert_same(engine.answer_together(requests), answers, requests)
    sums = totals(engine.steps)
    assert sums["accepted"] > 0
    assert sums["rejected_mismatch"] > 0

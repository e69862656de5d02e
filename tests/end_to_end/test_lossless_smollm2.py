"""Speculation changes no token of a real model in the dtype of this processor: 20 requests, alone and batched."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import Answer, running, totals
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dspark.engine import EngineConfig, Request, SamplingParams, locate_model
from dspark.engine.config import SpeculationMode

QUESTIONS = [
    "What is the capital of France?",
    "Repeat after me: the quick brown fox jumps over the lazy dog, the quick brown fox jumps over the lazy dog.",
    "Write the numbers from one to ten, then again from one to ten.",
    "Correct this sentence: he go to the store and he go to the bank and he go to the park.",
    "Give me three names for a cat.",
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(locate_model(None).folder)


@pytest.fixture(scope="module")
def requests(tokenizer: PreTrainedTokenizerBase) -> list[Request]:
    """Five questions in four ways of sampling."""
    ways = [
        SamplingParams(temperature=0.0, max_tokens=24),
        SamplingParams(temperature=0.7, top_p=0.9, max_tokens=24),
        SamplingParams(temperature=1.0, repetition_penalty=1.1, frequency_penalty=0.4, max_tokens=20),
        SamplingParams(temperature=0.4, top_k=40, min_p=0.02, logit_bias={260: 2.0}, max_tokens=20, min_tokens=8),
    ]
    drawn = []
    for number, question in enumerate(QUESTIONS):
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        drawn += [Request(ids, replace(params, seed=10 * number + way)) for way, params in enumerate(ways)]
    return drawn


def config(speculation: SpeculationMode, lag: int = 0) -> EngineConfig:
    return EngineConfig(
        lag=lag,
        dtype="auto",
        threads=1,
        max_model_len=512,
        max_num_batched_tokens=256,
        max_num_seqs=32,
        speculation=speculation,
    )


@pytest.fixture(scope="module")
def plain(requests: list[Request]) -> list[Answer]:
    """Plain decoding, one request at a time."""
    with running(config("off")) as engine:
        return engine.answer_one_at_a_time(requests)


def texts(answers: list[Answer]) -> list[object]:
    return [answer.text for answer in answers]


def test_plain_decoding_in_a_batch_gives_the_tokens_of_each_alone(requests: list[Request], plain: list[Answer]) -> None:
    with running(config("off")) as engine:
        assert texts(engine.answer_together(requests)) == texts(plain)


@pytest.mark.parametrize("speculation", ["fixed", "adaptive"])
@pytest.mark.parametrize("lag", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_speculation_gives_the_tokens_of_plain_decoding(
    requests: list[Request], plain: list[Answer], speculation: SpeculationMode, lag: int
) -> None:
    with running(config(speculation, lag)) as engine:
        assert engine.parts.info.drafter_name == "dspark+lookup"
        assert texts(engine.answer_together(requests)) == texts(plain)
        assert texts(engine.answer_one_at_a_time(requests)) == texts(plain)
        sums = totals(engine.steps)
    assert sums["prompt_cached"] > 0
    assert sums["accepted"] > 100
    assert sums["rejected_mismatch"] > 20


def test_the_model_answers(tokenizer: PreTrainedTokenizerBase, plain: list[Answer]) -> None:
    assert "Paris" in tokenizer.decode(plain[0].tokens[0])

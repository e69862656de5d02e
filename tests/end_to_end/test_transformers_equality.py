"""Every token of a greedy answer in float32 is the one that transformers would choose there, or its choice is a toss-up."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import RunningEngine, running
from tiny_models import ARCHITECTURES, write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dspark.engine import EngineConfig, Request, SamplingParams, locate_model

TOSS_UP = 1e-4
"""A distance from transformers' best logit below which rounding decides."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def shortfalls(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> list[float]:
    """How far each token's logit is below the best one of transformers, after the prompt and the tokens before it.

    All 0: these are the tokens that its `generate` gives, at the price of a single pass.
    """
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :].float()
    own = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
    return (logits.max(dim=1).values - own).tolist()


def assert_equal_up_to_toss_ups(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> bool:
    """True: equal to the last token."""
    below = shortfalls(model, prompt, tokens)
    assert max(below) < TOSS_UP, f"{len(prompt)} prompt tokens: {tokens} are below the best by {below}"
    return max(below) == 0


def answers(engine: RunningEngine, prompts: list[list[int]], count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    return [answer.tokens[0] for answer in engine.answer_together([Request(tuple(p), params) for p in prompts])]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_random_models_answer_as_in_transformers(architecture: str, tmp_path: Path, cache: Path) -> None:
    """Mistral's sliding window of 24 tokens is shorter than most prompts."""
    folder = write_tiny_model(tmp_path, architecture, seed=1)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, 320, length).tolist() for length in (1, 2, 5, 16, 17, 23, 24, 25, 40, 64, 100, 200)]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = EngineConfig(str(folder), "lookup", dtype="float32", threads=1, cache_dir=cache, speculation="fixed")
    with running(config) as engine:
        equal = [
            assert_equal_up_to_toss_ups(model, prompt, tokens)
            for prompt, tokens in zip(prompts, answers(engine, prompts, 40), strict=True)
        ]
    assert sum(equal) >= len(equal) - 2


TEXT = (
    "The lighthouse keeper wrote in his log every evening: the wind, the ships, the state of the lamp. In the winter of "
    "that year the supply boat did not come for seven weeks. He counted the biscuits, then the candles, then the days. "
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)\n"
    "1. Boil the water. 2. Add the rice. 3. Stir once, cover, and wait eighteen minutes; do not lift the lid. "
    "Question: which planet is the largest? Answer: Jupiter, whose mass is more than twice that of all the others. "
)
LENGTHS = [1, 2, 3, 5, 8, 13, 16, 17, 31, 33, 48, 64, 90, 128, 200, 300, 450, 700, 1000, 1500]


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return locate_model(None).folder


@pytest.fixture(scope="module")
def smollm2_prompts(smollm2: Path) -> list[list[int]]:
    """20 prompts of 1 to 1,500 tokens: English, code and lists, starting anywhere in the text."""
    ids = AutoTokenizer.from_pretrained(smollm2)(TEXT * 12)["input_ids"]
    return [ids[start * 7 : start * 7 + length] for start, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def smollm2_engine() -> Iterator[RunningEngine]:
    config = EngineConfig(dtype="float32", threads=1, speculation="fixed", max_num_seqs=20, max_model_len=1600)
    with running(config) as engine:
        yield engine


@pytest.mark.slow
def test_smollm2_answers_as_in_transformers(
    smollm2: Path, smollm2_prompts: list[list[int]], smollm2_engine: RunningEngine
) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    assert [len(prompt) for prompt in smollm2_prompts] == LENGTHS
    tokens = answers(smollm2_engine, smollm2_prompts, 16)
    equal = [
        assert_equal_up_to_toss_ups(model, prompt, mine) for prompt, mine in zip(smollm2_prompts, tokens, strict=True)
    ]
    assert sum(equal) >= 18

"""Replaying a drafter on recorded answers gives the very rounds of the engine that verifies whole blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from draft_checkpoints import TARGET_CONFIG, draft_config, random_tensors, write_draft_checkpoint
from fakes import Answer as Served
from fakes import running
from tiny_models import EOS_TOKEN_ID, tiny_model

from dspark.engine import EngineConfig, FinishReason, Request, SamplingParams
from dspark.engine.calibration import Calibration
from dspark.engine.drafters.open_drafter import open_drafter
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.noise import NoiseCache
from dspark.training.answers import Answer
from dspark.training.replay import Rounds, replay

VOCAB_SIZE = 16
"""So few ids that a random drafter is often right."""
MAX_TOKENS = 32


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    tiny_model("LlamaForCausalLM", vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = read_spec(target)
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": spec.hidden_size, "num_hidden_layers": spec.num_layers}
    config = draft_config(TARGET_CONFIG | sizes, block_size=4, num_layers=1, target_layer_ids=(-1, 0))
    # of the seeds 0…7 the one that is right most often at temperature 0
    return write_draft_checkpoint(tmp_path_factory.mktemp("draft"), config, random_tensors(config, seed=7))


def requests() -> list[Request]:
    """Prompts of many lengths, greedy and sampled, with the seeds that a list of prompts would have."""
    random = np.random.default_rng(0)
    prompts = [tuple(random.integers(3, VOCAB_SIZE, length).tolist()) for length in random.integers(1, 50, 15)]
    return [
        Request(prompt, SamplingParams(temperature=(0.0, 0.7, 1.0)[seed % 3], seed=seed, max_tokens=MAX_TOKENS))
        for seed, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def draft_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft_model")
    tiny_model("LlamaForCausalLM", seed=1, vocab_size=VOCAB_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def drafters(checkpoint: Path, draft_model: Path) -> dict[str, str]:
    return {"dspark": str(checkpoint), "lookup": "lookup", "draft_model": str(draft_model)}


@pytest.fixture(scope="module")
def served(target: Path, drafters: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Served]]:
    """The engine's answers with each drafter."""
    cache = tmp_path_factory.mktemp("cache")
    return {kind: serve(target, drafter, cache) for kind, drafter in drafters.items()}


def serve(target: Path, drafter: str, cache_dir: Path) -> list[Served]:
    config = EngineConfig(
        model=str(target),
        drafter=drafter,
        lookup=False,
        dtype="float32",
        threads=1,
        speculation="fixed",
        kv_cache_bytes=1 << 24,
        cache_dir=cache_dir,
    )
    with running(config) as engine:
        # one at a time: of many prompts at once a draft model reads only a part before the first round
        return engine.answer_one_at_a_time(requests())


def recorded(served: Sequence[Served]) -> list[Answer]:
    return [
        Answer(
            kind="even" if seed % 2 == 0 else "odd",
            tokens=np.array([*request.prompt_token_ids, *answer.tokens[0]], np.int64),
            prompt_len=len(request.prompt_token_ids),
            temperature=request.sampling.temperature,
            seed=seed,
        )
        for seed, (request, answer) in enumerate(zip(requests(), served, strict=True))
    ]


@torch.no_grad()
def replayed(target: Path, drafter_name: str, answers: Sequence[Answer], max_tokens: int = MAX_TOKENS) -> Rounds:
    """With fewer places than answers, so that places are taken over."""
    spec = read_spec(target)
    decoder = Decoder(spec, load_weights(target, spec, torch.float32), 128, LinearFactory())
    noise = NoiseCache(spec.vocab_size)
    config = EngineConfig(model=str(target), drafter=drafter_name, lookup=False, max_num_seqs=6)
    drafter, calibration = open_drafter(
        config, decoder, "tiny", 128, lambda keys, at, rounds: torch.from_numpy(noise.rows(keys, at))
    )
    return replay(decoder, drafter, answers, max_tokens=max_tokens, calibration=calibration, noise=noise, rows=6)


@pytest.mark.parametrize("kind", ["dspark", "lookup", "draft_model"])
def test_every_round_accepts_what_the_serving_engine_accepted(
    kind: str, served: dict[str, list[Served]], target: Path, drafters: dict[str, str]
) -> None:
    rounds = replayed(target, drafters[kind], recorded(served[kind]))

    for index, answer in enumerate(served[kind]):
        own = rounds.where(rounds.answer == index)
        after_the_prompt = answer.deltas[1:]
        assert own.accepted.tolist() == [delta.accepted_drafts for delta in after_the_prompt]
        assert own.emitted.tolist() == [len(delta.token_ids) for delta in after_the_prompt]
        assert own.proposed.sum() == answer.facts.drafted_tokens
        assert own.verified.sum() == answer.facts.verified_tokens
    # what makes the above mean something
    for sampled in (False, True):
        assert len(set(rounds.accepted[(rounds.temperature > 0) == sampled].tolist())) >= 3
    assert {answer.finish_reasons[0] for answer in served[kind]} == {FinishReason.STOP, FinishReason.LENGTH}


def test_rounds_know_the_answer_that_they_belong_to(served: dict[str, list[Served]], target: Path) -> None:
    answers = recorded(served["lookup"])
    rounds = replayed(target, "lookup", answers)

    assert np.all(np.diff(rounds.answer) >= 0)
    for index, answer in enumerate(answers):
        own = rounds.where(rounds.answer == index)
        assert set(own.kind.tolist()) <= {answer.kind}
        assert set(own.temperature.tolist()) <= {np.float32(answer.temperature)}
        assert own.emitted.sum() == len(answer.tokens) - answer.prompt_len - 1  # the first came with the prompt


def test_survival_is_calibrated_by_the_rounds_before(
    served: dict[str, list[Served]], target: Path, checkpoint: Path
) -> None:
    rounds = replayed(target, str(checkpoint), recorded(served["dspark"]))

    untaught = Calibration(rounds.block_size).survival(rounds.confidence, rounds.temperature > 0)
    first = np.flatnonzero(np.diff(rounds.answer, prepend=-1))[:6]  # the six answers that began together
    np.testing.assert_array_equal(rounds.survival[first], untaught[first])
    assert not np.allclose(rounds.survival[-1], untaught[-1])


def test_an_answer_recorded_with_another_limit_is_refused(target: Path) -> None:
    tokens = np.array([5, 6, 7, 8, 9], np.int64)
    ended = np.array([5, 6, 7, 8, EOS_TOKEN_ID], np.int64)
    cut_off = Answer("odd", tokens, 1, 0.0, seed=0)

    assert len(replayed(target, "lookup", [cut_off], max_tokens=4))
    assert len(replayed(target, "lookup", [Answer("odd", ended, 1, 0.0, seed=0)], max_tokens=6))
    with pytest.raises(ValueError, match="is cut off after 4 tokens, so it was not recorded with a limit of 6"):
        replayed(target, "lookup", [cut_off], max_tokens=6)
    with pytest.raises(ValueError, match="limit of 3"):
        replayed(target, "lookup", [cut_off], max_tokens=3)

"""The whole GPU benchmark on a tiny model on the CPU, and that what it calls synthetic is what it says."""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from fakes import RecordedCost
from numpy.random import default_rng
from shapes_only import META, MODEL_KERNELS, STEP_KERNELS
from torch import Tensor

from dspark.benchmarks import gpu, synthetic
from dspark.benchmarks.byte_floor import step_bytes
from dspark.benchmarks.gpu import SameTokensError, check_same_tokens
from dspark.benchmarks.host_device import host_kernels
from dspark.benchmarks.qwen3 import MODELS, RandomWeights
from dspark.benchmarks.synthetic import Acceptance, open_engine
from dspark.engine import ConfigError
from dspark.engine.cost_model import CostModel
from dspark.engine.drafters import dspark
from dspark.engine.gpu.start_up import make_runner
from dspark.engine.models import decoder as decoders

TINY = MODELS["tiny"]
PROFILE = [0.9, 0.5, 0.8, 0.7, 0.6, 0.5, 0.9]
QUICK = ["--device", "cpu", "--models", "tiny", "--prompt-tokens", "20", "--max-tokens", "24"]
PROMPTS = [tuple(row) for row in default_rng(1).integers(0, 320, (4, 20)).tolist()]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def options(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    return parser.parse_args([*QUICK, "--concurrency", "4", *flags])


@pytest.mark.slow
def test_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--concurrency", "1,3", "--slice-s", "0.3", "--repeats", "1", "--json", str(tmp_path / "out.json")]
    assert gpu.main([*QUICK, *flags]) == 0
    printed = capsys.readouterr().out
    assert "NO GPU: a test of this script on a CPU" in printed
    assert "SYNTHETIC acceptance" in printed
    assert "T = 0: 3 of 3 answers of 24 tokens are the same" in printed
    assert "T = 1: 3 of 3 answers of 24 tokens are the same" in printed
    points = json.loads((tmp_path / "out.json").read_text())["models"][0]["points"]
    modes = ["off", "fixed", "adaptive", "transformers"]
    assert sorted((p["mode"], p["clients"]) for p in points) == sorted((m, c) for m in modes for c in (1, 3))
    of = {(p["mode"], p["clients"]): p for p in points}
    assert all(p["slice"]["speed"] > 0 for p in points)
    assert of["off", 3]["slice"]["verified"] == 0
    assert of["fixed", 3]["slice"]["accepted"] > 0
    parts = of["fixed", 3]["parts"]
    assert all(parts[name] > 0 for name in ("step", "target", "draft", "copies", "host"))
    assert of["transformers", 3]["parts"] is None


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cuda"])
    assert "sees no device; use `cpu`" in capsys.readouterr().err


def test_models_that_do_not_fit_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--device", "cpu", "--models", "Qwen3-8B"]) == 0
    assert "left out: Qwen3-8B does not fit on cpu, where only tiny runs" in capsys.readouterr().out


def test_a_model_without_room_for_k_and_v_is_left_out_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def open_full(*_: object) -> None:
        raise ConfigError("kv_cache_memory", "0 bytes hold 0 blocks")

    monkeypatch.setattr(gpu, "open_engine", open_full)
    assert gpu.main([*QUICK, "--json", str(tmp_path / "out.json")]) == 0
    assert "left out: kv_cache_memory: 0 bytes hold 0 blocks" in capsys.readouterr().out
    assert json.loads((tmp_path / "out.json").read_text())["models"][0]["left_out"]


def check_tiny(profile: list[float], *, forced: bool = False, row_invariant: bool = True) -> list[str]:
    """forced: the drafts decide what the text is, which must not be."""

    config = gpu._config(TINY, options())

    async def run() -> list[str]:
        with patch.object(CostModel, "profile", lambda *_: RecordedCost(config)):  # to measure takes seconds
            engine, acceptance = open_engine(TINY, config, profile, lambda *_: None)
        assert engine.info.weight_bytes == step_bytes(TINY, 1, 0, drafts=False, element=4).weights
        engine.info = replace(engine.info, row_invariant=row_invariant)
        if forced:
            acceptance.record = lambda *_: acceptance.force()  # type: ignore[method-assign]
        await engine.start()
        try:
            return await check_same_tokens(engine, acceptance, PROMPTS, 24)
        finally:
            await engine.close()

    return asyncio.run(run())


def test_drafts_that_change_a_text_end_the_run() -> None:
    with pytest.raises(SameTokensError, match=r"T = 0: 0 of 4 answers .* though the row-invariance self-test passed"):
        check_tiny(PROFILE, forced=True)


def test_where_rows_depend_on_their_batch_the_run_says_how_many_texts_changed() -> None:
    lines = check_tiny(PROFILE, forced=True, row_invariant=False)
    assert len(lines) == 2
    assert all("0 of 4 answers" in line and "self-test failed on this device" in line for line in lines)


def test_a_check_in_which_nothing_is_rejected_proves_nothing() -> None:
    with pytest.raises(SameTokensError, match="acceptance and rejection were not both tried"):
        check_tiny([1.0] * 7)


def test_forced_acceptance_follows_the_profile() -> None:
    """Each slot's chance given those before it, over 20,000 rounds; and rounds of fewer drafts, and none."""
    torch.manual_seed(0)
    acceptance = Acceptance(host_kernels(), PROFILE, 5, 10, torch.device("cpu"))
    acceptance.force()
    rounds = 20_000
    fed, tokens = torch.randint(5, (8 * rounds,)), torch.randint(5, (8 * rounds,))
    starts = torch.arange(rounds + 1, dtype=torch.int32) * 8
    accepted, _ = acceptance.kernels.accept_drafts(fed, tokens, starts)
    for slot, chance in enumerate(PROFILE):
        reached = accepted[accepted >= slot]
        deviation = (chance * (1 - chance) / len(reached)) ** 0.5
        assert (reached > slot).float().mean().item() == pytest.approx(chance, abs=4 * deviation)
    own = torch.tensor([1, 2, 3, 4])
    accepted, following = acceptance.kernels.accept_drafts(torch.zeros(4).long(), own, torch.tensor([0, 1, 1, 2]).int())
    assert accepted.tolist() == [0, 0, 0]
    assert following.tolist() == [1, 0, 2], "without drafts the target's tokens stay, padding's too"
    assert own.tolist() == [1, 2, 3, 4]


def _shape_of(weights: RandomWeights, name: str) -> Tensor:
    return torch.empty(weights._shapes[name], dtype=torch.bfloat16, device=META)


@pytest.mark.parametrize(
    "name",
    [pytest.param("Qwen3-4B", marks=pytest.mark.slow), "Qwen3-8B", pytest.param("Qwen3-14B", marks=pytest.mark.slow)],
)
def test_at_published_sizes_every_captured_step_runs_without_values(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device whatever would wait for a value raises, the coins included."""
    model, config = MODELS[name], gpu._config(MODELS[name], options("--concurrency", "16", "--max-tokens", "256"))
    monkeypatch.setattr(decoders, "choose_kernels", lambda _: MODEL_KERNELS)
    monkeypatch.setattr(dspark, "choose_kernels", lambda _: MODEL_KERNELS)
    monkeypatch.setattr(RandomWeights, "__getitem__", _shape_of)
    torch.set_grad_enabled(False)
    decoder, drafter = synthetic._open_models(model, config, 276, torch.bfloat16, META)
    acceptance = Acceptance(STEP_KERNELS, PROFILE, model.target.vocab_size, 276, META)
    runner = make_runner(config, decoder, drafter, acceptance.kernels, 7, 276)
    runner.allocate(256)
    sizes: list[int] = []
    runner.capture(lambda done, total: sizes.append(total))
    runner.largest_step()
    acceptance.force()
    assert sizes[-1] > 30


def test_nothing_is_forced_unless_it_is_asked_for() -> None:
    acceptance = Acceptance(host_kernels(), PROFILE, 5, 10, torch.device("cpu"))
    fed, tokens = torch.tensor([9, 1, 2, 3]), torch.tensor([1, 2, 4, 4])
    accepted, _ = acceptance.kernels.accept_drafts(fed, tokens, torch.tensor([0, 4]).int())
    assert accepted.tolist() == [2]

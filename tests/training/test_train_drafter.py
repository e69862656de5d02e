"""From prompts to a drafter that the server runs, on a tiny target."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig, Request, SamplingParams
from dspark.training import train_drafter


def arguments(target: Path, prompts: Path, out: Path, steps: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_drafter.add_arguments(parser)
    options = ["--target", str(target), "--prompts", str(prompts), "--out", str(out), "--steps", str(steps)]
    options += [
        "--answer-tokens",
        "24",
        "--slots",
        "8",
        "--layers",
        "1",
        "--captured-layers",
        "0,1",
        "--markov-rank",
        "8",
    ]
    return parser.parse_args([*options, "--shared-head", "--mask-token-id", "1"])


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    return write_tiny_model(folder, "LlamaForCausalLM", num_hidden_layers=3, head_dim=32)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "count.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count from {i} on.", "kind": "count"}) + "\n" for i in range(24)))
    return path


@pytest.fixture(scope="module")
def trained(target: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drafter")
    assert train_drafter.main(arguments(target, prompts, out, steps=60)) == 0
    return out


def test_the_loss_goes_down(trained: Path) -> None:
    losses = [json.loads(line)["loss"] for line in (trained / "work" / "loss.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.8 * losses[0]


def test_a_run_in_two_parts_gives_the_same_checkpoint(
    trained: Path, target: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(Exception):
        pass

    report = train_drafter._Report.__call__

    def killed_at_25(self: train_drafter._Report, step: int, facts: dict[str, float]) -> None:
        report(self, step, facts)
        if step == 25:
            raise KilledError

    args = arguments(target, prompts, tmp_path, steps=60)
    args.save_every = 0.0
    with monkeypatch.context() as patch:
        patch.setattr(train_drafter._Report, "__call__", killed_at_25)
        with pytest.raises(KilledError):
            train_drafter.main(args)
    assert train_drafter.main(args) == 0
    whole, parts = load_file(trained / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_server_drafts_with_it_and_answers_the_same(trained: Path, target: Path) -> None:
    async def answer(speculation: str) -> tuple[list[int], int]:
        config = EngineConfig(model=str(target), drafter=str(trained), speculation=speculation, kv_cache_bytes=1 << 22)
        engine = await asyncio.to_thread(Engine.load, config)
        await engine.start()
        tokens: list[int] = []
        params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
        async with engine.submit(Request(tuple(range(10, 30)), params)) as stream:
            async for delta in stream:
                tokens += delta.token_ids
        await engine.close()
        return tokens, stream.facts.verified_tokens

    plain, _ = asyncio.run(answer("off"))
    drafted, verified = asyncio.run(answer("fixed"))
    assert verified > 0
    assert drafted == plain

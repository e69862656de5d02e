"""The prediction run on a tiny random model, and that each of its claims can fail."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from http_server import run_service
from tiny_models import write_tiny_model

from dspark.benchmarks.endpoint import Endpoint
from dspark.benchmarks.predictions import KINDS, LEAST_TOKENS, Kind, Run, judge, measure, ratios, table
from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText


@pytest.mark.slow
def test_the_text_is_the_same_whatever_is_predicted(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    config = EngineConfig(
        model=str(folder), cache_dir=tmp_path, dtype="float32", threads=1, max_num_seqs=2, kv_cache_bytes=4 << 20
    )

    async def run(url: str) -> list[Run]:
        async with Endpoint(url) as endpoint:
            return await measure(endpoint, count=2, repeats=2)

    with run_service(Service(Engine.load(config), ModelText.load(folder), ServerSettings("tiny"))) as url:
        runs = asyncio.run(run(url))
    assert sorted((r.prompt, r.repeat, r.kind) for r in runs) == sorted(
        (p, r, k) for p in (0, 1) for r in (0, 1) for k in KINDS
    )
    assert all(run.same and run.tokens >= LEAST_TOKENS for run in runs)
    assert all(run.steps == run.tokens - 1 for run in runs if run.kind == "plain")
    assert any(run.accepted for run in runs if run.kind == "equal")
    assert table(runs).count("\n") == 1 + len(KINDS)


STEPS: dict[Kind, int] = {"equal": 20, "useless": 82, "none": 80, "plain": 159}
SECONDS: dict[Kind, float] = {"equal": 1.0, "useless": 4.1, "none": 4.0, "plain": 5.0}
RUNS = [Run(p, kind, r, STEPS[kind], 160, SECONDS[kind], 0, True) for kind in KINDS for p in (0, 1) for r in (0, 1)]


@pytest.mark.parametrize(
    ("kind", "change", "failed"),
    [
        ("none", {}, []),
        ("equal", {"steps": 21}, ["without one"]),
        ("equal", {"steps": 41}, ["of plain decoding", "without one"]),
        ("useless", {"seconds": 4.3}, ["a useless one"]),
        ("useless", {"same": False}, ["the text is the same"]),
        ("plain", {"tokens": 99}, ["answers have at least"]),
    ],
)
def test_each_claim_can_fail(kind: Kind, change: dict[str, object], failed: list[str]) -> None:
    runs = [replace(run, **change) if run.kind == kind else run for run in RUNS]
    broken = [claim.text for claim in judge(runs) if not claim.holds]
    assert len(broken) == len(failed)
    assert all(words in text for words, text in zip(failed, broken, strict=True))


def test_ratios_are_taken_within_a_prompt_and_a_repeat() -> None:
    slow_prompt = [replace(run, seconds=9 * run.seconds) if run.prompt else run for run in RUNS]
    assert ratios(slow_prompt, "seconds", "equal", "none") == [0.25] * 4

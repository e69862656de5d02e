"""What start-up decides for a device, and how it refuses. Reading a device's memory and capturing graphs needs one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from host_device import GAMMA, open_host_runner
from torch import Tensor

from dspark.benchmarks.host_device import HostTarget
from dspark.engine import ConfigError, EngineConfig
from dspark.engine.gpu.start_up import DevicePassTimer, choose_device, open_device_drafter, rows_are_invariant
from dspark.engine.models.decoder import Decoder, DeviceBatch, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.startup import choose_dtype, start_up


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def decoder(tiny_target: Path) -> Decoder:
    torch.set_grad_enabled(False)
    spec = read_spec(tiny_target)
    decoder = Decoder(spec, load_weights(tiny_target, spec, torch.float32), spec.max_position, LinearFactory())
    decoder.allocate_kv(4, 16)
    return decoder


def test_auto_means_cuda_where_there_is_one(with_cuda: None) -> None:
    assert choose_device(EngineConfig()).type == "cuda"
    assert choose_device(EngineConfig(device="cpu")).type == "cpu"
    assert choose_dtype(EngineConfig(), "cuda") == torch.bfloat16
    assert choose_dtype(EngineConfig(dtype="float32"), "cuda") == torch.float32


def test_auto_means_the_processor_where_there_is_none(without_cuda: None) -> None:
    assert choose_device(EngineConfig()).type == "cpu"


def test_cuda_that_is_not_there_is_refused_before_anything_is_loaded(without_cuda: None) -> None:
    with pytest.raises(
        ConfigError, match=f"torch {re.escape(torch.__version__)} was built .* sees no device; use `cpu`"
    ) as error:
        start_up(EngineConfig(device="cuda", model="/nowhere"))
    assert error.value.field == "device"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"device": "tpu"}, "device"),
        ({"verification": "rejection", "speculation": "fixed"}, "verification"),
        ({"lookup": True}, "lookup"),
    ],
    ids=lambda value: str(value),
)
def test_what_a_device_cannot_do_is_refused(with_cuda: None, options: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as error:
        choose_device(EngineConfig(**options))
    assert error.value.field == field


@pytest.mark.parametrize("kind", ["lookup", "eagle3_checkpoint", "draft_model"])
def test_a_drafter_that_runs_on_the_cpu_only_is_refused_by_name(
    decoder: Decoder, request: pytest.FixtureRequest, kind: str
) -> None:
    drafter = kind if kind == "lookup" else str(request.getfixturevalue(kind))
    with pytest.raises(
        ConfigError, match=r"on cuda give the folder of a Qwen3DSparkModel.*`--speculation off`"
    ) as error:
        open_device_drafter(EngineConfig(drafter=drafter), decoder, "tiny", 100)
    assert error.value.field == "drafter"
    assert drafter in str(error.value)


def test_a_model_without_a_shipped_drafter_is_decoded_plainly_and_that_is_said(
    decoder: Decoder, caplog: pytest.LogCaptureFixture
) -> None:
    drafter, _ = open_device_drafter(EngineConfig(), decoder, "tiny", 100)
    assert drafter is None
    assert "no drafter is shipped for tiny" in caplog.text


def test_without_speculation_any_drafter_will_do(decoder: Decoder) -> None:
    drafter, calibration = open_device_drafter(EngineConfig(speculation="off"), decoder, "tiny", 100)
    assert drafter is None
    assert calibration.block_size > 0


class UnevenTarget(HostTarget):
    """Rounds a row differently in company."""

    def forward(self, batch: DeviceBatch, feature_layers: Any = ()) -> tuple[Tensor, Tensor | None]:
        hidden, features = super().forward(batch, feature_layers)
        return hidden * (1.0 + 1e-7 * (len(hidden) > 1)), features


def test_the_self_test_tells_rows_that_depend_on_their_company(decoder: Decoder) -> None:
    assert rows_are_invariant(HostTarget(decoder))  # type: ignore[arg-type]
    assert not rows_are_invariant(UnevenTarget(decoder))  # type: ignore[arg-type]


def test_every_size_is_run_before_the_first_step_and_costs_are_measured(
    tiny_target: Path, draft_checkpoint: Path
) -> None:
    config = EngineConfig(
        model=str(tiny_target), drafter=str(draft_checkpoint), max_num_seqs=3, max_num_batched_tokens=40
    )
    runner, _ = open_host_runner(config, num_blocks=4)
    reports: list[tuple[int, int]] = []
    runner.capture(lambda done, total: reports.append((done, total)))
    sizes = [(rows, sequences) for sequences in (1, 2, 3) for rows in (1, 2, 4, 8, 15)]
    target = [(rows, n) for rows, n in sizes if n <= rows <= {1: 8, 2: 15, 3: 15}[n]]
    assert reports[-1] == (len(target) + 3, len(target) + 3)
    timer = DevicePassTimer(runner)
    assert all(timer.verify_s(rows, 100) > 0 for rows in (1, 7, 40))
    assert timer.draft_s(3) > 0
    longest = runner.decoder.spec.max_position
    alone, _ = open_host_runner(replace(config, max_num_seqs=1, max_num_batched_tokens=longest + 50), num_blocks=4)
    assert DevicePassTimer(alone).verify_s(longest + 50, 100) > 0  # of as many rows as one sequence can have
    plain, _ = open_host_runner(replace(config, drafter="none"), num_blocks=4)
    assert DevicePassTimer(plain).draft_s(1) == 0.0
    assert runner.drafter is not None
    assert runner.drafter.block_size == GAMMA

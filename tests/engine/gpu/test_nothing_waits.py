"""A step between its two copies never asks the device for a value and never brings in a tensor from elsewhere.

On the meta device there are shapes and no values: whatever would wait for the device, or mix it with the CPU, raises. So
what is run here can be captured, in bfloat16, as far as it is PyTorch; Triton's kernels are stood in for by their shapes.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from draft_checkpoints import draft_config, random_tensors, write_draft_checkpoint
from shapes_only import META, MODEL_KERNELS, STEP_KERNELS

from dspark.engine import EngineConfig, Request, SamplingParams
from dspark.engine.calibration import CalibrationTable
from dspark.engine.drafters import dspark
from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD, load_draft_weights, read_draft_spec
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.facts import RequestFacts
from dspark.engine.gpu.runner import GpuRunner
from dspark.engine.gpu.start_up import make_runner, open_device_drafter
from dspark.engine.models import decoder as decoders
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import ModelSpec, read_spec
from dspark.engine.models.weights import weight_shapes
from dspark.engine.sequence import Batch, Decode, Prefill, RequestRecord, Sequence

SLOTS, ROWS = 6, 64


@pytest.fixture
def target(tiny_target: Path, monkeypatch: pytest.MonkeyPatch) -> Decoder:
    for module in (decoders, dspark):
        monkeypatch.setattr(module, "choose_kernels", lambda device: MODEL_KERNELS)
    torch.set_grad_enabled(False)
    spec = read_spec(tiny_target)
    shapes = weight_shapes(spec).items()
    weights = {name: torch.empty(shape, dtype=torch.bfloat16, device=META) for name, shape in shapes}
    return Decoder(spec, weights, spec.max_position, LinearFactory())


def open_drafter(folder: Path, target: Decoder, **kind: Any) -> DSparkDrafter:
    fits: ModelSpec = target.spec
    config = draft_config(block_size=4, target_layer_ids=(-1, 0), **kind) | {
        "vocab_size": fits.vocab_size,
        "hidden_size": fits.hidden_size,
    }
    write_draft_checkpoint(folder, config, random_tensors(config))
    spec = read_draft_spec(folder)
    weights = {name: one.to(META) for name, one in load_draft_weights(folder, spec, torch.bfloat16).items()}
    return DSparkDrafter(
        spec,
        weights,
        target.embedding,
        target.logits,
        LinearFactory(),
        max_num_seqs=SLOTS,
        max_model_len=target.spec.max_position,
        verification="coupled",
        noise=lambda *_: torch.empty(0),
    )


def open_runner(target: Decoder, drafter: DSparkDrafter | None) -> GpuRunner:
    config = EngineConfig(max_num_seqs=SLOTS, max_num_batched_tokens=ROWS)
    runner = make_runner(config, target, drafter, STEP_KERNELS, 4, target.spec.max_position)
    runner.allocate(3)
    return runner


KINDS: list[dict[str, Any]] = [
    {"markov": "vanilla"},
    {"markov": "gated"},
    {"markov": "rnn", "confidence_with_markov": True},
    {"markov": None, "confidence": False},
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(kind["markov"]))
def test_every_captured_size_runs_without_values(tmp_path: Path, target: Decoder, kind: dict[str, Any]) -> None:
    runner = open_runner(target, open_drafter(tmp_path, target, **kind))
    reports: list[tuple[int, int]] = []
    runner.capture(lambda done, total: reports.append((done, total)))
    assert reports[-1][0] == reports[-1][1] > 10
    runner.largest_step()


def test_the_drafter_of_a_checkpoint_lies_where_its_target_lies(tmp_path: Path, target: Decoder) -> None:
    fits = {"vocab_size": target.spec.vocab_size, "hidden_size": target.spec.hidden_size, "num_target_layers": 2}
    config = draft_config(block_size=4, target_layer_ids=(-1, 0)) | fits
    own = {name: one for name, one in random_tensors(config).items() if name not in (EMBEDDING, HEAD)}
    write_draft_checkpoint(tmp_path, config, own)
    drafter, _ = open_device_drafter(EngineConfig(drafter=str(tmp_path), max_num_seqs=SLOTS), target, "tiny", 64)
    open_runner(target, drafter).largest_step()


def test_without_a_drafter_too(target: Decoder) -> None:
    open_runner(target, None).largest_step()


def test_new_sequences_and_blocks_reach_the_device_without_waiting(tmp_path: Path, target: Decoder) -> None:
    runner = open_runner(target, open_drafter(tmp_path, target))
    records = [RequestRecord(Request((1, 2, 3), SamplingParams()), RequestFacts(3, 0.0)) for _ in range(2)]
    first, second = (Sequence(i, record, 0, 7, 9, None, [1, 2, 3], 3, b"") for i, record in enumerate(records))
    first.blocks, second.blocks = [2], [0]
    batch = Batch([Decode(first, None, 2, None)], [Prefill(second, 0, 2, False)], [first, second], [], 0, 0, 0)
    allocation: Any = SimpleNamespace(budget=2, draft_next=np.ones(1, np.bool_), draft_new=True)
    table = CalibrationTable(np.ones((2, 4), np.float32), np.zeros((2, 4), np.float32))
    with pytest.raises(
        NotImplementedError, match="meta tensor"
    ):  # the one copy back, the last thing that a launch does
        runner.launch(batch, allocation, table)
    assert runner._plans.slots_of([first, second]) == [0, 1]

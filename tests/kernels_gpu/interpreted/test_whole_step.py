"""The device's runner with every Triton kernel in it, all of them interpreted: the tokens of the CPU's kernels.

Rounding differs between the two, so this holds where no two tokens' scores are within it; here they are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from draft_checkpoints import TARGET_CONFIG, draft_config, random_tensors, write_draft_checkpoint
from fakes import totals
from host_device import open_host_drafter, running_on_host_device
from tiny_models import write_tiny_model

from dspark.engine import EngineConfig, Request, SamplingParams
from dspark.engine.calibration import Calibration
from dspark.engine.gpu.kernels import triton_kernels
from dspark.engine.gpu.runner import GpuRunner
from dspark.engine.gpu.start_up import make_runner
from dspark.engine.models.decoder import Decoder
from dspark.kernels.dispatch import Kernels

REQUESTS = [
    Request((5, 6, 7), SamplingParams(temperature=0.0, max_tokens=4, seed=1, ignore_eos=True)),
    Request((9, 9), SamplingParams(temperature=1.0, max_tokens=3, seed=2, top_k=20, top_p=0.9)),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    target = write_tiny_model(tmp_path_factory.mktemp("tiny") / "target")
    own = {**TARGET_CONFIG, "vocab_size": 320, "hidden_size": 64, "num_hidden_layers": 2}
    drafter = draft_config(own, block_size=4, num_layers=1, target_layer_ids=(-1, 0))
    return EngineConfig(
        model=str(target),
        dtype="float32",
        drafter=str(write_draft_checkpoint(tmp_path_factory.mktemp("draft"), drafter, random_tensors(drafter))),
        speculation="fixed",
        threads=1,
        max_num_seqs=2,
        max_num_batched_tokens=16,
        cache_dir=tmp_path_factory.mktemp("cache"),
    )


def model_kernels() -> Kernels:
    from dspark.kernels.gpu import draft_attention, paged_attention, rms_norm, rope_kv_write, silu_mul

    return Kernels(
        "triton",
        rms_norm.rms_norm,
        rms_norm.add_rms_norm,
        silu_mul.silu_mul,
        rope_kv_write.rope_kv_write,
        paged_attention.paged_attention,
        draft_attention.draft_attention,
    )


def open_interpreted_runner(
    config: EngineConfig, num_blocks: int, decoder: Decoder, _: object
) -> tuple[GpuRunner, Calibration]:
    drafter, calibration = open_host_drafter(config, decoder)
    decoder.kernels = drafter._kernels = model_kernels()
    runner = make_runner(config, decoder, drafter, triton_kernels(), drafter.block_size, decoder.spec.max_position)
    runner.allocate(num_blocks)
    return runner, calibration


def tokens_of(config: EngineConfig, **options: Any) -> list[list[int]]:
    with running_on_host_device(config, **options) as engine:
        answers = engine.answer_together(REQUESTS)
    sums = totals(engine.steps)
    assert sums["accepted"] + sums["rejected_mismatch"] > 0
    return [answer.tokens[0] for answer in answers]


@pytest.mark.slow
def test_the_tokens_of_the_cpus_kernels(config: EngineConfig) -> None:
    expected = tokens_of(config)
    assert [len(one) for one in expected] == [4, 3]
    assert np.unique(np.concatenate(expected)).size > 3
    assert tokens_of(config, open_runner=open_interpreted_runner) == expected

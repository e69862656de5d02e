"""Engines whose steps run as on a device, on a CPU: see `benchmarks/host_device.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fakes import Answer, RecordedCost, RunningEngine
from numpy.typing import NDArray
from torch import Tensor

from dspark.benchmarks.host_device import HostDrafter, HostTarget, MarkovBlock, host_kernels
from dspark.engine import Engine, EngineConfig, Request
from dspark.engine.calibration import Calibration
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.drafters.open_drafter import open_drafter
from dspark.engine.gpu.runner import GpuRunner
from dspark.engine.load_controller import LoadController
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.engine.noise import sequence_key
from dspark.engine.startup import start_up
from dspark.kernels.markov_step import markov_block_reference

GAMMA = 4


class Oracle:
    """In place of the Markov step: drafts the target's own next tokens, one in six of them wrong."""

    def __init__(self, requests: Sequence[Request], answers: Sequence[Answer], vocab_size: int) -> None:
        self._random = np.random.default_rng(1)
        self._vocab_size = vocab_size
        self._texts: dict[int, NDArray[np.int64]] = {}
        for request, answer in zip(requests, answers, strict=True):
            prompt = np.array(request.prompt_token_ids, np.int64)
            assert request.sampling.seed is not None
            for choice, output in enumerate(answer.tokens):
                text = np.concatenate((prompt, np.array(output, np.int64)))
                self._texts[sequence_key(request.sampling.seed, choice, prompt)] = text

    def __call__(
        self,
        logits: Tensor,
        anchors: Tensor,
        w1: Tensor,
        w2: Tensor,
        temperature: Tensor,
        keys: Tensor,
        positions: Tensor,
        *others: object,
    ) -> Tensor:
        tokens = self._random.integers(0, self._vocab_size, positions.shape)
        right = self._random.random(positions.shape) > 1 / 6
        for block, at, key, good in zip(tokens, positions.numpy(), keys.numpy().view(np.uint64), right, strict=True):
            text = self._texts.get(int(key), np.empty(0, np.int64))
            known = good & (at < text.size)
            block[known] = text[at[known]]
        return torch.from_numpy(tokens)


def open_host_decoder(folder: Path) -> Decoder:
    torch.set_grad_enabled(False)
    spec = read_spec(folder)
    return Decoder(spec, load_weights(folder, spec, torch.float32), spec.max_position, LinearFactory())


def open_host_drafter(config: EngineConfig, decoder: Decoder) -> tuple[DSparkDrafter, Calibration]:
    """The DSpark drafter of `config.drafter`, alone."""
    drafter, calibration = open_drafter(
        replace(config, lookup=False), decoder, "tiny", decoder.spec.max_position, lambda *_: torch.empty(0)
    )
    assert isinstance(drafter, DSparkDrafter)
    return drafter, calibration


def open_host_runner(
    config: EngineConfig,
    num_blocks: int,
    decoder: Decoder | None = None,
    markov_block: MarkovBlock = markov_block_reference,
) -> tuple[GpuRunner, Calibration]:
    """A runner as on a device; config.drafter: folder of a DSpark checkpoint, or `none`."""
    if decoder is None:
        decoder = open_host_decoder(Path(str(config.model)))
    drafter, calibration = None, Calibration(GAMMA)
    if config.drafter != "none":
        drafter, calibration = open_host_drafter(config, decoder)
    runner = GpuRunner(
        HostTarget(decoder),  # type: ignore[arg-type]
        None if drafter is None else HostDrafter(drafter),  # type: ignore[arg-type]
        host_kernels(markov_block),
        frozenset(decoder.spec.eos_token_ids),
        block_size=GAMMA,
        max_draft_tokens=GAMMA,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=decoder.spec.max_position,
    )
    runner.allocate(num_blocks)
    return runner, calibration


@contextmanager
def running_on_host_device(
    config: EngineConfig,
    markov_block: MarkovBlock = markov_block_reference,
    controller: type[LoadController] = LoadController,
    open_runner: Callable[..., tuple[GpuRunner, Calibration]] = open_host_runner,
) -> Iterator[RunningEngine]:
    """A started engine whose steps run as on a device; config.drafter: folder of a DSpark checkpoint, or `none`."""
    worker = ThreadPoolExecutor(max_workers=1)
    parts = worker.submit(start_up, replace(config, drafter="lookup", num_speculative_tokens=GAMMA)).result()
    decoder = parts.runner.decoder
    runner, calibration = worker.submit(open_runner, config, parts.info.num_blocks, decoder, markov_block).result()
    decides = controller(config.speculation, GAMMA, RecordedCost(config), calibration)
    given = replace(parts, runner=runner, controller=decides)  # type: ignore[arg-type]
    engine = RunningEngine(Engine(config, given, worker), given)
    engine.run(engine.engine.start())
    try:
        yield engine
    finally:
        engine.stop()
    assert engine.engine.failed or engine.engine.scheduler.kv_cache.used == 0

"""From options to a running engine's parts: load, check, allocate, warm up, measure. Everything here blocks."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.calibration import Calibration
from dspark.engine.config import EngineConfig
from dspark.engine.cost_model import CostModel
from dspark.engine.drafters.drafter import Drafter, DraftRow, Noise
from dspark.engine.drafters.open_drafter import open_drafter
from dspark.engine.errors import ConfigError
from dspark.engine.facts import EngineInfo
from dspark.engine.gpu.kernels import triton_kernels
from dspark.engine.gpu.runner import GpuRunner
from dspark.engine.gpu.start_up import (
    DevicePassTimer,
    allocate,
    choose_device,
    longest_draft,
    make_runner,
    open_device_drafter,
    rows_are_invariant,
)
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.load_controller import LoadController
from dspark.engine.models.decoder import Decoder, FlatBatch, LinearFactory
from dspark.engine.models.locate import cache_folder, locate_model
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import OnDevice, load_weights
from dspark.engine.noise import NoiseCache, Stream
from dspark.engine.request import SamplingParams
from dspark.engine.runner import Runner
from dspark.engine.sampling import Sampler, SampleRow, SamplingState
from dspark.kernels.cpu import set_threads
from dspark.kernels.dispatch import Kernels, choose_kernels
from dspark.kernels.gumbel_noise import gumbel_noise

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
PROFILE_CONTEXT_TOKENS = 512
LARGEST_DEFAULT_KV_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class EngineParts:
    info: EngineInfo
    runner: Runner
    controller: LoadController
    stop_token_ids: frozenset[int]


def check_config(config: EngineConfig) -> None:
    """Raise ConfigError for a value that cannot work with any model."""
    cores = os.cpu_count() or 1
    if config.threads is not None and not 1 <= config.threads <= cores:
        raise ConfigError("threads", f"{config.threads} is not in 1..{cores}, the processor's cores")
    for field in ("max_num_seqs", "max_num_batched_tokens", "max_queued_requests", "max_queued_tokens"):
        if getattr(config, field) < 1:
            raise ConfigError(field, f"{getattr(config, field)} must be at least 1")
    if config.lag not in (None, 0, 1):
        raise ConfigError(
            "lag", f"{config.lag} must be 0 or 1, steps that are unfinished while the next one is planned"
        )
    if config.stall_timeout_s <= 0:
        raise ConfigError("stall_timeout", f"{config.stall_timeout_s:g} must be above 0 seconds")
    if config.max_num_batched_tokens < config.max_num_seqs:
        raise ConfigError(
            "max_num_batched_tokens",
            f"{config.max_num_batched_tokens} must be at least max_num_seqs ({config.max_num_seqs}), a row each",
        )
    if config.verification == "rejection" and config.speculation == "adaptive":
        raise ConfigError(
            "verification",
            "rejection is lossless only while draft lengths ignore the drafts; use speculation `fixed` or `off` with it",
        )


def choose_dtype(config: EngineConfig, device_type: str = "cpu") -> torch.dtype:
    if config.dtype == "auto":
        if device_type != "cpu":
            return torch.bfloat16
        return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[config.dtype]


def start_up(config: EngineConfig, progress: Progress | None = None) -> EngineParts:
    """Build the engine's parts. Call in the thread that will run the steps. Raises ConfigError."""
    check_config(config)
    device = choose_device(config)
    kernels = _kernels_for(device)
    log.info("kernels: %s", kernels.name)
    threads = config.threads or max(1, (os.cpu_count() or 1) - 1)
    set_threads(threads)
    torch.set_grad_enabled(False)
    clock = _PhaseClock()
    files = locate_model(config.model, config.cache_dir, progress)
    spec = read_spec(files.folder)
    max_model_len = spec.max_position if config.max_model_len is None else config.max_model_len
    if not 2 <= max_model_len <= spec.max_position:
        raise ConfigError("max_model_len", f"{max_model_len} is not in 2..{spec.max_position}, the model's positions")
    dtype = choose_dtype(config, device.type)
    linear = LinearFactory()
    decoder = Decoder(spec, OnDevice(load_weights(files.folder, spec, dtype, progress), device), max_model_len, linear)
    clock.end("target_weights")
    report = progress or (lambda phase, done, total: None)
    open_step = _open_on_cpu if device.type == "cpu" else _open_on_device
    step = open_step(config, decoder, files.name, max_model_len, threads, clock, report)
    row_invariant = linear.row_invariant and step.row_invariant
    if not row_invariant:
        log.warning("row-invariance self-test failed: answers may depend on batching on this machine")
    info = EngineInfo(
        model_name=files.name,
        drafter_name=step.drafter_name,
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        kernels=kernels.name,
        threads=threads,
        block_size=BLOCK_SIZE,
        num_blocks=step.num_blocks,
        kv_cache_bytes=step.kv_cache_bytes,
        max_model_len=max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_draft_tokens=longest_draft(config, step.calibration.block_size),
        vocab_size=spec.vocab_size,
        weight_bytes=decoder.weight_bytes,
        eos_token_ids=spec.eos_token_ids,
        row_invariant=row_invariant,
        load_seconds=clock.phases,
        verification=config.verification,
        lag=int(device.type != "cpu") if config.lag is None else config.lag,
    )
    mode = "off" if step.drafter_name == "none" else config.speculation
    controller = LoadController(
        mode, step.calibration.block_size, step.cost, step.calibration, narrowest=step.narrowest
    )
    runner = cast(Runner, step.runner)  # a step is `launch` and `collect` with either
    return EngineParts(info, runner, controller, frozenset(spec.eos_token_ids))


@dataclass(frozen=True, slots=True)
class _OpenedStep:
    """What runs the steps, and what is known of it."""

    runner: Runner | GpuRunner
    drafter_name: str
    calibration: Calibration
    narrowest: int  # slots of a block that are always drafted
    cost: CostModel
    num_blocks: int
    kv_cache_bytes: int
    row_invariant: bool


def _open_on_cpu(
    config: EngineConfig,
    decoder: Decoder,
    model_name: str,
    max_model_len: int,
    threads: int,
    clock: _PhaseClock,
    report: Progress,
) -> _OpenedStep:
    """Drafter and K/V pool beside the target, kernels compiled, self-test and measured costs."""
    noise = NoiseCache(decoder.spec.vocab_size)
    drafter, calibration = open_drafter(
        config, decoder, model_name, max_model_len, _draft_noise(config, noise), predictions=True
    )
    clock.end("draft_weights")
    kv_bytes, num_blocks = _plan_kv(config, decoder, drafter, max_model_len)
    decoder.allocate_kv(num_blocks, BLOCK_SIZE)
    drafter.allocate_context(num_blocks, BLOCK_SIZE)
    clock.end("kv_alloc")
    report("warm-up", 0, 2)  # on a machine's first start this compiles the kernels, which takes a while
    row_invariant = _rows_are_invariant(decoder, num_blocks)
    report("warm-up", 1, 2)
    _compile_sampling(decoder, noise)
    report("warm-up", 2, 2)
    clock.end("warmup")
    timer = PassTimer(decoder, drafter, Sampler(decoder.head_weight, noise), num_blocks, max_model_len)
    made_of = (decoder.dtype, threads, drafter.name, config.drafter, drafter.block_size, decoder.spec)
    cost = _costs(config, model_name, timer, made_of)
    clock.end("profile")
    most = longest_draft(config, drafter.block_size)
    runner = Runner(decoder, drafter, noise, frozenset(decoder.spec.eos_token_ids), config.verification, most)
    return _OpenedStep(runner, drafter.name, calibration, 1, cost, num_blocks, kv_bytes, row_invariant)


def _open_on_device(
    config: EngineConfig,
    decoder: Decoder,
    model_name: str,
    max_model_len: int,
    threads: int,
    clock: _PhaseClock,
    report: Progress,
) -> _OpenedStep:
    """The same on a device, with its steps captured."""
    drafter, calibration = open_device_drafter(config, decoder, model_name, max_model_len)
    clock.end("draft_weights")
    runner = make_runner(config, decoder, drafter, triton_kernels(), calibration.block_size, max_model_len)
    num_blocks = allocate(config, runner, max_model_len, report)
    clock.end("kv_alloc")
    runner.capture(lambda done, total: report("capture", done, total))
    row_invariant = rows_are_invariant(decoder)
    clock.end("warmup")
    name = "none" if drafter is None else drafter.name
    made_of = (torch.cuda.get_device_name(), decoder.dtype, name, config.drafter, calibration.block_size, decoder.spec)
    cost = _costs(config, model_name, DevicePassTimer(runner), made_of)
    clock.end("profile")
    kv_bytes = num_blocks * runner.block_bytes
    return _OpenedStep(runner, name, calibration, calibration.block_size, cost, num_blocks, kv_bytes, row_invariant)


def _kernels_for(device: torch.device) -> Kernels:
    """Raises ConfigError naming what the device lacks, before anything is loaded."""
    try:
        return choose_kernels(device)
    except ModuleNotFoundError as missing:
        raise ConfigError("device", str(missing)) from missing


class _PhaseClock:
    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._last_s = time.monotonic()

    def end(self, phase: str) -> None:
        now_s = time.monotonic()
        self.phases[phase] = now_s - self._last_s
        self._last_s = now_s


def _draft_noise(config: EngineConfig, noise: NoiseCache) -> Noise:
    """What the drafter draws with: the target's own noise, or in rejection mode noise that is independent of it."""
    if config.verification == "coupled":
        return lambda keys, positions, rounds: torch.from_numpy(noise.rows(keys, positions))
    return lambda keys, positions, rounds: torch.from_numpy(
        gumbel_noise(keys, positions, rounds, noise.vocab_size, Stream.DRAFT)
    )


def _plan_kv(config: EngineConfig, decoder: Decoder, drafter: Drafter, max_model_len: int) -> tuple[int, int]:
    """(bytes, blocks) of the pool: what was asked for, else a quarter of the free memory, never more than can be used."""
    block_bytes = decoder.bytes_per_block(BLOCK_SIZE) + drafter.bytes_per_block(BLOCK_SIZE)
    budget = config.kv_cache_bytes
    if budget is None:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        budget = min(free // 4, LARGEST_DEFAULT_KV_BYTES)
    most = config.max_num_seqs * blocks_for(max_model_len)
    blocks = min(budget // block_bytes, most)
    if blocks < 2:
        raise ConfigError(
            "kv_cache_memory", f"{budget} bytes hold {blocks} blocks of {block_bytes} bytes; give at least 2"
        )
    return blocks * block_bytes, blocks


def _rows_are_invariant(decoder: Decoder, num_blocks: int) -> bool:
    """Self-test on the loaded weights: a row's hidden state and logits are the same bits alone and in company."""
    count = min(24, num_blocks * BLOCK_SIZE)
    tokens = np.arange(count, dtype=np.int64) * 97 % decoder.spec.vocab_size
    table = np.arange(blocks_for(count), dtype=np.int32)
    together, _ = decoder.forward(flat_sequences([(tokens, 0, table)]))
    logits = decoder.logits(together)
    for row in range(count):
        alone, _ = decoder.forward(flat_sequences([(tokens[row : row + 1], row, table)]))
        if not torch.equal(alone, together[row : row + 1]) or not torch.equal(
            decoder.logits(alone), logits[row : row + 1]
        ):
            return False
    return True


def _compile_sampling(decoder: Decoder, noise: NoiseCache) -> None:
    """Sample one greedy and one random token, so that no request waits for these kernels to be compiled."""
    hidden = torch.zeros((1, decoder.spec.hidden_size), dtype=decoder.dtype)
    sampler = Sampler(decoder.head_weight, noise)
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature)
        state = SamplingState(params, 0, np.zeros(1, np.int64), frozenset(), decoder.spec.vocab_size)
        sampler.sample(decoder.logits(hidden), hidden, [SampleRow(state, 1, np.empty(0, np.int64))])
    noise.forget(0)


def flat_sequences(sequences: list[tuple[NDArray[np.int64], int, NDArray[np.int32]]]) -> FlatBatch:
    """A flat batch of (token ids, first position, block table) triples whose tables are equally long."""
    counts = [len(tokens) for tokens, _, _ in sequences]
    tables = np.stack([table for _, _, table in sequences])
    positions = np.concatenate([first + np.arange(len(tokens), dtype=np.int32) for tokens, first, _ in sequences])
    owners = np.repeat(np.arange(len(sequences)), counts)
    slots = tables[owners, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
    row_starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    first_positions = np.array([first for _, first, _ in sequences], np.int32)
    return FlatBatch(
        np.concatenate([tokens for tokens, _, _ in sequences]), positions, slots, tables, row_starts, first_positions
    )


class PassTimer:
    """Times real passes for the cost model. It scribbles over the K/V pool, so only before the first request."""

    rows_per_sequence = 8

    def __init__(
        self, decoder: Decoder, drafter: Drafter, sampler: Sampler, num_blocks: int, max_model_len: int
    ) -> None:
        self._decoder = decoder
        self._drafter = drafter
        self.block_size = drafter.block_size
        self._sampler = sampler
        self._num_blocks = num_blocks
        # behind the longest sequence there are no rotations, and what is written there would be anything
        self._furthest = max(0, min((num_blocks - 1) * BLOCK_SIZE, max_model_len - self.rows_per_sequence))

    def verify_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a target pass, head, greedy sampling and drafter context included."""
        first = min(context_tokens, self._furthest)
        width = blocks_for(first + self.rows_per_sequence)
        sequences = []
        for start in range(0, rows, self.rows_per_sequence):
            count = min(self.rows_per_sequence, rows - start)
            table = (np.arange(width, dtype=np.int32) + start) % self._num_blocks
            sequences.append((np.zeros(count, np.int64), first, table))
        flat = flat_sequences(sequences)
        greedy = SamplingState(
            SamplingParams(temperature=0.0), 0, np.zeros(1, np.int64), frozenset(), self._decoder.spec.vocab_size
        )
        sampled = [SampleRow(greedy, 1, np.empty(0, np.int64))] * rows

        def run() -> None:
            hidden, features = self._decoder.forward(flat, self._drafter.feature_layers)
            self._sampler.sample(self._decoder.logits(hidden), hidden, sampled)
            if features is not None:
                self._drafter.observe(features, flat.positions, flat.slots)

        return _timed(run)

    def draft_s(self, slots: int) -> float:
        """Seconds of drafting so many slots, in as few blocks as they fit in."""
        sequences = -(-slots // self.block_size)
        width = -(-slots // sequences)
        length = max(1, min(4 * BLOCK_SIZE, self._furthest))
        table = np.arange(blocks_for(length + 1), dtype=np.int32)
        tokens = np.arange(length + 1, dtype=np.int64)  # all different: lookup has nothing to propose, a model must
        tokens %= self._decoder.spec.vocab_size
        rows = [DraftRow(-1 - i, tokens, length, 0.0, 0, table, width=width) for i in range(sequences)]
        self._drafter.propose(rows)  # a drafter whose context is a pass of its own first catches up
        seconds = _timed(lambda: self._drafter.propose(rows))
        for row in rows:
            self._drafter.forget(row.sequence_id)
        return seconds * slots / (sequences * width)


def _timed(run: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    run()
    return time.perf_counter() - started_s


def _costs(
    config: EngineConfig, model_name: str, timer: PassTimer | DevicePassTimer, made_of: tuple[object, ...]
) -> CostModel:
    """The measured costs, from the last start where everything they depend on is the same."""
    facts = (platform.processor(), platform.node(), os.cpu_count(), torch.__version__, version("numba"))
    sizes = (config.max_num_seqs, config.max_num_batched_tokens, version("dspark-server"))
    key = hashlib.blake2b(repr((model_name, facts, sizes, made_of)).encode(), digest_size=12).hexdigest()
    path = cache_folder(config.cache_dir) / "costs" / f"{key}.json"
    cost = CostModel.load(path, key)
    if cost is None:
        cost = CostModel.profile(
            timer, config.max_num_batched_tokens, config.max_num_seqs, context_tokens=PROFILE_CONTEXT_TOKENS
        )
        cost.save(path, key)
    return cost

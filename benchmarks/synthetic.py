"""An engine around a model with random weights, whose drafts are right as often as a profile says. All work is done.

A random drafter never meets a random target, so what is right is decided in `StepKernels`, on the device, in one of two ways
that can be changed between steps, captured graphs included:

    forced    behind the target's sampling: where a coin says so its token becomes the draft, else one that is not. The text is
              nobody's; every row is computed, sampled and compared as always. For speed.
    recorded  behind the drafter: where a coin says so a draft becomes what the target said at that place before. The text stays
              the target's. For comparing tokens.

The coin of slot k falls on "right" with the k-th probability, given that all before it were right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dspark.benchmarks.host_device import HostDrafter, HostTarget, host_kernels
from dspark.benchmarks.qwen3 import Model, RandomWeights
from dspark.engine import Engine, EngineConfig, EngineInfo
from dspark.engine.calibration import Calibration
from dspark.engine.cost_model import CostModel
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.gpu.kernels import StepKernels, triton_kernels
from dspark.engine.gpu.runner import GpuRunner
from dspark.engine.gpu.start_up import DevicePassTimer, allocate, choose_device, make_runner, rows_are_invariant
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.load_controller import LoadController
from dspark.engine.models.decoder import Decoder, LinearFactory
from dspark.engine.noise import sequence_key
from dspark.engine.startup import PROFILE_CONTEXT_TOKENS, EngineParts, choose_dtype
from dspark.kernels.cpu import set_threads

Progress = Callable[[str, int, int], None]
RECORDED_TEXTS = 16


class Acceptance:
    """Wraps a step's kernels. Everything it reads lies at a fixed place on the device, where it can be changed."""

    def __init__(
        self, kernels: StepKernels, profile: Sequence[float], vocab_size: int, longest: int, device: torch.device
    ) -> None:
        """profile: [γ]. longest: tokens of a text, its prompt included."""
        self._kernels = kernels
        self._vocab_size = vocab_size
        self._profile = torch.tensor(profile, device=device)
        self._forced = torch.zeros(1, dtype=torch.bool, device=device)
        self._keys = torch.zeros(RECORDED_TEXTS, dtype=torch.int64, device=device)
        self._texts = torch.full((RECORDED_TEXTS, longest), -1, dtype=torch.int64, device=device)

    @property
    def kernels(self) -> StepKernels:
        return replace(self._kernels, accept_drafts=self._accept_drafts, markov_block=self._markov_block)

    def force(self) -> None:
        """From now on forced and not recorded."""
        self._forced.fill_(True)
        self._texts.fill_(-1)

    def record(self, answers: Mapping[tuple[int, ...], tuple[int, ...]], seed: int) -> None:
        """From now on recorded. answers: prompt → tokens, of at most RECORDED_TEXTS requests with this seed."""
        self._forced.fill_(False)
        self._texts.fill_(-1)
        for row, (prompt, tokens) in enumerate(answers.items()):
            text = torch.tensor(prompt + tokens)
            key = np.array([sequence_key(seed, 0, np.array(prompt, np.int64))], np.uint64)
            self._keys[row : row + 1].copy_(torch.from_numpy(key.view(np.int64)))
            self._texts[row, : len(text)].copy_(text)

    def _markov_block(
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
        drafts = self._kernels.markov_block(logits, anchors, w1, w2, temperature, keys, positions, *others)
        found = keys[:, None] == self._keys
        text = self._texts[found.int().argmax(dim=1)]
        known = text.gather(1, positions.clamp(max=text.shape[1] - 1))
        right = torch.rand(positions.shape, device=positions.device) < self._profile
        return torch.where(found.any(dim=1)[:, None] & (known >= 0) & right, known, drafts)

    def _accept_drafts(self, fed: Tensor, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        row = torch.arange(len(tokens), dtype=starts.dtype, device=tokens.device)
        owner = torch.searchsorted(starts[1:], row, right=True).clamp(max=len(starts) - 2)
        slot = (row - starts[owner]).clamp(0, len(self._profile) - 1).long()
        followed = row + 1 < starts[owner + 1]
        draft = fed.roll(-1)
        right = torch.rand(len(tokens), device=tokens.device) < self._profile[slot]
        other = torch.where(tokens == draft, (tokens + 1) % self._vocab_size, tokens)
        tokens.copy_(torch.where(self._forced & followed, torch.where(right, draft, other), tokens))
        return self._kernels.accept_drafts(fed, tokens, starts)


def open_engine(
    model: Model, config: EngineConfig, profile: Sequence[float], progress: Progress
) -> tuple[Engine, Acceptance]:
    """An engine as `Engine.load` makes one, of weights drawn on its device; config.max_model_len must be given.

    On a CPU the device's runner runs too, around the CPU's kernels. Raises ConfigError.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
    try:
        parts, acceptance = worker.submit(_open_parts, model, config, profile, progress).result()
    except BaseException:
        worker.shutdown(wait=False)
        raise
    return Engine(config, parts, worker), acceptance


def _open_parts(
    model: Model, config: EngineConfig, profile: Sequence[float], progress: Progress
) -> tuple[EngineParts, Acceptance]:
    torch.set_grad_enabled(False)
    set_threads(config.threads or 1)
    device = choose_device(config)
    on_cpu = device.type == "cpu"
    dtype = choose_dtype(config, device.type)
    longest = config.max_model_len
    assert longest is not None
    decoder, drafter = _open_models(model, config, longest, dtype, device)
    kernels = host_kernels() if on_cpu else triton_kernels()
    acceptance = Acceptance(kernels, profile, model.target.vocab_size, longest, device)
    block_size = drafter.block_size
    runner = make_runner(config, decoder, drafter, acceptance.kernels, block_size, longest)
    if on_cpu:
        num_blocks = config.max_num_seqs * blocks_for(longest)
        runner.allocate(num_blocks)
    else:
        num_blocks = allocate(config, runner, longest, progress)
    runner.capture(lambda done, total: progress("capture", done, total))
    row_invariant = rows_are_invariant(decoder)
    cost = CostModel.profile(
        DevicePassTimer(runner), config.max_num_batched_tokens, config.max_num_seqs, PROFILE_CONTEXT_TOKENS
    )
    info = _describe(model, config, decoder, runner, num_blocks, row_invariant)
    controller = LoadController(config.speculation, block_size, cost, Calibration(block_size), narrowest=block_size)
    return EngineParts(info, runner, controller, frozenset()), acceptance  # type: ignore[arg-type]


def _open_models(
    model: Model, config: EngineConfig, longest: int, dtype: torch.dtype, device: torch.device
) -> tuple[Decoder, DSparkDrafter]:
    """Both as a device's runner takes them."""
    linear = LinearFactory()
    decoder = Decoder(model.target, RandomWeights(model.target_shapes, dtype, device), longest, linear)
    weights = RandomWeights(model.draft_shapes, dtype, device)
    drafter = DSparkDrafter(
        model.draft,
        weights,
        decoder.embedding,
        decoder.logits,
        linear,
        max_num_seqs=config.max_num_seqs,
        max_model_len=longest,
        verification=config.verification,
        noise=_no_host_noise,
    )
    if device.type != "cpu":
        return decoder, drafter
    return HostTarget(decoder), HostDrafter(drafter)  # type: ignore[return-value]


def _no_host_noise(*counters: object) -> Tensor:
    raise AssertionError("a device's runner makes noise where it is used")


def _describe(
    model: Model, config: EngineConfig, decoder: Decoder, runner: GpuRunner, num_blocks: int, row_invariant: bool
) -> EngineInfo:
    assert runner.drafter is not None
    assert config.max_model_len is not None
    return EngineInfo(
        model_name=f"{model.name} (random weights)",
        drafter_name=runner.drafter.name,
        device=runner.device.type,
        dtype=str(decoder.dtype).removeprefix("torch."),
        kernels=decoder.kernels.name,
        threads=config.threads or 1,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * runner.block_bytes,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_draft_tokens=runner.drafter.block_size,
        vocab_size=model.target.vocab_size,
        weight_bytes=decoder.weight_bytes,
        eos_token_ids=(),
        row_invariant=row_invariant,
        load_seconds={},
        lag=1,
    )

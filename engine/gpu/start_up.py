"""Start-up on a device: what differs from a CPU. Everything here blocks.

Never run on CUDA: reading the device's memory, and the order of allocation that it decides. The rest runs in the tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from dspark.engine.calibration import Calibration
from dspark.engine.config import EngineConfig
from dspark.engine.drafters.draft_checkpoint import ARCHITECTURE
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.drafters.open_drafter import open_drafter
from dspark.engine.errors import ConfigError
from dspark.engine.gpu.kernels import StepKernels
from dspark.engine.gpu.memory import DeviceMemory, plan_blocks
from dspark.engine.gpu.runner import GpuRunner
from dspark.engine.gpu.target_round import float_logits
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.models.decoder import Decoder, FlatBatch

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]
TOKENS_WITHOUT_DRAFTER = 7
"""γ of an engine that never drafts; it sizes buffers."""
WARM_UP_BLOCKS = 1


def choose_device(config: EngineConfig) -> torch.device:
    """`auto` is cuda where there is one. Raises ConfigError for a device that is not there, and for what it cannot do."""
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError("device", f"{config.device} is not supported; give `auto`, `cpu` or `cuda`")
    present = torch.cuda.is_available()
    if config.device == "cuda" and not present:
        built_for = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
        raise ConfigError("device", f"cuda, but torch {torch.__version__} {built_for} and sees no device; use `cpu`")
    if config.device == "cpu" or not present:
        return torch.device("cpu")
    if config.verification == "rejection":
        raise ConfigError("verification", "rejection runs on the CPU only; use `coupled`, or `--device cpu`")
    if config.lookup:
        raise ConfigError("lookup", "it needs the newest tokens on the host, and on cuda a step does not wait for them")
    return torch.device("cuda")


def longest_draft(config: EngineConfig, block_size: int) -> int:
    """Drafts kept of a block."""
    return min(config.num_speculative_tokens or block_size, block_size)


def open_device_drafter(
    config: EngineConfig, decoder: Decoder, model_name: str, max_model_len: int
) -> tuple[DSparkDrafter | None, Calibration]:
    """The drafter, one of DSpark's checkpoints; None with speculation off, or where `auto` finds none.

    Raises ConfigError("drafter") for another one.
    """
    without = Calibration(config.num_speculative_tokens or TOKENS_WITHOUT_DRAFTER)
    if config.speculation == "off":
        return None, without
    log.info("lookup and predicted outputs are not drafted from on %s", decoder.embedding.device.type)
    alone = replace(config, lookup=False)
    drafter, calibration = open_drafter(alone, decoder, model_name, max_model_len, _no_host_noise)
    if not isinstance(drafter, DSparkDrafter) and config.drafter == "auto":
        log.warning("no drafter is shipped for %s, and lookup runs on the CPU only: plain decoding", model_name)
        return None, without
    if not isinstance(drafter, DSparkDrafter):
        raise ConfigError(
            "drafter",
            f"{config.drafter} means the drafter {drafter.name} here, which runs on the CPU only; on cuda give the folder "
            f"of a {ARCHITECTURE} checkpoint (DSpark or DFlash), or `--speculation off`",
        )
    return drafter, calibration


def _no_host_noise(*counters: object) -> torch.Tensor:
    raise AssertionError("on a device noise is made where it is used")


def make_runner(
    config: EngineConfig,
    decoder: Decoder,
    drafter: DSparkDrafter | None,
    kernels: StepKernels,
    block_size: int,
    max_model_len: int,
) -> GpuRunner:
    """Without a K/V pool yet. block_size: γ, also without a drafter."""
    return GpuRunner(
        decoder,
        drafter,
        kernels,
        frozenset(decoder.spec.eos_token_ids),
        block_size=block_size,
        max_draft_tokens=longest_draft(config, block_size),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=max_model_len,
    )


def allocate(config: EngineConfig, runner: GpuRunner, max_model_len: int, progress: Progress) -> int:
    """Give the runner its pool; returns the blocks. The steps that are run for it compile the kernels."""
    progress("warm-up", 0, 1)
    memory = measure_memory(runner)
    most = config.max_num_seqs * blocks_for(max_model_len)
    blocks = plan_blocks(memory, runner.block_bytes, most, config.kv_cache_bytes)
    runner.allocate(blocks)
    progress("warm-up", 1, 1)
    return blocks


def measure_memory(runner: GpuRunner) -> DeviceMemory:
    """What is free beside the weights, and what steps take of it, from the largest step on a pool of next to nothing.

    The largest captured step counts twice: graphs keep memory of their own.
    """
    device = runner.device
    runner.allocate(WARM_UP_BLOCKS)
    runner.largest_captured_step()  # compiles, and makes the libraries' workspaces
    step = _peak_growth(runner.largest_step, device) + _peak_growth(runner.largest_captured_step, device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, step)


def _peak_growth(work: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - before


def rows_are_invariant(decoder: Decoder) -> bool:
    """Self-test on the loaded weights: a row's hidden state and logits are the same bits alone and in company."""
    device = decoder.embedding.device
    tokens = np.arange(BLOCK_SIZE, dtype=np.int64) * 97 % decoder.spec.vocab_size

    def run(first: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = np.arange(first, end, dtype=np.int32)
        starts, table = np.array([0, end - first], np.int32), np.zeros((1, 1), np.int32)
        flat = FlatBatch(tokens[first:end], positions, positions.astype(np.int64), table, starts, positions[:1])
        hidden, _ = decoder.forward(flat.to(device))
        return hidden, float_logits(decoder, hidden)

    together, logits = run(0, BLOCK_SIZE)
    for row in range(BLOCK_SIZE):
        hidden, own = run(row, row + 1)
        if not torch.equal(hidden[0], together[row]) or not torch.equal(own[0], logits[row]):
            return False
    return True


class DevicePassTimer:
    """Times real rounds for the cost model. It scribbles over the K/V pool, so only before the first request."""

    rows_per_sequence = 8

    def __init__(self, runner: GpuRunner) -> None:
        self._runner = runner
        self.block_size = runner.block_size

    def verify_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of a target round, head, greedy sampling and drafter context included."""
        return self._runner.target_s(rows, context_tokens, self.rows_per_sequence)

    def draft_s(self, slots: int) -> float:
        """Seconds of drafting so many slots, in whole blocks."""
        return self._runner.draft_s(-(-slots // self.block_size))

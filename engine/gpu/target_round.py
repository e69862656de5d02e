"""One target pass on the device and what follows from it: tokens, acceptance, the sequences' new state, drafter context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspark.engine.gpu.flat_batch import SampledRows, flatten
from dspark.engine.gpu.kernels import StepKernels
from dspark.engine.gpu.state import DeviceState
from dspark.engine.models.decoder import DeviceBatch


class Target(Protocol):
    """What is used of `models.decoder.Decoder`."""

    head_weight: Tensor

    def forward(self, batch: DeviceBatch, feature_layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TargetPass:
    """logits: [R, vocab] float32; tokens: [R] int64, the target's own after each sampled row; features: of all T rows."""

    batch: DeviceBatch
    sampled: SampledRows
    features: Tensor | None
    logits: Tensor
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """Sizes of a step's work: T rows, R sampled rows, N sequences."""

    rows: int
    sampled: int
    sequences: int


def run_target(
    target: Target,
    feature_layers: Sequence[int],
    kernels: StepKernels,
    state: DeviceState,
    plan: Mapping[str, Tensor],
    sizes: Padding,
    spare_block: int,
) -> TargetPass:
    """Flatten, compute, sample. spare_block: where the K/V of padding rows go."""
    batch, sampled = flatten(state, plan, kernels.fill_budget, sizes.rows, sizes.sampled, sizes.sequences, spare_block)
    hidden, features = target.forward(batch, feature_layers)
    logits = float_logits(target, hidden[sampled.rows])
    slots = sampled.slots
    params = state.temperature[slots], state.top_k[slots], state.top_p[slots], state.min_p[slots]
    tokens = kernels.sample_rows(logits, *params, state.noise_key[slots], sampled.positions)
    return TargetPass(batch, sampled, features, logits, tokens)


def float_logits(target: Target, hidden: Tensor) -> Tensor:
    """float32 logits of [n, hidden]. Of bfloat16 the sums are float32 and not rounded again.

    Rounded ones are often equal at the top; the CPU decides such ties by `argmax_rows` and `refine_logits` instead.
    """
    if hidden.dtype == torch.float32:
        return target.logits(hidden)
    return torch.mm(hidden, target.head_weight.t(), out_dtype=torch.float32)


def accept(
    kernels: StepKernels, state: DeviceState, plan: Mapping[str, Tensor], done: TargetPass, out: Mapping[str, Tensor]
) -> None:
    """Accept drafts, bring the sequences up to date, and leave the rounds in the fields `out` of `results.download_fields`."""
    starts = done.sampled.starts
    sequences = len(starts) - 1
    slots = plan["slots"][:sequences]
    accepted, _ = kernels.accept_drafts(done.sampled.fed, done.tokens, starts)
    rows = starts[1:] - starts[:-1]
    counts = torch.where(rows > 0, accepted + 1, 0).to(torch.int32)
    ahead = torch.arange(state.drafts.shape[1] + 1, device=starts.device)
    given = done.tokens[(starts[:-1, None] + ahead).clamp(max=len(done.tokens) - 1)]
    state.take_in(slots, given, counts)
    out["rows"].copy_(done.batch.row_starts[-1:])
    out["sampled"][:sequences] = rows
    out["given"][:sequences] = counts
    out["tokens"][:sequences] = given

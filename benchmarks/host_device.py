"""The device's runner on a CPU: the same code, around the CPU's kernels, which take numpy arrays in place of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspark.engine.drafters.dspark import DraftBatch, DSparkDrafter
from dspark.engine.gpu.kernels import StepKernels
from dspark.engine.load_controller import fill_budget
from dspark.engine.models.decoder import Decoder, DeviceBatch, FlatBatch
from dspark.kernels.coupled_sampling import sample_rows
from dspark.kernels.gumbel_noise import gumbel_noise
from dspark.kernels.markov_step import markov_block_reference

MarkovBlock = Callable[..., Tensor]


class HostTarget:
    """The CPU's decoder, given batches of tensors."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, batch: DeviceBatch, feature_layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        names = DeviceBatch.__dataclass_fields__
        return self._decoder.forward(FlatBatch(*(getattr(batch, name).numpy() for name in names)), feature_layers)


class HostDrafter:
    """The CPU's drafter, given batches of tensors."""

    def __init__(self, drafter: DSparkDrafter) -> None:
        self._drafter = drafter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def observe(self, features: Tensor, positions: Tensor, slots: Tensor) -> None:
        self._drafter.observe(features, positions.numpy(), slots.numpy())

    def backbone(self, anchors: Tensor, batch: DraftBatch) -> Tensor:
        names = DraftBatch.__dataclass_fields__
        return self._drafter.backbone(anchors, DraftBatch(*(getattr(batch, name).numpy() for name in names)))


def host_fill_budget(survival: Tensor, caps: Tensor, budget: Tensor) -> Tensor:
    return torch.from_numpy(fill_budget(survival.numpy(), caps.numpy(), int(budget)))


def host_sample_rows(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    keys: Tensor,
    positions: Tensor,
) -> Tensor:
    turns = np.zeros(len(keys), np.int64)
    noise = gumbel_noise(keys.numpy().view(np.uint64), positions.numpy(), turns, logits.shape[1])
    params = temperature.numpy(), top_k.numpy(), top_p.numpy(), min_p.numpy()
    return torch.from_numpy(sample_rows(logits.numpy(), *params, noise))


def host_accept_drafts(fed: Tensor, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    accepted, following = [], []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        same = (fed[begin + 1 : end] == tokens[begin : max(end - 1, begin)]).int().cumprod(0)
        accepted.append(int(same.sum()))
        following.append(int(tokens[begin + accepted[-1]]) if end > begin else 0)
    return torch.tensor(accepted, dtype=torch.int32), torch.tensor(following)


def host_kernels(markov_block: MarkovBlock = markov_block_reference) -> StepKernels:
    return StepKernels(host_fill_budget, host_sample_rows, host_accept_drafts, markov_block)

"""What a kernel is given, on a CPU and in Triton's interpreter alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPS = 1e-6


def norm_inputs(rows: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x and weight in dtype, residual in fp32."""
    generator = torch.Generator().manual_seed(rows * hidden)
    x, residual = 3 * torch.randn(2, rows, hidden, generator=generator)
    return x.to(dtype), residual, (0.5 + torch.rand(hidden, generator=generator)).to(dtype)


@dataclass(frozen=True)
class Projection:
    """The output of a fused q/k/v projection and where its rows go."""

    qkv: Tensor
    positions: NDArray[np.int32] | Tensor
    slots: NDArray[np.int64] | Tensor
    cos: Tensor
    sin: Tensor
    k_cache: Tensor
    v_cache: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None

    def run(self, kernel: Callable[..., Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """q and what copies of the caches hold afterwards."""
        k_cache, v_cache = self.k_cache.clone(), self.v_cache.clone()
        tables = (self.cos, self.sin, k_cache, v_cache, self.q_norm, self.k_norm, EPS)
        return kernel(self.qkv, self.positions, self.slots, *tables), k_cache, v_cache

    def as_float(self) -> Projection:
        wide = replace(self, qkv=self.qkv.float(), k_cache=self.k_cache.float(), v_cache=self.v_cache.float())
        if self.q_norm is None or self.k_norm is None:
            return wide
        return replace(wide, q_norm=self.q_norm.float(), k_norm=self.k_norm.float())

    def row(self, i: int) -> Projection:
        rows = slice(i, i + 1)
        return replace(self, qkv=self.qkv[rows], positions=self.positions[rows], slots=self.slots[rows])

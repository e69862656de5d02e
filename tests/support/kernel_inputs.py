"""What a kernel is given, on a CPU and in Triton's interpreter alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.draft_attention import draft_attention
from dspark.kernels.paged_attention import paged_attention

EPS = 1e-6
BLOCK = 16


def on_tensors(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A device's kernel, which is given tensors where the CPU's are given arrays."""

    def run(*args: Any) -> Tensor:
        return kernel(*(torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in args))

    return run


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


@dataclass(frozen=True)
class Attention:
    """One call: the rows of a flat batch over a cache whose every slot holds something."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: NDArray[np.int32]
    row_starts: NDArray[np.int32]
    first_positions: NDArray[np.int32]
    window: int = 0

    def run(self, kernel: Callable[..., Tensor] = paged_attention) -> Tensor:
        scale = self.q.shape[2] ** -0.5
        cache = (self.k_cache, self.v_cache)
        return kernel(self.q, *cache, self.block_tables, self.row_starts, self.first_positions, scale, self.window)

    def rows_of(self, s: int) -> slice:
        return slice(int(self.row_starts[s]), int(self.row_starts[s + 1]))

    def only(self, s: int) -> Attention:
        """Sequence s as a call of its own."""
        return replace(
            self,
            q=self.q[self.rows_of(s)].contiguous(),
            block_tables=self.block_tables[s : s + 1],
            row_starts=self.row_starts[s : s + 2] - self.row_starts[s],
            first_positions=self.first_positions[s : s + 1],
        )

    def with_unseen(self, key: float, value: float) -> Attention:
        """The same call; slots of the cache that no row sees hold these."""
        used = torch.zeros(self.k_cache.shape[0], BLOCK, dtype=torch.bool)
        for s, first in enumerate(self.first_positions.tolist()):
            rows = int(self.row_starts[s + 1] - self.row_starts[s])
            for position in range(max(0, first - self.window + 1) if self.window else 0, first + rows if rows else 0):
                used[self.block_tables[s, position // BLOCK], position % BLOCK] = True
        return replace(self, **_caches_with_unseen(self.k_cache, self.v_cache, used, key, value))

    def as_float(self) -> Attention:
        return replace(self, q=self.q.float(), k_cache=self.k_cache.float(), v_cache=self.v_cache.float())


def attention(
    heads: int,
    kv_heads: int,
    dim: int,
    pieces: Sequence[tuple[int, int]],
    window: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Attention:
    """Random q, K and V; block tables are a random permutation of the cache, and longer than the sequences need."""
    rng = np.random.default_rng(sum(first + rows for first, rows in pieces))
    generator = torch.Generator().manual_seed(heads * dim)
    width = max((first + rows) // BLOCK + 2 for first, rows in pieces)
    tables = rng.permutation(len(pieces) * width + 3)[: len(pieces) * width].reshape(len(pieces), width)
    rows = [rows for _, rows in pieces]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return Attention(
        q=2 * random(sum(rows), heads, dim),
        k_cache=random(tables.size + 3, kv_heads, dim, BLOCK),
        v_cache=random(tables.size + 3, kv_heads, BLOCK, dim),
        block_tables=tables.astype(np.int32),
        row_starts=np.cumsum([0, *rows], dtype=np.int32),
        first_positions=np.array([first for first, _ in pieces], np.int32),
        window=window,
    )


def piece_of(whole: Attention, first: int, rows: int) -> Attention:
    """The rows at positions first … first+rows-1 of a call that holds one sequence, as a call of their own."""
    at = first - int(whole.first_positions[0])
    return replace(
        whole,
        q=whole.q[at : at + rows].contiguous(),
        row_starts=np.array([0, rows], np.int32),
        first_positions=np.array([first], np.int32),
    )


@dataclass(frozen=True)
class DraftBlocks:
    """One call, over a cache whose every slot holds something."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    scratch_blocks: NDArray[np.int32]
    width: int

    def run(self, kernel: Callable[..., Tensor] = draft_attention) -> Tensor:
        scale = self.q.shape[2] ** -0.5
        tables = (self.block_tables, self.context_lens, self.scratch_blocks)
        return kernel(self.q, self.k_cache, self.v_cache, *tables, self.width, scale)

    def with_unseen(self, key: float, value: float) -> DraftBlocks:
        """The same call; slots of the cache beyond contexts and blocks hold these."""
        used = torch.zeros(self.k_cache.shape[0], BLOCK, dtype=torch.bool)
        for s, length in enumerate(self.context_lens.tolist()):
            used[self.scratch_blocks[s], : self.width] = True
            for position in range(length):
                used[self.block_tables[s, position // BLOCK], position % BLOCK] = True
        return replace(self, **_caches_with_unseen(self.k_cache, self.v_cache, used, key, value))

    def as_float(self) -> DraftBlocks:
        return replace(self, q=self.q.float(), k_cache=self.k_cache.float(), v_cache=self.v_cache.float())

    def only(self, s: int) -> DraftBlocks:
        """Sequence s as a call of its own."""
        return replace(
            self,
            q=self.q[s * self.width : (s + 1) * self.width].contiguous(),
            block_tables=self.block_tables[s : s + 1],
            context_lens=self.context_lens[s : s + 1],
            scratch_blocks=self.scratch_blocks[s : s + 1],
        )


def draft_blocks(
    heads: int, kv_heads: int, dim: int, contexts: Sequence[int], width: int, dtype: torch.dtype = torch.float32
) -> DraftBlocks:
    generator = torch.Generator().manual_seed(heads * dim + width)
    columns = max(contexts) // BLOCK + 2
    blocks = len(contexts) * (columns + 1) + 2
    order = np.random.default_rng(width).permutation(blocks).astype(np.int32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return DraftBlocks(
        q=2 * random(len(contexts) * width, heads, dim),
        k_cache=random(blocks, kv_heads, dim, BLOCK),
        v_cache=random(blocks, kv_heads, BLOCK, dim),
        block_tables=order[: len(contexts) * columns].reshape(len(contexts), columns),
        context_lens=np.array(contexts, np.int32),
        scratch_blocks=order[len(contexts) * columns :][: len(contexts)],
        width=width,
    )


def _caches_with_unseen(k_cache: Tensor, v_cache: Tensor, used: Tensor, key: float, value: float) -> dict[str, Tensor]:
    """used: [blocks, 16] bool."""
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    k_cache.permute(0, 3, 1, 2)[~used] = key
    v_cache.permute(0, 2, 1, 3)[~used] = value
    return {"k_cache": k_cache, "v_cache": v_cache}

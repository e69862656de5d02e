"""Paged attention equals its reference, sees nothing but its own positions, and is row-invariant bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.paged_attention import paged_attention, paged_attention_reference

BLOCK = 16
DTYPES = [torch.float32, torch.bfloat16]
HEAD_SHAPES = [  # heads, kv_heads, dim: one to eight query heads per K/V head, MHA, every head dimension
    (1, 1, 32),
    (4, 2, 64),
    (3, 1, 80),
    (4, 1, 128),
    (5, 1, 48),
    (6, 1, 80),
    (14, 2, 64),
    (8, 1, 16),
    (4, 4, 64),
    (5, 5, 80),
]
PIECES = [  # (first position, rows) of each sequence
    [(0, 1)],
    [(15, 1)],
    [(16, 1)],
    [(17, 1)],
    [(0, 16)],
    [(0, 17)],
    [(14, 5)],
    [(31, 2)],
    [(130, 3)],
    [(0, 1), (15, 1), (16, 3), (17, 7), (100, 1), (0, 33)],
    [(5, 0), (9, 2), (0, 0)],
]
WINDOWS = [0, 1, 5, 16, 17, 40, 1000]


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
    """Rows first … first+rows-1 of a call that holds one sequence from position 0, as a call of their own."""
    return replace(
        whole,
        q=whole.q[first : first + rows].contiguous(),
        row_starts=np.array([0, rows], np.int32),
        first_positions=np.array([first], np.int32),
    )


def assert_equals_reference(case: Attention) -> None:
    out = case.run()
    assert out.dtype == case.q.dtype
    wanted = case.as_float().run(paged_attention_reference)
    half_ulp = 2.0**-8 if case.q.dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(out.float(), wanted, rtol=half_ulp + 1e-5, atol=5e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEAD_SHAPES)
@pytest.mark.parametrize("pieces", PIECES)
def test_equals_the_reference(
    pieces: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> None:
    assert_equals_reference(attention(heads, kv_heads, dim, pieces, dtype=dtype))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 80), (4, 2, 64)])
@pytest.mark.parametrize("pieces", PIECES)
def test_equals_the_reference_under_a_sliding_window(
    pieces: list[tuple[int, int]], heads: int, kv_heads: int, dim: int, window: int
) -> None:
    assert_equals_reference(attention(heads, kv_heads, dim, pieces, window))


def test_a_window_of_one_returns_the_values_of_the_rows_own_position() -> None:
    case = attention(2, 1, 32, [(0, 40)], window=1)
    values = case.v_cache[torch.from_numpy(case.block_tables[0]).long(), 0].reshape(-1, 32)[:40]
    assert torch.equal(case.run(), values[:, None].expand(40, 2, 32))


def test_a_window_larger_than_the_context_changes_nothing() -> None:
    case = attention(4, 2, 64, [(0, 50), (33, 4)])
    assert torch.equal(replace(case, window=1000).run(), case.run())


def test_a_batch_without_sequences_gives_no_rows() -> None:
    case = attention(4, 2, 64, [(0, 0)])
    empty = replace(case, row_starts=np.zeros(1, np.int32), first_positions=np.empty(0, np.int32))
    assert empty.run().shape == (0, 4, 64)


def test_very_unequal_scores_stay_finite() -> None:
    case = attention(2, 1, 32, [(0, 40)])
    case = replace(case, q=case.q * 1e4)
    assert case.run().isfinite().all()
    assert_equals_reference(case)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_slots_that_a_row_must_not_see_have_no_influence(dtype: torch.dtype, window: int) -> None:
    case = attention(6, 2, 80, [(0, 21), (50, 3), (16, 1)], window, dtype)
    used = torch.zeros(case.k_cache.shape[0], BLOCK, dtype=torch.bool)
    for s, first in enumerate(case.first_positions.tolist()):
        rows = int(case.row_starts[s + 1] - case.row_starts[s])
        for position in range(max(0, first - window + 1) if window else 0, first + rows):
            used[case.block_tables[s, position // BLOCK], position % BLOCK] = True
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    k_cache.permute(0, 3, 1, 2)[~used] = 3e37
    v_cache.permute(0, 2, 1, 3)[~used] = -3e37
    assert torch.equal(replace(case, k_cache=k_cache, v_cache=v_cache).run(), case.run())


def test_where_the_blocks_lie_changes_no_bit() -> None:
    case = attention(6, 2, 80, [(0, 21), (50, 3)])
    order = torch.randperm(case.k_cache.shape[0], generator=torch.Generator().manual_seed(1))
    moved = torch.argsort(order).numpy().astype(np.int32)[case.block_tables]
    elsewhere = replace(case, k_cache=case.k_cache[order], v_cache=case.v_cache[order], block_tables=moved)
    assert torch.equal(elsewhere.run(), case.run())


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 80), (2, 2, 32), (8, 1, 128), (10, 2, 64)])
def test_a_row_alone_equals_the_same_row_of_a_whole_prefill(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int
) -> None:
    whole = attention(heads, kv_heads, dim, [(0, 70)], window, dtype)
    alone = torch.cat([piece_of(whole, position, 1).run() for position in range(70)])
    assert torch.equal(alone, whole.run())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("window", [0, 5, 24])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_split_of_a_prompt_into_chunks_gives_the_same_rows(dtype: torch.dtype, window: int, seed: int) -> None:
    whole = attention(3, 1, 64, [(0, 150)], window, dtype)
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, 150), size=2 + 4 * seed, replace=False)).tolist()
    chunks = [piece_of(whole, a, b - a).run() for a, b in zip([0, *cuts], [*cuts, 150], strict=True)]
    assert torch.equal(torch.cat(chunks), whole.run())


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 80), (4, 4, 32), (14, 2, 64)])
def test_other_sequences_of_the_batch_change_no_bit(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int
) -> None:
    pieces = [(0, 23), (47, 1), (16, 8), (15, 1), (0, 3), (90, 6)]
    batch = attention(heads, kv_heads, dim, pieces, window, dtype)
    together = batch.run()
    for s in range(len(pieces)):
        rows = slice(int(batch.row_starts[s]), int(batch.row_starts[s + 1]))
        alone = replace(
            batch,
            q=batch.q[rows].contiguous(),
            block_tables=batch.block_tables[s : s + 1],
            row_starts=batch.row_starts[s : s + 2] - batch.row_starts[s],
            first_positions=batch.first_positions[s : s + 1],
        )
        assert torch.equal(alone.run(), together[rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    case = attention(6, 2, 80, PIECES[-2], 20, dtype)
    set_threads(1)
    one = case.run()
    set_threads(2)
    assert torch.equal(case.run(), one)

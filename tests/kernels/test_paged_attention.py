"""Paged attention equals its reference, sees nothing but its own positions, and is row-invariant bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_inputs import Attention, attention, piece_of

from dspark.kernels.paged_attention import paged_attention_reference

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
    assert torch.equal(case.with_unseen(3e37, -3e37).run(), case.run())


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
        assert torch.equal(batch.only(s).run(), together[batch.rows_of(s)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    case = attention(6, 2, 80, PIECES[-2], 20, dtype)
    set_threads(1)
    one = case.run()
    set_threads(2)
    assert torch.equal(case.run(), one)

"""Paged attention on the device equals its reference, sees its own positions only, and is row-invariant bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_inputs import Attention, attention, on_tensors, piece_of
from torch import Tensor

from dspark.kernels.gpu import paged_attention as kernels
from dspark.kernels.gpu.paged_attention import bytes_moved, paged_attention
from dspark.kernels.paged_attention import paged_attention_reference

EDGES = [(0, 1), (15, 1), (16, 3), (14, 4), (5, 0), (100, 1), (0, 17), (0, 0)]
LONG = [(63, 1), (64, 1), (62, 4), (200, 2), (57, 13), (3, 0), (100, 12)]
SLOT_BYTES = 4 * 3 * (80 + 2)

pytestmark = pytest.mark.usefixtures("nan_filled")


def run(case: Attention) -> Tensor:
    """The kernel's answer, given a cache without a number wherever no row looks."""
    return case.with_unseen(torch.nan, torch.nan).run(on_tensors(paged_attention))


def assert_equals_reference(case: Attention) -> None:
    out = run(case)
    assert out.dtype == case.q.dtype
    wanted = case.as_float().run(paged_attention_reference)
    # weights are rounded to the values' dtype too
    rtol, atol = (2.0**-10, 2.0**-10) if case.q.dtype == torch.float16 else (1e-5, 5e-6)
    torch.testing.assert_close(out.float(), wanted, rtol=rtol, atol=atol)


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (1, 1, 16, torch.float32),
        (6, 2, 64, torch.float16),
        (6, 1, 80, torch.float32),
        (8, 1, 128, torch.float16),
        (4, 4, 96, torch.float32),
        (5, 1, 256, torch.float16),
    ],
)
def test_equals_the_reference_at_the_edges_of_blocks(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    assert_equals_reference(attention(heads, kv_heads, dim, EDGES, dtype=dtype))


def parted(pieces: Sequence[tuple[int, int]], group: int) -> list[bool]:
    """Of the sequences of several splits: whether a row's splits are computed one by one and folded afterwards."""
    return [rows * group <= kernels.PARTED for first, rows in pieces if rows and (first + rows - 1) // kernels.SPLIT]


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype", "window"),
    [
        (6, 2, 64, torch.float16, 0),
        (8, 1, 80, torch.float16, 100),
        (3, 1, 128, torch.float32, 100),
        (3, 1, 256, torch.float32, 0),
    ],
)
def test_equals_the_reference_over_several_splits(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, window: int
) -> None:
    assert set(parted(LONG, heads // kv_heads)) == {True, False}
    assert_equals_reference(attention(heads, kv_heads, dim, LONG, window, dtype))


def test_equals_the_reference_at_the_edges_of_the_real_splits() -> None:
    assert_equals_reference(attention(2, 1, 64, [(511, 1), (510, 4), (1030, 2)]))


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize("window", [1, 17, 64, 1000])
def test_equals_the_reference_under_a_sliding_window(window: int) -> None:
    assert_equals_reference(attention(3, 1, 64, [(130, 3), (15, 2), (56, 13)], window))


def test_a_window_of_one_returns_the_values_of_the_rows_own_position() -> None:
    case = attention(2, 1, 32, [(0, 40)], window=1)
    values = case.v_cache[torch.from_numpy(case.block_tables[0]).long(), 0].reshape(-1, 32)[:40]
    assert torch.equal(run(case), values[:, None].expand(40, 2, 32))


def test_very_unequal_scores_stay_finite() -> None:
    case = attention(2, 1, 32, [(0, 40)])
    assert_equals_reference(replace(case, q=case.q * 1e4))


@pytest.mark.usefixtures("small_splits")
def test_padding_rows_are_neither_read_nor_written() -> None:
    case = attention(9, 3, 64, [(70, 5), (0, 3), (0, 0)])
    padded = replace(case, q=torch.cat([case.q, torch.full((7, 9, 64), torch.nan)]))
    out = run(padded)
    assert torch.equal(out[:8], run(case))
    assert out[8:].isnan().all()


@pytest.mark.parametrize("pieces", [[], [(0, 0), (30, 0)]])
def test_a_batch_without_rows_gives_none(pieces: list[tuple[int, int]]) -> None:
    case = attention(4, 2, 64, pieces or [(0, 0)])
    starts, firsts = np.zeros(len(pieces) + 1, np.int32), np.zeros(len(pieces), np.int32)
    empty = replace(case, row_starts=starts, first_positions=firsts)
    assert run(empty).shape == (0, 4, 64)
    assert run(replace(empty, q=torch.full((3, 4, 64), torch.nan))).isnan().all()


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROGRAMS", 1),
        ("LOOKUP", 4),
        ("SCRATCH_BYTES", SLOT_BYTES * 8),
    ],
)
def test_how_the_work_is_shared_out_changes_no_bit(name: str, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = attention(3, 1, 80, LONG)
    expected = run(case)
    monkeypatch.setattr(kernels, name, value)
    assert torch.equal(run(case), expected)


@pytest.mark.usefixtures("small_splits", "products_row_by_row")
@pytest.mark.parametrize(("window", "dtype"), [(0, torch.float16), (70, torch.float32)])
def test_a_row_has_the_same_bits_alone_in_a_verify_block_in_a_chunk_and_in_a_crowd(
    window: int, dtype: torch.dtype
) -> None:
    crowd = attention(3, 1, 80, [(3, 2), (60, 56), (100, 5)], window, dtype)
    whole = crowd.only(1)
    prefill = run(whole)
    assert torch.equal(run(crowd)[2:58], prefill)
    pieces = [(90, 14), (104, 6), (110, 3), (113, 1), (114, 1), (115, 1)]
    assert parted([(60, 56), *pieces], 3) == [False, False, *[True] * 5]
    cut = torch.cat([run(piece_of(whole, first, rows)) for first, rows in pieces])
    assert torch.equal(cut, prefill[30:])


@pytest.mark.usefixtures("small_splits")
def test_other_sequences_change_no_bit() -> None:
    crowd = attention(4, 1, 64, LONG, dtype=torch.float16)
    alone = torch.cat([run(crowd.only(s)) for s in range(len(LONG))])
    assert torch.equal(run(crowd), alone)


def test_bytes_moved_counts_what_is_seen() -> None:
    one_row = 2 * 64 * 2 * 8
    assert bytes_moved([(99, 1), (7, 0)], 8, 2, 64, 2) == one_row + 2 * 64 * 2 * 2 * 100
    assert bytes_moved([(99, 1)], 8, 2, 64, 2, window=10) == one_row + 2 * 64 * 2 * 2 * 10

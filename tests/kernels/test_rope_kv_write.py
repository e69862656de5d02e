"""QK-norm, rotation and the cache write equal their reference, touch the named slots only, and no row sees another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_inputs import Projection
from torch import Tensor

from dspark.kernels.rope_kv_write import rope_kv_write, rope_kv_write_reference

BLOCK = 16
NUM_BLOCKS = 9
DTYPES = [torch.float32, torch.bfloat16]
HEAD_SHAPES = [(1, 1, 32), (4, 2, 64), (3, 1, 80), (8, 1, 128), (5, 5, 48)]
POSITIONS = [[0], [15], [16], [17], [0, 15, 16, 17, 99, 3, 3]]


def projection(
    heads: int, kv_heads: int, dim: int, positions: list[int], dtype: torch.dtype, norms: bool = True
) -> Projection:
    generator = torch.Generator().manual_seed(heads * dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    slots = np.random.default_rng(dim).permutation(NUM_BLOCKS * BLOCK)[: len(positions)]
    angles = torch.arange(100)[:, None] / 100 ** (torch.arange(dim // 2) / (dim // 2))
    return Projection(
        qkv=random(len(positions), (heads + 2 * kv_heads) * dim),
        positions=np.array(positions, np.int32),
        slots=slots.astype(np.int64),
        cos=angles.cos().float(),
        sin=angles.sin().float(),
        k_cache=random(NUM_BLOCKS, kv_heads, dim, BLOCK),
        v_cache=random(NUM_BLOCKS, kv_heads, BLOCK, dim),
        q_norm=random(dim).abs() if norms else None,
        k_norm=random(dim).abs() if norms else None,
    )


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEAD_SHAPES)
def test_equals_the_reference(
    heads: int, kv_heads: int, dim: int, positions: list[int], dtype: torch.dtype, norms: bool
) -> None:
    case = projection(heads, kv_heads, dim, positions, dtype, norms)
    q, k_cache, v_cache = case.run(rope_kv_write)
    wanted_q, wanted_k, wanted_v = case.as_float().run(rope_kv_write_reference)
    rtol = (2.0**-8 if dtype == torch.bfloat16 else 0.0) + 1e-5
    assert q.dtype == dtype
    torch.testing.assert_close(q.float(), wanted_q, rtol=rtol, atol=2e-6)
    torch.testing.assert_close(k_cache.float(), wanted_k, rtol=rtol, atol=2e-6)
    assert torch.equal(v_cache.float(), wanted_v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_writes_the_named_slots_and_no_other(dtype: torch.dtype) -> None:
    case = projection(4, 2, 64, POSITIONS[-1], dtype)
    _, k_cache, v_cache = case.run(rope_kv_write)
    named = torch.zeros(NUM_BLOCKS * BLOCK, dtype=torch.bool)
    named[torch.from_numpy(case.slots)] = True
    k_changed = (k_cache != case.k_cache).permute(0, 3, 1, 2).reshape(NUM_BLOCKS * BLOCK, -1)
    v_changed = (v_cache != case.v_cache).permute(0, 2, 1, 3).reshape(NUM_BLOCKS * BLOCK, -1)
    assert torch.equal(k_changed.any(dim=1), named)
    assert torch.equal(v_changed.any(dim=1), named)


@pytest.mark.parametrize("dtype", DTYPES)
def test_position_zero_rotates_nothing(dtype: torch.dtype) -> None:
    case = projection(3, 1, 32, [0], dtype, norms=False)
    q, k_cache, _ = case.run(rope_kv_write)
    block, offset = divmod(int(case.slots[0]), BLOCK)
    assert torch.equal(q.flatten(), case.qkv[0, : 3 * 32])
    assert torch.equal(k_cache[block, 0, :, offset], case.qkv[0, 3 * 32 : 4 * 32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_query_heads_only_the_caches_are_written(dtype: torch.dtype) -> None:
    case = projection(4, 2, 64, POSITIONS[-1], dtype)
    _, k_cache, v_cache = case.run(rope_kv_write)
    context_only = replace(case, qkv=case.qkv[:, 4 * 64 :].contiguous(), q_norm=None)
    q, k_again, v_again = context_only.run(rope_kv_write)
    assert q.shape == (7, 0, 64)
    assert torch.equal(k_again, k_cache)
    assert torch.equal(v_again, v_cache)


def test_no_rows_write_nothing() -> None:
    case = projection(4, 2, 64, [0], torch.float32)
    q, k_cache, _ = replace(case, qkv=case.qkv[:0], positions=case.positions[:0], slots=case.slots[:0]).run(
        rope_kv_write
    )
    assert q.shape == (0, 4, 64)
    assert torch.equal(k_cache, case.k_cache)


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEAD_SHAPES)
def test_rows_written_one_by_one_have_the_bits_of_rows_written_together(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, norms: bool
) -> None:
    case = projection(heads, kv_heads, dim, POSITIONS[-1], dtype, norms)
    q, k_cache, v_cache = case.run(rope_kv_write)
    alone, k_alone, v_alone = [], case.k_cache, case.v_cache
    for i in range(len(case.positions)):
        one_q, k_alone, v_alone = replace(case.row(i), k_cache=k_alone, v_cache=v_alone).run(rope_kv_write)
        alone.append(one_q)
    assert torch.equal(torch.cat(alone), q)
    assert torch.equal(k_alone, k_cache)
    assert torch.equal(v_alone, v_cache)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    case = projection(4, 2, 64, POSITIONS[-1], dtype)
    set_threads(1)
    one = case.run(rope_kv_write)
    set_threads(2)
    assert all(torch.equal(a, b) for a, b in zip(one, case.run(rope_kv_write), strict=True))

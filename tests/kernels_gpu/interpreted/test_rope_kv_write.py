"""QK-norm, rotation and the cache write equal their reference, touch the named slots only, and no row sees another."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_inputs import Projection
from torch import Tensor

from dspark.kernels.gpu.rope_kv_write import rope_kv_write
from dspark.kernels.rope_kv_write import rope_kv_write_reference

BLOCK = 16
NUM_BLOCKS = 9
EDGES = [0, 15, 16, 17, 99, 3, 3]
EDGE_SLOTS = [0, 15, 16, 31, 32, NUM_BLOCKS * BLOCK - 1, 77]

pytestmark = pytest.mark.usefixtures("nan_filled")


def projection(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, norms: bool = True) -> Projection:
    """Rows at the edges of blocks, some neighbours in one block; what the cache holds already is not a number."""
    generator = torch.Generator().manual_seed(heads * dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.arange(100)[:, None] / 100 ** (torch.arange(dim // 2) / (dim // 2))
    return Projection(
        qkv=random(len(EDGES), (heads + 2 * kv_heads) * dim),
        positions=torch.tensor(EDGES, dtype=torch.int32),
        slots=torch.tensor(EDGE_SLOTS),
        cos=angles.cos().float(),
        sin=angles.sin().float(),
        k_cache=torch.full((NUM_BLOCKS, kv_heads, dim, BLOCK), torch.nan, dtype=dtype),
        v_cache=torch.full((NUM_BLOCKS, kv_heads, BLOCK, dim), torch.nan, dtype=dtype),
        q_norm=random(dim).abs() if norms else None,
        k_norm=random(dim).abs() if norms else None,
    )


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "dtype"),
    [
        (1, 1, 32, torch.float32),
        (9, 3, 64, torch.float16),
        (6, 1, 80, torch.float32),
        (16, 2, 128, torch.float16),
        (5, 5, 96, torch.float16),
        (4, 1, 256, torch.float32),
    ],
)
def test_equals_the_reference_and_writes_no_other_slot(
    heads: int, kv_heads: int, dim: int, dtype: torch.dtype, norms: bool
) -> None:
    case = projection(heads, kv_heads, dim, dtype, norms)
    q, k_cache, v_cache = case.run(rope_kv_write)
    wanted_q, wanted_k, wanted_v = case.as_float().run(rope_kv_write_reference)
    rtol = (2.0**-11 if dtype == torch.float16 else 0.0) + 1e-5
    assert q.dtype == dtype
    torch.testing.assert_close(q.float(), wanted_q, rtol=rtol, atol=2e-6)
    torch.testing.assert_close(k_cache.float(), wanted_k, rtol=rtol, atol=2e-6, equal_nan=True)
    torch.testing.assert_close(v_cache.float(), wanted_v, rtol=0, atol=0, equal_nan=True)
    assert wanted_k.isnan().sum() == (NUM_BLOCKS * BLOCK - len(EDGES)) * kv_heads * dim


def test_position_zero_rotates_nothing() -> None:
    case = projection(3, 1, 32, torch.float16, norms=False).row(0)
    q, k_cache, _ = case.run(rope_kv_write)
    assert torch.equal(q.flatten(), case.qkv[0, : 3 * 32])
    assert torch.equal(k_cache[0, 0, :, 0], case.qkv[0, 3 * 32 : 4 * 32])


@pytest.mark.parametrize("norms", [True, False])
def test_without_query_heads_only_the_caches_are_written(norms: bool) -> None:
    case = projection(4, 2, 64, torch.float16, norms)
    _, k_cache, v_cache = case.run(rope_kv_write)
    context_only = replace(case, qkv=case.qkv[:, 4 * 64 :].contiguous(), q_norm=None)
    q, k_again, v_again = context_only.run(rope_kv_write)
    assert q.shape == (7, 0, 64)
    torch.testing.assert_close(k_again, k_cache, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_again, v_cache, rtol=0, atol=0, equal_nan=True)


def test_no_rows_write_nothing() -> None:
    case = projection(4, 2, 64, torch.float32)
    q, k_cache, _ = replace(case, qkv=case.qkv[:0], positions=case.positions[:0], slots=case.slots[:0]).run(
        rope_kv_write
    )
    assert q.shape == (0, 4, 64)
    assert k_cache.isnan().all()


def test_rows_written_one_by_one_have_the_bits_of_rows_written_together() -> None:
    case = projection(9, 3, 80, torch.float16)
    q, k_cache, v_cache = case.run(rope_kv_write)
    alone, k_alone, v_alone = [], case.k_cache, case.v_cache
    for i in range(len(EDGES)):
        one_q, k_alone, v_alone = replace(case.row(i), k_cache=k_alone, v_cache=v_alone).run(rope_kv_write)
        alone.append(one_q)
    assert torch.equal(torch.cat(alone), q)
    torch.testing.assert_close(k_alone, k_cache, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_alone, v_cache, rtol=0, atol=0, equal_nan=True)

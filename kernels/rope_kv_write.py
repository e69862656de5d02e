"""Per-head QK-norm, rotary embedding, and the write of K and V into the paged cache, in one pass.

    qkv: [rows, (heads + 2·kv_heads)·dim]   q, then k, then v; heads may be 0: only K and V (context injection)
    positions: [rows] int32                 absolute positions: rows of the rotary tables
    slots: [rows] int64                     block id · block_size + offset in the block
    cos, sin: [max_len, dim/2] float32      half-split ("neox") pairs (j, j + dim/2)
    q_norm, k_norm: [dim] or None           RMSNorm over each head before the rotation (Qwen3)
    k_cache: [blocks, kv_heads, dim, block_size], v_cache: [blocks, kv_heads, block_size, dim]
    → q: [rows, heads, dim]; the caches are written in place

Moves 2·rows·(heads + 2·kv_heads)·dim elements: memory bound. fp32 inside, one rounding at the end.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from dspark.kernels.cpu import cpu_kernel, inner, like, view
from dspark.kernels.rms_norm import norm_scale, rms_norm_reference
from dspark.kernels.simd import LANES, store_as, to_float


def rope_kv_write_reference(
    qkv: torch.Tensor,
    positions: NDArray[np.int32] | torch.Tensor,
    slots: NDArray[np.int64] | torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """The same in plain PyTorch."""
    rows = qkv.shape[0]
    kv_heads, dim, block_size = k_cache.shape[1:]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    q, k, v = qkv.reshape(rows, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
    at = torch.as_tensor(positions).long()
    c, s = cos[at][:, None], sin[at][:, None]

    def rotate(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        wide = x.float() if weight is None else rms_norm_reference(x.float(), weight.float(), eps)
        low, high = wide.chunk(2, dim=-1)
        return torch.cat((low * c - high * s, high * c + low * s), dim=-1).to(x.dtype)

    block, offset = torch.as_tensor(slots) // block_size, torch.as_tensor(slots) % block_size
    k_cache[block, :, :, offset] = rotate(k, k_norm)
    v_cache[block, :, offset] = v
    return rotate(q, q_norm)


@inner
def _rotated(source, norm, cos, sin, eps, values, squares, rotated):
    """Norm (when `norm` is not empty) and rotate one head of `source` into the float32 vector `rotated`."""
    half = values.size // 2
    for i in range(values.size):
        values[i] = to_float(source[i])
    if norm.size > 0:
        scale = norm_scale(values, squares, eps)
        for i in range(values.size):
            values[i] = values[i] * scale * to_float(norm[i])
    for i in range(half):
        rotated[i] = values[i] * cos[i] - values[i + half] * sin[i]
    for i in range(half):
        rotated[i + half] = values[i + half] * cos[i] + values[i] * sin[i]


def _rope_kv_write(
    like,
    qkv_address,
    positions,
    slots,
    table_like,
    cos_address,
    sin_address,
    table_size,
    k_cache_address,
    v_cache_address,
    cache_size,
    q_norm_address,
    k_norm_address,
    eps,
    rows,
    heads,
    kv_heads,
    dim,
    out_address,
):
    half = dim // 2
    width = (heads + 2 * kv_heads) * dim
    qkv = view(qkv_address, rows * width, like)
    cos = view(cos_address, table_size, table_like)
    sin = view(sin_address, table_size, table_like)
    k_cache = view(k_cache_address, cache_size, like)
    v_cache = view(v_cache_address, cache_size, like)
    q_norm = view(q_norm_address, dim if q_norm_address != 0 else 0, like)
    k_norm = view(k_norm_address, dim if k_norm_address != 0 else 0, like)
    out = view(out_address, rows * heads * dim, like)
    for row in numba.prange(rows):
        values = np.empty(dim, np.float32)
        squares = np.empty(dim, np.float32)
        rotated = np.empty(dim, np.float32)
        angle = np.int64(positions[row]) * half
        row_cos = cos[angle : angle + half]
        row_sin = sin[angle : angle + half]
        for head in range(heads):
            source = qkv[row * width + head * dim : row * width + (head + 1) * dim]
            target = out[(row * heads + head) * dim : (row * heads + head + 1) * dim]
            _rotated(source, q_norm, row_cos, row_sin, eps, values, squares, rotated)
            for i in range(dim):
                store_as(target, i, rotated[i])
        block = slots[row] // LANES
        offset = slots[row] % LANES
        for head in range(kv_heads):
            start = row * width + (heads + head) * dim
            _rotated(qkv[start : start + dim], k_norm, row_cos, row_sin, eps, values, squares, rotated)
            base = (block * kv_heads + head) * dim * LANES
            for i in range(dim):
                store_as(k_cache, base + i * LANES + offset, rotated[i])
            start += kv_heads * dim
            target = v_cache[base + offset * dim : base + (offset + 1) * dim]
            for i in range(dim):
                target[i] = qkv[start + i]


_kernel = cpu_kernel(_rope_kv_write)


def rope_kv_write(
    qkv: torch.Tensor,
    positions: NDArray[np.int32],
    slots: NDArray[np.int64],
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Launch on the CPU; dim must be a multiple of 16 with norms and of 2 without, the block size 16."""
    rows = qkv.shape[0]
    kv_heads, dim = k_cache.shape[1:3]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    out = torch.empty((rows, heads, dim), dtype=qkv.dtype)
    _kernel(
        like(qkv),
        qkv.data_ptr(),
        positions,
        slots,
        like(cos),
        cos.data_ptr(),
        sin.data_ptr(),
        cos.numel(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.numel(),
        0 if q_norm is None else q_norm.data_ptr(),
        0 if k_norm is None else k_norm.data_ptr(),
        np.float32(eps),
        rows,
        heads,
        kv_heads,
        dim,
        out.data_ptr(),
    )
    return out

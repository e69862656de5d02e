"""Per-head QK-norm, rotary embedding, and the write of K and V into the paged cache, on the device.

What `kernels/rope_kv_write.py` computes, with its shapes; positions and slots are tensors, [rows] int32 and int64.

A program computes HEADS neighbouring heads of one row, whichever of q, k and v they are: it holds the two halves of each
(padded to a power of two), norms and rotates them all, and writes each where its kind goes, v as it came. A row's
result depends on nothing but its own numbers, a head's sum is added in an order that only `dim` decides.

Moves `bytes_moved`: memory bound. K goes to 16-element columns of the cache: neighbouring rows of a prompt fill the same
32 bytes, which meet in L2. Slots must differ from row to row, but for padding rows, whose block nobody reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.language import jit, tl

BLOCK = 16
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
_HEADS = {64: 8, 128: 4}
"""Heads of a program, by the half head dimension that is computed; others are masked up to the next."""


@jit
def _weight(q_norm, k_norm, of_k, at, exists):
    """[HEADS, HALF]: each head's norm weights `at`, by its kind."""
    of_q_heads = tl.load(q_norm + at, mask=exists, other=0.0).to(tl.float32)[None, :]
    of_k_heads = tl.load(k_norm + at, mask=exists, other=0.0).to(tl.float32)[None, :]
    return tl.where(of_k, of_k_heads, of_q_heads)


@jit
def _rope_kv_write(
    qkv,
    positions,
    slots,
    cos,
    sin,
    k_cache,
    v_cache,
    q_norm,
    k_norm,
    out,
    eps,
    heads,
    kv_heads,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, j = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, HALF)
    all_heads, dim = heads + 2 * kv_heads, 2 * half
    exists = (head < all_heads)[:, None] & (j < half)[None, :]
    of_k = ((head >= heads) & (head < heads + kv_heads))[:, None]
    at = qkv + (row * all_heads + head)[:, None] * dim + j[None, :]
    raw_low = tl.load(at, mask=exists, other=0.0)
    raw_high = tl.load(at + half, mask=exists, other=0.0)
    low, high = raw_low.to(tl.float32), raw_high.to(tl.float32)
    if k_norm is not None:
        mean = tl.div_rn(tl.sum(low * low, axis=1) + tl.sum(high * high, axis=1), dim.to(tl.float32))
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))[:, None]
        low = low * scale * _weight(q_norm, k_norm, of_k, j, j < half)
        high = high * scale * _weight(q_norm, k_norm, of_k, half + j, j < half)
    angle = tl.load(positions + row).to(tl.int64) * half + j
    c = tl.load(cos + angle, mask=j < half, other=0.0)[None, :]
    s = tl.load(sin + angle, mask=j < half, other=0.0)[None, :]
    element = out.dtype.element_ty
    rotated_low, rotated_high = (low * c - high * s).to(element), (high * c + low * s).to(element)

    to_q = out + (row * heads + head)[:, None] * dim + j[None, :]
    of_q = exists & (head < heads)[:, None]
    tl.store(to_q, rotated_low, mask=of_q)
    tl.store(to_q + half, rotated_high, mask=of_q)

    slot = tl.load(slots + row)
    first, offset = slot // BLOCK * kv_heads, slot % BLOCK
    to_k = k_cache + ((first + head - heads)[:, None] * dim + j[None, :]) * BLOCK + offset
    tl.store(to_k, rotated_low, mask=exists & of_k)
    tl.store(to_k + half * BLOCK, rotated_high, mask=exists & of_k)

    of_v = exists & (head >= heads + kv_heads)[:, None]
    to_v = v_cache + ((first + head - heads - kv_heads) * BLOCK + offset)[:, None] * dim + j[None, :]
    tl.store(to_v, raw_low, mask=of_v)
    tl.store(to_v + half, raw_high, mask=of_v)


def _tile(half: int) -> dict[str, int]:
    padded = next(one for one in _HEADS if one >= half)
    return {"HEADS": _HEADS[padded], "HALF": padded, "BLOCK": BLOCK}


def configurations() -> list[Configuration]:
    signature = dict.fromkeys(("qkv", "k_cache", "v_cache", "out"), "*bf16")
    signature |= {"positions": "*i32", "slots": "*i64", "cos": "*fp32", "sin": "*fp32"}
    signature |= {"eps": "fp32", "heads": "i32", "kv_heads": "i32", "half": "i32"}
    return [
        Configuration(_rope_kv_write, signature | norms, _tile(half), **_OPTIONS)
        for norms in ({}, {"q_norm": "*bf16", "k_norm": "*bf16"})
        for half in _HEADS
    ]


def bytes_moved(rows: int, heads: int, kv_heads: int, dim: int, element: int) -> int:
    """Every head once in and once out, and each row's rotation, position and slot."""
    return rows * (2 * (heads + 2 * kv_heads) * dim * element + 4 * dim + 12)


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
) -> Tensor:
    """Launch; dim must be even and at most 256, the block size 16. Both norms or none, but without q heads k_norm alone."""
    rows = qkv.shape[0]
    kv_heads, dim = k_cache.shape[1:3]
    heads = qkv.shape[1] // dim - 2 * kv_heads
    if not heads:
        q_norm = k_norm
    assert (q_norm is None) == (k_norm is None)
    out = torch.empty((rows, heads, dim), dtype=qkv.dtype, device=qkv.device)
    if rows:
        half, tile = dim // 2, _tile(dim // 2)
        _rope_kv_write[rows, -(-(heads + 2 * kv_heads) // tile["HEADS"])](
            qkv,
            positions,
            slots,
            cos,
            sin,
            k_cache,
            v_cache,
            q_norm,
            k_norm,
            out,
            eps,
            heads,
            kv_heads,
            half,
            **tile,
            **_OPTIONS,
        )
    return out

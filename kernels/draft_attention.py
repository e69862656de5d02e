"""Attention of draft blocks: each slot sees the whole target context and, both ways, its whole block.

    q: [sequences·width, heads, dim]        the blocks one after another, rotary embedding applied
    k_cache, v_cache: the drafter's paged context cache, laid out as in paged_attention.py
    block_tables: [sequences, max_blocks] int32;   context_lens: [sequences] int32, context positions 0 … len-1
    scratch_blocks: [sequences] int32       the cache block of the draft block's own K and V, at offsets 0 … width-1
    → [sequences·width, heads, dim]

`width` ≤ 16. Reads each context block once per four query vectors. Source: DSpark, section 3 (no mask at all).
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from dspark.kernels.cpu import cpu_kernel, like, view
from dspark.kernels.paged_attention import add_values, load_queries, store_tile
from dspark.kernels.simd import LANES, TILE, exp_below, highest_of, score_tile, sum_of


def draft_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    scratch_blocks: NDArray[np.int32],
    width: int,
    scale: float,
) -> torch.Tensor:
    """The same in plain PyTorch, fp32 inside, one sequence at a time."""
    _, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    out = torch.empty_like(q)
    for s, length in enumerate(context_lens.tolist()):
        table = torch.from_numpy(block_tables[s]).long()
        scratch = int(scratch_blocks[s])
        keys = k_cache[table].permute(1, 0, 3, 2).reshape(kv_heads, -1, dim)[:, :length]
        keys = torch.cat((keys, k_cache[scratch].transpose(1, 2)[:, :width]), dim=1).float()
        values = v_cache[table].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :length]
        values = torch.cat((values, v_cache[scratch][:, :width]), dim=1).float()
        keys = keys.repeat_interleave(heads // kv_heads, dim=0)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
        block = slice(s * width, (s + 1) * width)
        weights = (torch.einsum("rhd,hpd->hrp", q[block].float(), keys) * scale).softmax(-1)
        out[block] = torch.einsum("hrp,hpd->rhd", weights, values).to(q.dtype)
    return out


def _draft_attention(
    like,
    q_address,
    k_cache_address,
    v_cache_address,
    cache_size,
    block_tables,
    context_lens,
    scratch_blocks,
    width,
    scale,
    rows,
    heads,
    kv_heads,
    dim,
    out_address,
):
    group = heads // kv_heads
    q = view(q_address, rows * heads * dim, like)
    k_cache = view(k_cache_address, cache_size, like)
    v_cache = view(v_cache_address, cache_size, like)
    out = view(out_address, rows * heads * dim, like)
    count = width * group
    tiles = (count + TILE - 1) // TILE
    block_elements = dim * LANES
    for task in numba.prange(context_lens.size * kv_heads * tiles):
        s = task // (kv_heads * tiles)
        kv_head = task // tiles % kv_heads
        first_vector = task % tiles * TILE
        context_blocks = (context_lens[s] + LANES - 1) // LANES
        length = (context_blocks + 1) * LANES
        queries = np.empty(dim * TILE, np.float32)
        scores = np.empty(TILE * length, np.float32)
        sums = np.zeros(TILE * dim, np.float32)
        weights = np.empty(TILE, np.float32)
        load_queries(q, queries, scale, first_vector, count, group, heads, kv_head, s * width, dim)
        for block in range(context_blocks + 1):
            page = np.int64(block_tables[s, block] if block < context_blocks else scratch_blocks[s])
            offset = (page * kv_heads + kv_head) * block_elements
            score_tile(queries, k_cache, offset, scores, block * LANES, length, dim)
        for m in range(TILE):
            row = scores[m * length : (m + 1) * length]
            row[context_lens[s] : context_blocks * LANES] = np.float32(-np.inf)
            row[context_blocks * LANES + width :] = np.float32(-np.inf)
            highest = highest_of(row, 0, length)
            exp_below(row, 0, length, highest)
            weights[m] = sum_of(row, 0, length)
        for block in range(context_blocks + 1):
            page = np.int64(block_tables[s, block] if block < context_blocks else scratch_blocks[s])
            offset = (page * kv_heads + kv_head) * block_elements
            add_values(scores, block * LANES, length, v_cache, offset, sums, dim)
        store_tile(out, sums, weights, first_vector, count, group, heads, kv_head, s * width, dim)


_kernel = cpu_kernel(_draft_attention)


def draft_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: NDArray[np.int32],
    context_lens: NDArray[np.int32],
    scratch_blocks: NDArray[np.int32],
    width: int,
    scale: float,
) -> torch.Tensor:
    """Launch on the CPU; the head dimension must be a multiple of 16 and the block size 16."""
    rows, heads, dim = q.shape
    out = torch.empty_like(q)
    _kernel(
        like(q),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        k_cache.numel(),
        block_tables,
        context_lens,
        scratch_blocks,
        width,
        np.float32(scale),
        rows,
        heads,
        k_cache.shape[1],
        dim,
        out.data_ptr(),
    )
    return out

"""Causal attention of a flat batch over the paged K/V cache.

    q: [rows, heads, dim]         rows of all sequences one after another, rotary embedding applied
    k_cache: [blocks, kv_heads, dim, block_size]      keys lie along the lanes: a score needs no horizontal sum
    v_cache: [blocks, kv_heads, block_size, dim]
    block_tables: [sequences, max_blocks] int32
    row_starts: [sequences + 1] int32                 rows of sequence s: row_starts[s] … row_starts[s+1]-1
    first_positions: [sequences] int32                absolute position of a sequence's first row
    → [rows, heads, dim]

A row at position p attends to positions max(0, p - window + 1) … p (window 0: from 0). Reads each K/V block of a
sequence once per four query vectors (row × head of its KV group): 2·positions·dim elements per KV head and tile.

Row invariance (a row's result does not depend on the batch): scores, the sum of weights and the weighted sum of values
run over blocks of 16 positions from position 0, each in one fixed order; a masked position has weight exactly 0.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from dspark.kernels.cpu import cpu_kernel, inner, like, view
from dspark.kernels.simd import (
    LANES,
    TILE,
    WIDE,
    exp_below,
    highest_of,
    score_tile,
    store_as,
    sum_of,
    to_float,
    value_tile,
    wide_value_tile,
)


def paged_attention_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: NDArray[np.int32],
    row_starts: NDArray[np.int32],
    first_positions: NDArray[np.int32],
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """The same in plain PyTorch, fp32 inside, one sequence at a time."""
    _, heads, dim = q.shape
    kv_heads = k_cache.shape[1]
    out = torch.empty_like(q)
    for s in range(len(first_positions)):
        begin, end = int(row_starts[s]), int(row_starts[s + 1])
        positions = int(first_positions[s]) + torch.arange(end - begin)
        length = int(first_positions[s]) + end - begin
        table = torch.from_numpy(block_tables[s]).long()
        keys = k_cache[table].permute(1, 0, 3, 2).reshape(kv_heads, -1, dim)[:, :length].float()
        values = v_cache[table].transpose(0, 1).reshape(kv_heads, -1, dim)[:, :length].float()
        keys = keys.repeat_interleave(heads // kv_heads, dim=0)
        values = values.repeat_interleave(heads // kv_heads, dim=0)
        scores = torch.einsum("rhd,hpd->hrp", q[begin:end].float(), keys) * scale
        age = positions[:, None] - torch.arange(length)[None, :]
        visible = (age >= 0) & ((age < window) if window else torch.ones_like(age, dtype=torch.bool))
        weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
        out[begin:end] = torch.einsum("hrp,hpd->rhd", weights, values).to(q.dtype)
    return out


@inner
def load_queries(q, queries, scale, first_vector, count, group, heads, kv_head, row_begin, dim):
    """Gather up to four scaled query vectors of one KV group into `queries` [dim, 4]; absent ones are zero."""
    for m in range(TILE):
        vector = first_vector + m
        if vector < count:
            row = row_begin + vector // group
            head = kv_head * group + vector % group
            base = (row * heads + head) * dim
            for d in range(dim):
                queries[d * TILE + m] = to_float(q[base + d]) * scale
        else:
            for d in range(dim):
                queries[d * TILE + m] = np.float32(0.0)


@inner
def softmax_rows(scores, stride, begin, first, last, weights):
    """Turn scores[m, begin … stride-1] into e^(score - highest), exactly 0 outside first[m] … last[m].

    weights[m] becomes their sum. `begin` and `stride` are multiples of 16. The zeros of masked positions change no sum,
    so neither does where the tile begins or ends.
    """
    for m in range(TILE):
        base = m * stride
        for t in range(begin, first[m]):
            scores[base + t] = np.float32(-np.inf)
        for t in range(last[m] + 1, stride):
            scores[base + t] = np.float32(-np.inf)
        highest = highest_of(scores, base + begin, base + stride)
        exp_below(scores, base + begin, base + stride, highest)
        weights[m] = sum_of(scores, base + begin, base + stride)


@inner
def add_values(scores, score_offset, stride, values, value_offset, sums, dim):
    """Add one block of 16 weighted values to the four rows of `sums` [4, dim]."""
    wide = dim // WIDE * WIDE
    for c in range(0, wide, WIDE):
        wide_value_tile(scores, score_offset, stride, values, value_offset + c, sums, c, dim)
    for c in range(wide, dim, 16):
        value_tile(scores, score_offset, stride, values, value_offset + c, sums, c, dim)


@inner
def tile_list(row_starts, group, kv_heads):
    """All (sequence, K/V head, first query vector) triples, four query vectors a tile: [tiles, 3] int64.

    Those of a head are neighbours: its keys and values are in the cache from the first on.
    """
    total = 0
    for s in range(row_starts.size - 1):
        total += ((row_starts[s + 1] - row_starts[s]) * group + TILE - 1) // TILE
    tiles = np.empty((total * kv_heads, 3), np.int64)
    at = 0
    for s in range(row_starts.size - 1):
        for kv_head in range(kv_heads):
            for vector in range(0, (row_starts[s + 1] - row_starts[s]) * group, TILE):
                tiles[at, 0] = s
                tiles[at, 1] = kv_head
                tiles[at, 2] = vector
                at += 1
    return tiles


@inner
def store_tile(out, sums, weights, first_vector, count, group, heads, kv_head, row_begin, dim):
    """Divide by the sum of weights and write the (up to four) finished rows."""
    for m in range(TILE):
        vector = first_vector + m
        if vector < count:
            row = row_begin + vector // group
            head = kv_head * group + vector % group
            base = (row * heads + head) * dim
            for d in range(dim):
                store_as(out, base + d, sums[m * dim + d] / weights[m])


def _paged_attention(
    like,
    q_address,
    k_cache_address,
    v_cache_address,
    cache_size,
    block_tables,
    row_starts,
    first_positions,
    scale,
    window,
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
    tiles = tile_list(row_starts, group, kv_heads)
    block_elements = dim * LANES
    for task in numba.prange(tiles.shape[0]):
        s = tiles[task, 0]
        kv_head = tiles[task, 1]
        first_vector = tiles[task, 2]
        row_begin = row_starts[s]
        count = (row_starts[s + 1] - row_begin) * group
        first = np.empty(TILE, np.int64)
        last = np.empty(TILE, np.int64)
        for m in range(TILE):
            last[m] = first_positions[s] + min(first_vector + m, count - 1) // group
            first[m] = max(0, last[m] - window + 1) if window > 0 else 0
        first_block = first[0] // LANES
        blocks = last[TILE - 1] // LANES + 1
        length = blocks * LANES
        queries = np.empty(dim * TILE, np.float32)
        scores = np.empty(TILE * length, np.float32)
        sums = np.zeros(TILE * dim, np.float32)
        weights = np.empty(TILE, np.float32)
        load_queries(q, queries, scale, first_vector, count, group, heads, kv_head, row_begin, dim)
        for block in range(first_block, blocks):
            offset = (np.int64(block_tables[s, block]) * kv_heads + kv_head) * block_elements
            score_tile(queries, k_cache, offset, scores, block * LANES, length, dim)
        softmax_rows(scores, length, first_block * LANES, first, last, weights)
        for block in range(first_block, blocks):
            offset = (np.int64(block_tables[s, block]) * kv_heads + kv_head) * block_elements
            add_values(scores, block * LANES, length, v_cache, offset, sums, dim)
        store_tile(out, sums, weights, first_vector, count, group, heads, kv_head, row_begin, dim)


_kernel = cpu_kernel(_paged_attention)


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_tables: NDArray[np.int32],
    row_starts: NDArray[np.int32],
    first_positions: NDArray[np.int32],
    scale: float,
    window: int = 0,
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
        row_starts,
        first_positions,
        np.float32(scale),
        window,
        rows,
        heads,
        k_cache.shape[1],
        dim,
        out.data_ptr(),
    )
    return out

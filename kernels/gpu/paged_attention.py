"""Causal attention of a flat batch over the paged K/V cache, on the device. What `kernels/paged_attention.py` computes.

Its shapes; tables, starts and positions are int32 tensors. All real sizes are read on the device and the shapes are bounds:
sequences without rows cost nothing, rows from row_starts[-1] on are neither read nor written. So one captured CUDA graph
serves every division of its rows among its sequences.

A tile is TILE query vectors (row × head of one KV group) of a sequence. Positions fall into splits of SPLIT, counted from
position 0. What a tile sees of a split (highest score, sum of weights, weighted sum of values) is made KEYS positions at a
time, and splits are folded in rising order. A sequence of few rows and several splits is parted: each of its splits is an
item of work, whose result goes to scratch memory, and a second kernel folds them. Else a tile is one item and folds its
splits as it goes. The programs take turns at the items, and find each from the sequences' sizes.

Row invariance: what a row gets from a split, and the fold, depend on its position alone. A masked position has weight
exactly 0, keys of which a row sees none change nothing in it, all batches have one tile shape, and the rows of a tile never
meet. Both ways to fold run the same operations, compiled without fused multiply-add. Taken for granted of the device: that
a row of a matrix product does not depend on its place in the tile.

Moves `bytes_moved`, and K and V once more for each further tile of a sequence. A value that no row of a tile sees is not
read, and a score that a row must not see is replaced: behind a sequence's end there may be NaN. Scratch memory: SCRATCH_BYTES
at most; a sequence that finds no room in it is not parted, which costs time and changes no bit.
Source: Dao et al., FlashAttention, arXiv 2205.14135; Dao et al., Flash-Decoding, 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.language import jit, tl

BLOCK = 16
SPLIT = 512
PARTED = 128
"""Most query vectors per KV head of a sequence that is parted: a verify block has fewer, a prompt chunk has tiles enough."""
LOOKUP = 128
"""Sequences whose sizes a program looks at together, to find its next item."""
SCRATCH_BYTES = 64 * 2**20
PROGRAMS = 1024
"""More than a device runs at once: those that are still to start even out what the others' items cost."""

# bytes of an element, head dimension that is computed (others are masked up to the next): TILE, KEYS, warps, stages.
# Five stages load block numbers four and K and V two tiles of keys ahead. Single precision is for checks, not for speed.
_TILES = {
    (2, 64): (32, 64, 4, 5),
    (2, 128): (32, 64, 8, 5),
    (2, 256): (32, 32, 8, 5),
    (4, 256): (16, 32, 8, 2),
}
_LARGEST_DIM = 256
_FOLD_HEADS = 4
_LOG2_E = 1.4426950408889634
# No size chooses between binaries: the same one for every batch, and the one that the compile tests see.
_SIZES = ["window", "width", "sequences", "capacity", "heads", "kv_heads", "dim"]


@jit
def _oldest(position, window):
    """The first position that a row at `position` sees."""
    return tl.where(window > 0, tl.maximum(position - window + 1, 0), 0)


@jit
def _extent(s, batch, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """First row, number of rows, first row's position, first split and number of splits of the sequences s."""
    row_starts, first_positions, width, sequences, window, _, _, _ = batch
    exists = s < sequences
    first = tl.load(first_positions + s, mask=exists, other=0)
    begin = tl.load(row_starts + s, mask=exists & (width == 0), other=0)
    rows = tl.load(row_starts + s + 1, mask=exists & (width == 0), other=0) - begin
    if width > 0:  # draft blocks, each at the first edge of a block behind its context
        begin = s * width
        rows = tl.where(exists, width, 0)
        first = (first + BLOCK - 1) // BLOCK * BLOCK
    first_split = _oldest(first, window) // SPLIT
    splits = tl.where(rows > 0, (first + rows - 1) // SPLIT - first_split + 1, 0)
    return begin, rows, first, first_split, splits


@jit
def _find(
    item,
    row,
    batch,
    TILE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTED: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """The sequence of an item or of a row (the other is -1), -1 if there is none; the item's number in that sequence;

    the sequence's first slot of scratch memory, -1 if it is not parted.
    """
    _, _, _, sequences, _, group, kv_heads, capacity = batch
    sequence = tl.full((), -1, tl.int32)
    number = tl.full((), 0, tl.int32)
    slot = tl.full((), -1, tl.int32)
    items = tl.full((), 0, tl.int32)
    slots = tl.full((), 0, tl.int32)
    for base in range(0, sequences, LOOKUP):
        s = base + tl.arange(0, LOOKUP)
        begin, rows, _first, _first_split, splits = _extent(s, batch, SPLIT, BLOCK)
        needed = tl.where((splits > 1) & (rows * group <= PARTED), rows * splits, 0)
        first_slot = slots + tl.cumsum(needed, axis=0) - needed
        parted = (needed > 0) & (first_slot + needed <= capacity)
        count = (rows * group + TILE - 1) // TILE * kv_heads * tl.where(parted, splits, 1)
        first_item = items + tl.cumsum(count, axis=0) - count
        found = ((item >= first_item) & (item < first_item + count)) | ((row >= begin) & (row < begin + rows))
        sequence += tl.sum(tl.where(found, s + 1, 0), axis=0)
        number += tl.sum(tl.where(found, item - first_item, 0), axis=0)
        slot += tl.sum(tl.where(found & parted, first_slot + 1, 0), axis=0)
        items += tl.sum(count, axis=0)
        slots += tl.sum(needed, axis=0)
    return sequence, number, slot


@jit
def _fold(highest, weight, sums, other_highest, other_weight, other_sums):
    """Two partial results as one: [n] base-2 scores, [n], [n, dim], and the same of the positions behind."""
    both = tl.maximum(highest, other_highest)
    reference = tl.where(both == float("-inf"), 0.0, both)
    shrink = tl.exp2(highest - reference)
    other_shrink = tl.exp2(other_highest - reference)
    weight = weight * shrink + other_weight * other_shrink
    sums = sums * shrink[:, None] + other_sums * other_shrink[:, None]
    return both, weight, sums


@jit
def _attend_split(
    query,
    scale,
    oldest,
    newest,
    tile_oldest,
    tile_newest,
    context,
    first,
    begin,
    end,
    k_cache,
    v_cache,
    table,
    table_end,
    draft_block,
    block_stride,
    dim,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial result of a tile's queries [TILE, DIM] over positions begin … end-1, `begin` a multiple of KEYS.

    oldest, newest: [TILE], what each row sees, but that there are no positions from `context` to `first`. Blocks from
    `table_end` on are the draft block.
    """
    d = tl.arange(0, query.shape[1])
    highest = tl.full([query.shape[0]], float("-inf"), tl.float32)
    weight = tl.zeros([query.shape[0]], tl.float32)
    sums = tl.zeros([query.shape[0], query.shape[1]], tl.float32)
    for tile in range(begin // KEYS, (end + KEYS - 1) // KEYS):
        position = tile * KEYS + tl.arange(0, KEYS)
        index = position // BLOCK
        needed = (index >= tile_oldest // BLOCK) & (index <= tile_newest // BLOCK)
        block = tl.load(table + index, mask=needed & (index < table_end), other=draft_block)
        # lets 16 neighbouring keys be loaded at once: the mask of whole blocks does so too
        block = tl.max_constancy(block, BLOCK).to(tl.int64) * block_stride
        keys = tl.load(
            k_cache + (d * BLOCK)[:, None] + (block + position % BLOCK)[None, :],
            mask=(d < dim)[:, None] & needed[None, :],
            other=0.0,
        )
        seen = (position >= tile_oldest) & (position <= tile_newest) & ((position < context) | (position >= first))
        values = tl.load(
            v_cache + (block + position % BLOCK * dim)[:, None] + d[None, :],
            mask=seen[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        visible = seen[None, :] & (position[None, :] >= oldest[:, None]) & (position[None, :] <= newest[:, None])
        scores = tl.where(visible, tl.dot(query, keys, input_precision="ieee") * scale, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        reference = tl.where(higher == float("-inf"), 0.0, higher)
        shrink = tl.exp2(highest - reference)
        weights = tl.exp2(scores - reference[:, None])
        weight = weight * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        highest = higher
    return highest, weight, sums


@jit(do_not_specialize=[*_SIZES, "table_width"])
def _attend_items(
    q,
    k_cache,
    v_cache,
    block_tables,
    row_starts,
    first_positions,
    draft_blocks,
    out,
    partial_sums,
    partial_weights,
    scale,
    window,
    width,
    sequences,
    capacity,
    table_width,
    heads,
    kv_heads,
    dim,
    TILE: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTED: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """Every item of work: a tile and a KV head, over one split of a parted sequence or over all that the tile sees.

    width: 0, or of draft blocks, whose first_positions are the lengths of their contexts.
    """
    group = heads // kv_heads
    dim = dim // BLOCK * BLOCK  # tells the compiler that it is a multiple
    d = tl.arange(0, DIM)
    batch = (row_starts, first_positions, width, sequences, window, group, kv_heads, capacity)
    item = tl.program_id(0)
    s, number, slot = _find(item, -1, batch, TILE, SPLIT, BLOCK, PARTED, LOOKUP)
    while s >= 0:
        begin, rows, first, first_split, splits = _extent(s, batch, SPLIT, BLOCK)
        parts = tl.where(slot >= 0, splits, 1)
        kv_head = number // parts % kv_heads
        first_vector = number // parts // kv_heads * TILE
        last_vector = tl.minimum(first_vector + TILE, rows * group) - 1
        vector = first_vector + tl.arange(0, TILE)
        exists = vector <= last_vector
        vector = tl.minimum(vector, last_vector)  # the last one again, where there are no more
        r = vector // group
        row_head = (begin + r).to(tl.int64) * heads + kv_head * group + vector % group
        query = tl.load(q + (row_head * dim)[:, None] + d[None, :], mask=(d < dim)[None, :], other=0.0)

        oldest, newest = _oldest(first + r, window), first + r
        tile_oldest = _oldest(first + first_vector // group, window)
        tile_newest = first + last_vector // group
        context, table_end, draft_block = first, tile_newest // BLOCK + 1, 0
        if width > 0:
            newest = newest - r + width - 1
            tile_newest = first + width - 1
            context = tl.load(first_positions + s)
            table_end = first // BLOCK
            draft_block = tl.load(draft_blocks + s)

        highest = tl.full([TILE], float("-inf"), tl.float32)
        weight = tl.zeros([TILE], tl.float32)
        sums = tl.zeros([TILE, DIM], tl.float32)
        from_split = tl.where(slot >= 0, first_split + number % parts, tile_oldest // SPLIT)
        to_split = tl.where(slot >= 0, from_split, tile_newest // SPLIT)
        for split in range(from_split, to_split + 1):
            split_highest, split_weight, split_sums = _attend_split(
                query,
                scale,
                oldest,
                newest,
                tile_oldest,
                tile_newest,
                context,
                first,
                tl.maximum(split * SPLIT, tile_oldest // KEYS * KEYS),
                tl.minimum(split * SPLIT + SPLIT, tile_newest + 1),
                k_cache + kv_head * dim * BLOCK,
                v_cache + kv_head * dim * BLOCK,
                block_tables + s.to(tl.int64) * table_width,
                table_end,
                draft_block,
                kv_heads * dim * BLOCK,
                dim,
                KEYS,
                BLOCK,
            )
            highest, weight, sums = _fold(highest, weight, sums, split_highest, split_weight, split_sums)

        mask = exists[:, None] & (d < dim)[None, :]
        if slot >= 0:
            at = (slot + r * splits + number % parts) * heads + kv_head * group + vector % group
            tl.store(partial_weights + at, highest, mask=exists)
            tl.store(partial_weights + capacity * heads + at, weight, mask=exists)
            tl.store(partial_sums + (at * dim)[:, None] + d[None, :], sums, mask=mask)
        else:
            result = tl.div_rn(sums, weight[:, None] + tl.zeros_like(sums))
            tl.store(out + (row_head * dim)[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)
        item += tl.num_programs(0)
        s, number, slot = _find(item, -1, batch, TILE, SPLIT, BLOCK, PARTED, LOOKUP)


@jit(do_not_specialize=_SIZES)
def _fold_rows(
    row_starts,
    first_positions,
    out,
    partial_sums,
    partial_weights,
    window,
    width,
    sequences,
    capacity,
    heads,
    kv_heads,
    dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTED: tl.constexpr,
    LOOKUP: tl.constexpr,
):
    """The splits of one row of a parted sequence, HEADS heads a program; nothing where the row is not of such a one."""
    row = tl.program_id(0)
    batch = (row_starts, first_positions, width, sequences, window, heads // kv_heads, kv_heads, capacity)
    s, _, slot = _find(-1, row, batch, 1, SPLIT, BLOCK, PARTED, LOOKUP)
    if slot >= 0:
        begin, rows, first, first_split, splits = _extent(s, batch, SPLIT, BLOCK)
        oldest, newest = _oldest(first + row - begin, window), first + row - begin
        if width > 0:
            newest = first + rows - 1
        head, d = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, DIM)
        dim = dim // BLOCK * BLOCK  # tells the compiler that it is a multiple
        mask = (head < heads)[:, None] & (d < dim)[None, :]
        highest = tl.full([HEADS], float("-inf"), tl.float32)
        weight = tl.zeros([HEADS], tl.float32)
        sums = tl.zeros([HEADS, DIM], tl.float32)
        for split in range(oldest // SPLIT, newest // SPLIT + 1):
            at = (slot + (row - begin) * splits + split - first_split) * heads + head
            split_highest = tl.load(partial_weights + at, mask=head < heads, other=0.0)
            split_weight = tl.load(partial_weights + capacity * heads + at, mask=head < heads, other=1.0)
            split_sums = tl.load(partial_sums + (at * dim)[:, None] + d[None, :], mask=mask, other=0.0)
            highest, weight, sums = _fold(highest, weight, sums, split_highest, split_weight, split_sums)
        result = tl.div_rn(sums, weight[:, None] + tl.zeros_like(sums))
        at = (row.to(tl.int64) * heads + head) * dim
        tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=mask)


def _constants() -> dict[str, int]:
    """Of both kernels."""
    return {"SPLIT": SPLIT, "BLOCK": BLOCK, "PARTED": PARTED, "LOOKUP": LOOKUP}


def _tiles(element: int, padded: int) -> tuple[dict[str, int], dict[str, Any]]:
    tile, keys, warps, stages = _TILES[element, padded]
    constants = {"TILE": tile, "KEYS": keys, "DIM": padded, **_constants()}
    return constants, {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}


def _fold_tiles() -> tuple[dict[str, int], dict[str, Any]]:
    return {"HEADS": _FOLD_HEADS, "DIM": _LARGEST_DIM, **_constants()}, {"num_warps": 4, "enable_fp_fusion": False}


def configurations() -> list[Configuration]:
    tables = dict.fromkeys(("row_starts", "first_positions"), "*i32")
    partials = dict.fromkeys(("partial_sums", "partial_weights"), "*fp32")
    fold = {**tables, "out": "*bf16", **partials, **dict.fromkeys(_SIZES, "i32")}
    attend = {**fold, "block_tables": "*i32", "draft_blocks": "*i32", "table_width": "i32", "scale": "fp32"}
    constants, options = _fold_tiles()
    listed = [Configuration(_fold_rows, fold, constants, **options)]
    for element, padded in _TILES:
        floats = dict.fromkeys(("q", "k_cache", "v_cache", "out"), {2: "*bf16", 4: "*fp32"}[element])
        constants, options = _tiles(element, padded)
        listed.append(Configuration(_attend_items, attend | floats, constants, **options))
    return listed


def bytes_moved(
    pieces: Sequence[tuple[int, int]], heads: int, kv_heads: int, dim: int, element: int, window: int = 0
) -> int:
    """Every query and result once, and every position of K and V that a row sees.

    pieces: (first position, rows) of each sequence; element: bytes of one.
    """
    rows = sum(count for _, count in pieces)
    oldest = [max(0, first - window + 1) if window else 0 for first, _ in pieces]
    positions = sum(first + count - old for (first, count), old in zip(pieces, oldest, strict=True) if count)
    return 2 * dim * element * (rows * heads + positions * kv_heads)


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    row_starts: Tensor,
    first_positions: Tensor,
    draft_blocks: Tensor,
    width: int,
    scale: float,
    window: int,
) -> Tensor:
    """Launch for causal rows (width 0; draft_blocks is not read), or for draft blocks (row_starts is not read)."""
    rows, heads, dim = q.shape
    kv_heads, sequences = k_cache.shape[1], len(first_positions)
    assert dim in range(BLOCK, _LARGEST_DIM + 1, BLOCK), (
        f"head dimension {dim}: not a multiple of 16 up to {_LARGEST_DIM}"
    )
    out = torch.empty_like(q)
    if not rows or not sequences:
        return out
    padded = next(padded for element, padded in _TILES if element == q.element_size() and padded >= dim)
    tiles, options = _tiles(q.element_size(), padded)
    max_splits = -(-(block_tables.shape[1] * BLOCK + width) // SPLIT)
    slots = min(rows * max_splits, SCRATCH_BYTES // (4 * heads * (dim + 2))) if max_splits > 1 else 0
    partial_sums = torch.empty((slots, heads, dim), dtype=torch.float32, device=q.device)
    partial_weights = torch.empty((2, slots, heads), dtype=torch.float32, device=q.device)
    most_items = (rows * (heads // kv_heads) // tiles["TILE"] + sequences) * kv_heads * max_splits
    _attend_items[(min(PROGRAMS, most_items),)](
        q,
        k_cache,
        v_cache,
        block_tables,
        row_starts,
        first_positions,
        draft_blocks,
        out,
        partial_sums,
        partial_weights,
        scale * _LOG2_E,
        window,
        width,
        sequences,
        slots,
        block_tables.shape[1],
        heads,
        kv_heads,
        dim,
        **tiles,
        **options,
    )
    if slots:
        tiles, options = _fold_tiles()
        _fold_rows[rows, -(-heads // _FOLD_HEADS)](
            row_starts,
            first_positions,
            out,
            partial_sums,
            partial_weights,
            window,
            width,
            sequences,
            slots,
            heads,
            kv_heads,
            dim,
            **tiles,
            **options,
        )
    return out


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    row_starts: Tensor,
    first_positions: Tensor,
    scale: float,
    window: int = 0,
) -> Tensor:
    """Launch; the head dimension must be a multiple of 16 up to 256 and the block size 16."""
    unread = first_positions
    return attend(q, k_cache, v_cache, block_tables, row_starts, first_positions, unread, 0, scale, window)

"""The target's token at every row, and how many drafts it accepts, on the device. What `kernels/coupled_sampling.py` computes.

    logits: [rows, vocab] float32, bfloat16 or float16, -inf where a token is forbidden; noise is made here, see below
    temperature, min_p, top_p: [rows] float32; top_k: [rows] int64 (0: off); temperature below GREEDY_BELOW: greedy
    keys, positions: [rows] int64, of the row's Gumbel noise (stream 0, round 0)
    → [rows] int64

token = argmax(z + noise) over {z ≥ threshold}, z = logits / temperature, ties to the lowest id; thresholds are values, as
on the CPU. Rows without top_k, top_p and min_p cost one pass over the logits, the others two:

1. `_scan`, a program per row and tile of 2048 tokens: the tile's best token; of a row that truncates, the largest z of
   every 256 tokens instead.
2. `_bound`, a program per truncating row: a z below which no token can be kept. With top_k the k-th largest of those
   maxima (they are k different tokens); else the larger of min_p's threshold and z_max + log((1 - top_p) / (2·vocab)),
   since all tokens below that share less than 1 - top_p.
3. `_collect`, per row and tile again: lists the tokens above the bound, and adds up the whole row's probability for top_p.
   Slots of the list are handed out by an atomic, so their order varies; nothing that is computed from them depends on it.
4. `_choose`, a program per row: thresholds by 8 passes over the list, four bits of z's ordered integer each, then the
   argmax. A list longer than 16384 was not kept: the row itself is searched, for the same result.

Row-invariant: tiles are fixed, and probabilities are added as integers (in units of 2^-44 of the largest at a vocabulary of
2^18, finer below), so no order matters. Compiled without fused multiply-add. Equal to the CPU to the token, except
that top_p's sums are rounded differently (each weight down to one unit, where the CPU adds fp64 roundings) and min_p's log
may be one ulp off: it matters where a threshold falls within 1e-7 of a token's edge. NaN logits are never taken.
Moves rows·vocab·element bytes once or twice, and up to 128 KB of list per truncating row, which stays in L2.
Nothing is read on the host and scratch comes from torch's allocator, so all of it can be captured in a CUDA graph.
Source: as the CPU's.
"""

from __future__ import annotations

from typing import Any

import torch

from dspark.kernels.coupled_sampling import GREEDY_BELOW
from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.gumbel_noise import grouped_noise, log, token_noise
from dspark.kernels.gpu.language import jit, tl

TILE = 2048
GROUP = 256
LISTED = 16384
"""Tokens that a row's list holds."""

_SCAN = {"GREEDY_BELOW": GREEDY_BELOW, "TILE": TILE, "GROUP": GROUP}
_BOUND = {"GREEDY_BELOW": GREEDY_BELOW, "CHUNK": 512}
_COLLECT = {"GREEDY_BELOW": GREEDY_BELOW, "TILE": TILE, "LISTED": LISTED}
_CHOOSE = {"GREEDY_BELOW": GREEDY_BELOW, "CHUNK": 512, "LISTED": LISTED}
_ACCEPT = {"ROWS": 32}
_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}
_CHOOSE_OPTIONS: dict[str, Any] = {"num_warps": 16, "enable_fp_fusion": False}


@jit
def _exp(x):
    """e^x in float32 for x ≤ 0, exactly 0 below -87; relative error < 2e-7. The CPU's, operation by operation."""
    tiny = x < -87.0
    x = tl.where(tiny, -87.0, x)
    power = (x * 1.4426950408889634 + 128.5).to(tl.int32) - 128
    n = power.to(tl.float32)
    r = x - n * 0.693359375
    r = r - n * -2.12194440e-4
    p = r * 1.9875691500e-4 + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    p = p * r * r + r + 1.0
    return tl.where(tiny, 0.0, p * ((power + 127) << 23).to(tl.float32, bitcast=True))


@jit
def _scaled(logits, temperature):
    """z between -8e37 and 8e37; the lowest is forbidden or NaN: it is never listed and never wins."""
    z = tl.div_rn(logits.to(tl.float32), temperature)
    return tl.where(z == z, tl.minimum(tl.maximum(z, -8e37), 8e37), -8e37)


@jit
def _ordered(z):
    """int32 in the order of float32 z; -0 and 0 are one."""
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _truncates(greedy, top_k, top_p, min_p, vocab):
    return (greedy == 0) & (((top_k > 0) & (top_k < vocab)) | (top_p < 1.0) | (min_p > 0.0))


@jit
def _min_p_threshold(highest, min_p):
    return highest + log(tl.maximum(min_p, 1.1754943508222875e-38))


@jit
def _mass(z, highest, unit):
    """exp(z - highest), the largest token's probability being `unit`, rounded down to an integer."""
    return (_exp(z - highest) * unit).to(tl.int64)


@jit
def _scan(
    logits,
    stride,
    temperature,
    top_k,
    top_p,
    min_p,
    keys,
    positions,
    best_values,
    best_tokens,
    maxima,
    vocab,
    GREEDY_BELOW: tl.constexpr,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    row, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    t = tl.load(temperature + row)
    greedy = t < GREEDY_BELOW
    token = tile * TILE + tl.arange(0, TILE)
    raw = tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf"))
    z = _scaled(raw, tl.where(greedy, 1.0, t))
    if _truncates(greedy, tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row), vocab):
        groups: tl.constexpr = TILE // GROUP
        highest = tl.max(tl.reshape(z, [groups, GROUP]), axis=1)
        tl.store(maxima + (row * tiles + tile) * groups + tl.arange(0, groups), highest)
    else:
        if greedy == 0:
            group = tile * (TILE // 4) + tl.arange(0, TILE // 4)
            z += grouped_noise(group, tl.load(keys + row), tl.load(positions + row), row * 0, 0)
        value, index = tl.max(z, axis=0, return_indices=True)
        tl.store(best_values + row * tiles + tile, value)
        tl.store(best_tokens + row * tiles + tile, tile * TILE + index)


@jit
def _candidates(i, size, listed, values, logits, temperature):
    """z of the i-th tokens of a list, or of the row itself; -8e37 beyond `size`."""
    if listed:
        z = tl.load(values + i, mask=i < size, other=-8e37)
    else:
        z = _scaled(tl.load(logits + i, mask=i < size, other=float("-inf")), temperature)
    return z


@jit
def _reaching(
    goal,
    highest,
    unit,
    size,
    listed,
    values,
    logits,
    temperature,
    COUNTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The largest ordered integer such that the tokens at or above it weigh `goal` or more; the lowest if none do.

    A token weighs 1 with COUNTS, else its probability.
    """
    lowest = tl.full((), -2147483648, tl.int32)
    for step in range(8):
        shift = 28 - 4 * step
        trial = lowest + (tl.arange(0, 16) << shift)
        weight = tl.zeros([16], tl.int64)
        for first in range(0, size, CHUNK):
            i = first + tl.arange(0, CHUNK)
            z = _candidates(i, size, listed, values, logits, temperature)
            one = (i < size).to(tl.int64)
            if not COUNTS:
                one *= _mass(z, highest, unit)
            weight += tl.sum(tl.where(_ordered(z)[:, None] >= trial[None, :], one[:, None], 0), axis=0)
        enough = tl.sum((weight >= goal).to(tl.int32), axis=0)
        lowest += tl.maximum(enough - 1, 0) << shift
    return lowest


@jit
def _bound(
    temperature,
    top_k,
    top_p,
    min_p,
    maxima,
    highest,
    bounds,
    counts,
    groups,
    vocab,
    GREEDY_BELOW: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k, p, m = tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if _truncates(tl.load(temperature + row) < GREEDY_BELOW, k, p, m, vocab):
        own = maxima + row * groups
        top = tl.full((), -8e37, tl.float32)
        for first in range(0, groups, CHUNK):
            i = first + tl.arange(0, CHUNK)
            top = tl.maximum(top, tl.max(tl.load(own + i, mask=i < groups, other=-8e37), axis=0))
        bound = tl.full((), -8e37, tl.float32)
        if (k > 0) & (k < vocab):
            if k <= groups:
                key = _reaching(k, top, 1.0, groups, True, own, own, 1.0, True, CHUNK)
                bound = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        else:
            if p < 1.0:
                bound = top + log(tl.div_rn(1.0 - p, 2.0 * vocab))
            if m > 0.0:
                bound = tl.maximum(bound, _min_p_threshold(top, m))
        tl.store(highest + row, top)
        tl.store(bounds + row, bound)
        tl.store(counts + row, 0)


@jit
def _collect(
    logits,
    stride,
    temperature,
    top_k,
    top_p,
    min_p,
    highest,
    bounds,
    counts,
    masses,
    values,
    tokens,
    unit,
    vocab,
    GREEDY_BELOW: tl.constexpr,
    TILE: tl.constexpr,
    LISTED: tl.constexpr,
):
    row, tile, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    t, p = tl.load(temperature + row), tl.load(top_p + row)
    if _truncates(t < GREEDY_BELOW, tl.load(top_k + row), p, tl.load(min_p + row), vocab):
        token = tile * TILE + tl.arange(0, TILE)
        z = _scaled(tl.load(logits + row * stride + token, mask=token < vocab, other=float("-inf")), t)
        if p < 1.0:
            tl.store(masses + row * tiles + tile, tl.sum(_mass(z, tl.load(highest + row), unit), axis=0))
        chosen = (z >= tl.load(bounds + row)) & (z > -8e37)
        place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
        place += tl.atomic_add(counts + row, tl.sum(chosen.to(tl.int32), axis=0))
        tl.store(values + row * LISTED + place, z, mask=chosen & (place < LISTED))
        tl.store(tokens + row * LISTED + place, token, mask=chosen & (place < LISTED))


@jit
def best_of_tiles(best_values, best_tokens, tiles, CHUNK: tl.constexpr):
    """Of a row's tiles [tiles], the token of the first that has the highest value."""
    best = tl.full((), float("-inf"), tl.float32)
    winner = tl.full((), 0, tl.int32)
    for first in range(0, tiles, CHUNK):
        i = first + tl.arange(0, CHUNK)
        value, index = tl.max(
            tl.load(best_values + i, mask=i < tiles, other=float("-inf")), axis=0, return_indices=True
        )
        if value > best:
            best = value
            winner = first + index
    return tl.load(best_tokens + winner)


@jit
def _choose(
    logits,
    stride,
    temperature,
    top_k,
    top_p,
    min_p,
    keys,
    positions,
    best_values,
    best_tokens,
    highest,
    counts,
    masses,
    values,
    tokens,
    out,
    unit,
    tiles,
    vocab,
    GREEDY_BELOW: tl.constexpr,
    CHUNK: tl.constexpr,
    LISTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t, k, p, m = tl.load(temperature + row), tl.load(top_k + row), tl.load(top_p + row), tl.load(min_p + row)
    if _truncates(t < GREEDY_BELOW, k, p, m, vocab):
        top, count = tl.load(highest + row), tl.load(counts + row)
        listed = count <= LISTED
        size = tl.where(listed, count, vocab)
        values += row * LISTED
        tokens += row * LISTED
        logits += row * stride
        threshold = tl.full((), -2147483648, tl.int32)
        total = tl.full((), 0, tl.int64)
        if (k > 0) & (k < vocab):
            threshold = _reaching(k, top, unit, size, listed, values, logits, t, True, CHUNK)
        if p < 1.0:
            if (k > 0) & (k < vocab):
                for first in range(0, size, CHUNK):
                    i = first + tl.arange(0, CHUNK)
                    z = _candidates(i, size, listed, values, logits, t)
                    kept = (i < size) & (_ordered(z) >= threshold)
                    total += tl.sum(tl.where(kept, _mass(z, top, unit), 0), axis=0)
            else:
                for first in range(0, tiles, CHUNK):
                    i = first + tl.arange(0, CHUNK)
                    total += tl.sum(tl.load(masses + row * tiles + i, mask=i < tiles, other=0), axis=0)
            share = p.to(tl.float64) * total.to(tl.float64)
            goal = tl.maximum(tl.ceil(share).to(tl.int64), 1)
            # what top_k kept reaches the goal, so this is never below its threshold
            threshold = _reaching(goal, top, unit, size, listed, values, logits, t, False, CHUNK)
        if m > 0.0:
            threshold = tl.maximum(threshold, _ordered(_min_p_threshold(top, m)))
        key, position = tl.load(keys + row), tl.load(positions + row)
        best = tl.full((), float("-inf"), tl.float32)
        winner = tl.full((), 0, tl.int32)
        for first in range(0, size, CHUNK):
            i = first + tl.arange(0, CHUNK)
            z = _candidates(i, size, listed, values, logits, t)
            token = i
            if listed:
                token = tl.load(tokens + i, mask=i < size, other=0)
            kept = (i < size) & (_ordered(z) >= threshold)
            value = tl.where(kept, z + token_noise(token, key, position, row * 0, 0), float("-inf"))
            highest_here = tl.max(value, axis=0)
            lowest_id = tl.min(tl.where(value == highest_here, token, 2147483647), axis=0)
            if (highest_here > best) | ((highest_here == best) & (lowest_id < winner)):
                best = highest_here
                winner = lowest_id
        tl.store(out + row, winner.to(tl.int64))
    else:
        winner = best_of_tiles(best_values + row * tiles, best_tokens + row * tiles, tiles, CHUNK)
        tl.store(out + row, winner.to(tl.int64))


def bytes_moved(rows: int, vocab: int, element: int, truncating_rows: int = 0) -> int:
    """element: bytes of a logit. Partial results and lists are left out: a hundredth, and within L2."""
    return (rows + truncating_rows) * vocab * element


def sample_rows(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    keys: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Launch on the device. Rows of `logits` may be apart by any stride."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    tiles = -(-vocab // TILE)
    unit = 2.0 ** (62 - (vocab - 1).bit_length())

    def scratch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    out = scratch(rows, dtype=torch.int64)
    if not rows:
        return out
    params = temperature, top_k, top_p, min_p
    best_values, best_tokens = scratch(rows, tiles), scratch(rows, tiles, dtype=torch.int32)
    maxima, highest, bounds = scratch(rows, tiles * (TILE // GROUP)), scratch(rows), scratch(rows)
    counts, masses = scratch(rows, dtype=torch.int32), scratch(rows, tiles, dtype=torch.int64)
    values, tokens = scratch(rows, LISTED), scratch(rows, LISTED, dtype=torch.int32)
    stride = logits.stride(0)
    _scan[rows, tiles](
        logits, stride, *params, keys, positions, best_values, best_tokens, maxima, vocab, **_SCAN, **_OPTIONS
    )
    _bound[(rows,)](*params, maxima, highest, bounds, counts, maxima.shape[1], vocab, **_BOUND, **_OPTIONS)
    _collect[rows, tiles](
        logits, stride, *params, highest, bounds, counts, masses, values, tokens, unit, vocab, **_COLLECT, **_OPTIONS
    )
    _choose[(rows,)](
        logits,
        stride,
        *params,
        keys,
        positions,
        best_values,
        best_tokens,
        highest,
        counts,
        masses,
        values,
        tokens,
        out,
        unit,
        tiles,
        vocab,
        **_CHOOSE,
        **_CHOOSE_OPTIONS,
    )
    return out


@jit
def _accept(token_ids, target_tokens, row_starts, accepted, next_tokens, ROWS: tl.constexpr):
    sequence = tl.program_id(0)
    start, end = tl.load(row_starts + sequence), tl.load(row_starts + sequence + 1)
    drafts = tl.maximum(end - start - 1, 0)
    length = drafts
    for first in range(0, drafts, ROWS):
        i = first + tl.arange(0, ROWS)
        draft = tl.load(token_ids + start + 1 + i, mask=i < drafts, other=-1)
        target = tl.load(target_tokens + start + i, mask=i < drafts, other=-1)
        length = tl.minimum(length, tl.min(tl.where(draft != target, i, drafts), axis=0))
    tl.store(accepted + sequence, length)
    tl.store(next_tokens + sequence, tl.load(target_tokens + start + length, mask=end > start, other=0))


def accept_drafts(
    token_ids: torch.Tensor, target_tokens: torch.Tensor, row_starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many drafts of each sequence equal the target's own tokens before the first that does not, and the token after.

    token_ids: [rows] int64, what the pass was fed: each sequence's anchor, then its drafts.
    target_tokens: [rows] int64, what the target says comes after each.  row_starts: [sequences + 1] int32.
    → accepted [sequences] int32, next token [sequences] int64 (0 for a sequence without rows).
    """
    sequences = row_starts.shape[0] - 1
    accepted = torch.empty(sequences, dtype=torch.int32, device=token_ids.device)
    next_tokens = torch.empty(sequences, dtype=torch.int64, device=token_ids.device)
    if sequences:
        _accept[(sequences,)](token_ids, target_tokens, row_starts, accepted, next_tokens, **_ACCEPT, num_warps=1)
    return accepted, next_tokens


def configurations() -> list[Configuration]:
    params = {"temperature": "*fp32", "top_k": "*i64", "top_p": "*fp32", "min_p": "*fp32"}
    noise = {"keys": "*i64", "positions": "*i64"}
    tiles = {"best_values": "*fp32", "best_tokens": "*i32"}
    row = {"highest": "*fp32", "bounds": "*fp32", "counts": "*i32"}
    listed = {"masses": "*i64", "values": "*fp32", "tokens": "*i32"}
    accept = {
        "token_ids": "*i64",
        "target_tokens": "*i64",
        "row_starts": "*i32",
        "accepted": "*i32",
        "next_tokens": "*i64",
    }
    stride = {"stride": "i32"}
    scan = stride | params | noise | tiles | {"maxima": "*fp32", "vocab": "i32"}
    bound = params | {"maxima": "*fp32"} | row | {"groups": "i32", "vocab": "i32"}
    collect = stride | params | row | listed | {"unit": "fp32", "vocab": "i32"}
    choose = stride | params | noise | tiles | {"highest": "*fp32", "counts": "*i32"} | listed
    choose |= {"out": "*i64", "unit": "fp32", "tiles": "i32", "vocab": "i32"}
    reading_logits = (
        (_scan, scan, _SCAN, _OPTIONS),
        (_collect, collect, _COLLECT, _OPTIONS),
        (_choose, choose, _CHOOSE, _CHOOSE_OPTIONS),
    )
    return [
        Configuration(_bound, bound, _BOUND, **_OPTIONS),
        Configuration(_accept, accept, _ACCEPT, num_warps=1),
        *(
            Configuration(kernel, {"logits": logits} | signature, constants, **options)
            for kernel, signature, constants, options in reading_logits
            for logits in ("*fp32", "*bf16")  # a step's are sums of bfloat16 products, not rounded again
        ),
    ]

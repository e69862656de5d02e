"""A draft block drawn left to right on the device. What `kernels/markov_step.py` computes, with its letters and shapes.

A slot is two launches. `_step`, a program per 64 draftable ids: their part of w2 is read once and multiplied with the
rank-r rows of 16 sequences at a time (fp32 accumulation), base logits and noise are added, and each sequence's best of the
tile is kept. `_pick`, a program per sequence: the best of the tiles becomes the slot's token, in the column of a device
tensor from which the next slot's `_step` reads it. So the host only launches; it never waits, and the loop can be captured
in a CUDA graph.

A vanilla head's w1 row is read inside `_step`. Gated and rnn heads compute x from it in PyTorch on the device, in their
`transition` (a product of size [B, 2r + d or less] × [3r or less]: no host round trip either), and `_step` reads those.

A tile of 16 rows has one shape whatever B is, so a sequence's scores do not depend on the others. Noise is the CPU's to the
bit; scores differ from the reference by the order of r additions. Moves v·r elements of w2 and B·v of logits per slot:
memory bound up to some 64 sequences, then by the noise. Which of equal scores is drafted: the lowest id's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.coupled_sampling import best_of_tiles
from dspark.kernels.gpu.gumbel_noise import grouped_noise, token_noise
from dspark.kernels.gpu.language import jit, tl
from dspark.kernels.markov_step import Transition

_STEP = {"ROWS": 16, "TOKENS": 64, "RANK": 256}
_PICK = {"CHUNK": 1024}
_OPTIONS: dict[str, Any] = {"num_warps": 8, "enable_fp_fusion": False}


@jit
def _step(
    logits,
    logits_stride,
    table,
    source,
    source_stride,
    w2,
    temperature,
    keys,
    positions,
    positions_stride,
    draft_ids,
    best_values,
    best_ids,
    rows,
    vocab,
    rank,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    RANK: tl.constexpr,
    SUBSET: tl.constexpr,
):
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    token, r = tile * TOKENS + tl.arange(0, TOKENS), tl.arange(0, RANK)
    inside, real = token < vocab, r < rank
    weight = tl.load(
        w2 + token[None, :].to(tl.int64) * rank + r[:, None], mask=real[:, None] & inside[None, :], other=0.0
    )
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < rows
        at = tl.load(source + row.to(tl.int64) * source_stride, mask=live, other=0)
        x = tl.load(table + at[:, None] * rank + r[None, :], mask=live[:, None] & real[None, :], other=0.0)
        base = tl.load(
            logits + row[:, None].to(tl.int64) * logits_stride + token[None, :],
            mask=live[:, None] & inside[None, :],
            other=float("-inf"),
        )
        scores = base.to(tl.float32) + tl.dot(x, weight, input_precision="ieee")
        t = tl.load(temperature + row, mask=live, other=0.0)[:, None]
        if tl.max(tl.max(t, axis=1), axis=0) > 0.0:
            key = tl.load(keys + row, mask=live, other=0)[:, None]
            position = tl.load(positions + row.to(tl.int64) * positions_stride, mask=live, other=0)[:, None]
            if SUBSET:
                drafted = tl.load(draft_ids + token, mask=inside, other=0).to(tl.int32)
                noise = token_noise(drafted[None, :], key, position, position * 0, 0)
            else:
                group = tile * (TOKENS // 4) + tl.arange(0, TOKENS // 4)
                noise = grouped_noise(group[None, :], key, position, position * 0, 0)
            drawn = tl.div_rn(scores, tl.where(t > 0.0, t, 1.0)) + noise
            scores = tl.where(t > 0.0, drawn, scores)
        value, index = tl.max(scores, axis=1, return_indices=True)
        tl.store(best_values + row.to(tl.int64) * tiles + tile, value, mask=live)
        tl.store(best_ids + row.to(tl.int64) * tiles + tile, tile * TOKENS + index, mask=live)


@jit
def _pick(best_values, best_ids, draft_ids, tokens, tokens_stride, tiles, CHUNK: tl.constexpr, SUBSET: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = best_of_tiles(best_values + row * tiles, best_ids + row * tiles, tiles, CHUNK).to(tl.int64)
    if SUBSET:
        token = tl.load(draft_ids + token)
    tl.store(tokens + row * tokens_stride, token)


def configurations() -> list[Configuration]:
    step = {
        "logits": "*bf16",
        "logits_stride": "i32",
        "table": "*bf16",
        "source": "*i64",
        "source_stride": "i32",
        "w2": "*bf16",
        "temperature": "*fp32",
        "keys": "*i64",
        "positions": "*i64",
        "positions_stride": "i32",
        "draft_ids": "*i64",
        "best_values": "*fp32",
        "best_ids": "*i32",
        "rows": "i32",
        "vocab": "i32",
        "rank": "i32",
    }
    pick = {
        "best_values": "*fp32",
        "best_ids": "*i32",
        "draft_ids": "*i64",
        "tokens": "*i64",
        "tokens_stride": "i32",
        "tiles": "i32",
    }
    return [
        Configuration(kernel, signature, constants | {"SUBSET": subset}, **_OPTIONS)
        for kernel, signature, constants in ((_step, step, _STEP), (_pick, pick, _PICK))
        for subset in (False, True)
    ]


def bytes_moved(sequences: int, block: int, vocab: int, rank: int, element: int) -> int:
    """element: bytes of a weight and of a logit. vocab: ids that are drafted."""
    return block * vocab * (rank + sequences) * element


def markov_block(
    logits: Tensor,
    anchors: Tensor,
    w1: Tensor,
    w2: Tensor,
    temperature: Tensor,
    keys: Tensor,
    positions: Tensor,
    draft_ids: Tensor | None = None,
    transition: Transition | None = None,
) -> Tensor:
    """Launch on the device, twice per slot. w1, w2 and what `transition` gives have one dtype, at most 256 columns."""
    sequences, block, vocab = logits.shape
    rank = w2.shape[1]
    assert rank <= _STEP["RANK"], f"a Markov head of rank {rank} is beyond {_STEP['RANK']}, the largest supported"
    tiles = -(-vocab // _STEP["TOKENS"])
    device = logits.device
    # column k holds the token before slot k
    tokens = torch.empty((sequences, block + 1), dtype=torch.int64, device=device)
    tokens[:, 0] = anchors
    best_values = torch.empty((sequences, tiles), dtype=torch.float32, device=device)
    best_ids = torch.empty((sequences, tiles), dtype=torch.int32, device=device)
    ids = tokens if draft_ids is None else draft_ids
    if transition is not None:
        own_rows = torch.arange(sequences, device=device)
    for slot in range(block if sequences else 0):
        table, source = w1, tokens[:, slot]
        if transition is not None:
            table, source = transition(slot, F.embedding(source, w1)).contiguous(), own_rows
        _step[(tiles,)](
            logits[:, slot],
            logits.stride(0),
            table,
            source,
            source.stride(0),
            w2,
            temperature,
            keys,
            positions[:, slot],
            positions.stride(0),
            ids,
            best_values,
            best_ids,
            sequences,
            vocab,
            rank,
            **_STEP,
            SUBSET=draft_ids is not None,
            **_OPTIONS,
        )
        _pick[(sequences,)](
            best_values,
            best_ids,
            ids,
            tokens[:, slot + 1],
            tokens.stride(0),
            tiles,
            **_PICK,
            SUBSET=draft_ids is not None,
            **_OPTIONS,
        )
    return tokens[:, 1:]

"""Which drafts fill a step's budget, decided on the device: the same integers as the host's `fill_budget`.

    survival: [sequences, block] float32, ≥ 0, non-increasing along a block; caps: [sequences] int32, most drafts of each
    budget: [1] int32, drafts in total
    → [sequences] int32, drafts to verify of each: the `budget` highest survivals, a prefix of each block

Ties go to the lower row, and within it to the earlier draft. A draft is verified if fewer than `budget` drafts come before
it in that order, and to know that it is compared with all others: a program per 4 sequences reads the whole table (2 to 16
KB, from L2) in pieces of 8 sequences. So there is no search, no sort and no second launch, and everything is an integer:
nothing depends on an order. Moves sequences·(4·block + 8) bytes; bound by latency up to some hundred sequences.
"""

from __future__ import annotations

from typing import Any

import torch

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.language import jit, tl

_TILES = {"ROWS": 4, "OTHERS": 8, "BLOCK": 16}
_OPTIONS: dict[str, Any] = {"num_warps": 8}


@jit
def _survival_bits(survival, caps, first, sequences, block, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[ROWS·BLOCK] int32 in the order of the survivals, -1 where no draft may be verified."""
    i = tl.arange(0, ROWS * BLOCK)
    row, slot = first + i // BLOCK, i % BLOCK
    cap = tl.minimum(tl.load(caps + row, mask=row < sequences, other=0), block)
    values = tl.load(survival + row * block + slot, mask=slot < cap, other=0.0)
    bits = tl.where(values > 0.0, values, 0.0).to(tl.int32, bitcast=True)  # of non-negative floats bits are in order
    return tl.where(slot < cap, bits, -1)


@jit
def _fill_budget(
    survival,
    caps,
    budget,
    lengths,
    sequences,
    block,
    ROWS: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    own = _survival_bits(survival, caps, first, sequences, block, ROWS, BLOCK)
    place = first * BLOCK + tl.arange(0, ROWS * BLOCK)
    before = tl.zeros([ROWS * BLOCK], tl.int32)
    for start in range(0, sequences, OTHERS):
        others = _survival_bits(survival, caps, start, sequences, block, OTHERS, BLOCK)
        at = start * BLOCK + tl.arange(0, OTHERS * BLOCK)
        likelier = others[None, :] > own[:, None]
        earlier = (others[None, :] == own[:, None]) & (at[None, :] < place[:, None])
        before += tl.sum((likelier | earlier).to(tl.int32), axis=1)
    verified = (own >= 0) & (before < tl.load(budget))
    row = first + tl.arange(0, ROWS)
    length = tl.sum(tl.reshape(verified.to(tl.int32), [ROWS, BLOCK]), axis=1)
    tl.store(lengths + row, length, mask=row < sequences)


def configurations() -> list[Configuration]:
    signature = {
        "survival": "*fp32",
        "caps": "*i32",
        "budget": "*i32",
        "lengths": "*i32",
        "sequences": "i32",
        "block": "i32",
    }
    return [Configuration(_fill_budget, signature, _TILES, **_OPTIONS)]


def bytes_moved(sequences: int, block: int) -> int:
    return sequences * (4 * block + 8)


def fill_budget(survival: torch.Tensor, caps: torch.Tensor, budget: torch.Tensor) -> torch.Tensor:
    """Launch; nothing is read on the host."""
    sequences, block = survival.shape
    assert block <= _TILES["BLOCK"], f"a draft block of {block} tokens is longer than a KV block"
    lengths = torch.empty(sequences, dtype=torch.int32, device=survival.device)
    if sequences:
        grid = (-(-sequences // _TILES["ROWS"]),)
        _fill_budget[grid](survival, caps, budget, lengths, sequences, block, **_TILES, **_OPTIONS)
    return lengths

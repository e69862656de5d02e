"""Gumbel noise from a counter, on the device: the same integers, and the same bits, as `kernels/gumbel_noise.py`.

    keys, positions, rounds: [rows] int64 (a key is 64 bits, whatever their sign); stream: which use of noise
    → [rows, vocab] float32

One program makes 1024 neighbouring tokens of a row: 256 Philox blocks of four words, interleaved into token order. The
arithmetic is the CPU's, operation by operation: no library function, division rounded to nearest, and compiled without
fused multiply-add, so that every value is the CPU's to the bit. Nothing is read but the counters: a row depends on
nothing but its own numbers. Moves vocab·4 bytes per row; bound by arithmetic. Kernels that need noise make it where
they need it (`grouped_noise`, `token_noise`) and never store it.
"""

from __future__ import annotations

from typing import Any

import torch

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.language import jit, tl

_TILE = {"TOKENS": 1024}
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@jit
def log(x):
    """Natural logarithm of positive normal float32, error below 1 ulp of max(1, |log x|); plain arithmetic."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # from √½: the mantissa ends up in [√½, √2)
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    p = f * 7.0376836292e-2 + -1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f + -1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f + -1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f + -2.4999993993e-1
    p = p * f + 3.3333331174e-1
    e = exponent.to(tl.float32)
    y = p * f * square + e * -2.12194440e-4 - square * 0.5
    return (f + y) + e * 0.693359375


@jit
def gumbel(word):
    """One noise value from each random uint32 word."""
    two_to_minus_32 = 2.3283064365386963e-10
    u = (word.to(tl.float32) + 0.5) * two_to_minus_32
    v = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * two_to_minus_32
    low = word < 0x80000000
    w = tl.where(low, 1.0 - u, v)
    minus_log = -log(w)
    # log1p by the quotient trick: -log(1-u) = -log(w)·u/(1-w), exact in the rounding error of w = 1-u
    gap = 1.0 - w
    small = minus_log * tl.div_rn(u, tl.where(gap > 0.0, gap, 1.0))
    small = tl.where(gap > 0.0, small, u)
    return -log(tl.where(low, small, minus_log))


@jit
def _philox(group, key, position, turn, stream):
    zero = group * 0
    return tl.philox(
        key,
        group,
        position.to(tl.int32) + zero,
        stream + zero,
        turn.to(tl.int32) + zero,
    )


@jit
def grouped_noise(group, key, position, turn, stream):
    """Noise of the tokens 4·group … 4·group + 3. group: [..., n] int32, the rest int64 and broadcast → [..., 4n]."""
    a, b, c, d = _philox(group + key.to(tl.int32) * 0, key, position, turn, stream)
    return gumbel(tl.interleave(tl.interleave(a, c), tl.interleave(b, d)))


@jit
def token_noise(token, key, position, turn, stream):
    """Noise of any tokens [...] int32; four times the integer work of `grouped_noise`."""
    a, b, c, d = _philox((token >> 2) + key.to(tl.int32) * 0, key, position, turn, stream)
    word = token & 3
    return gumbel(tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d)))


@jit
def _gumbel_noise(keys, positions, rounds, out, vocab, stream, TOKENS: tl.constexpr):
    row, first = tl.program_id(0), tl.program_id(1) * TOKENS
    noise = grouped_noise(
        first // 4 + tl.arange(0, TOKENS // 4),
        tl.load(keys + row),
        tl.load(positions + row),
        tl.load(rounds + row),
        stream,
    )
    token = first + tl.arange(0, TOKENS)
    tl.store(out + row.to(tl.int64) * vocab + token, noise, mask=token < vocab)


def configurations() -> list[Configuration]:
    signature = {
        "keys": "*i64",
        "positions": "*i64",
        "rounds": "*i64",
        "out": "*fp32",
        "vocab": "i32",
        "stream": "i32",
    }
    return [Configuration(_gumbel_noise, signature, _TILE, **_OPTIONS)]


def bytes_moved(rows: int, vocab: int) -> int:
    return rows * (4 * vocab + 24)


def gumbel_noise(
    keys: torch.Tensor, positions: torch.Tensor, rounds: torch.Tensor, vocab: int, stream: int = 0
) -> torch.Tensor:
    """Launch; keys, positions and rounds: [rows] int64 on the device → [rows, vocab] float32."""
    rows = keys.shape[0]
    out = torch.empty((rows, vocab), dtype=torch.float32, device=keys.device)
    if out.numel():
        grid = (rows, -(-vocab // _TILE["TOKENS"]))
        _gumbel_noise[grid](keys, positions, rounds, out, vocab, stream, **_TILE, **_OPTIONS)
    return out

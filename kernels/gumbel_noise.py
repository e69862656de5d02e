"""Gumbel noise from a counter: noise(key, position)[token], the same everywhere, with no state.

    keys: [rows] uint64, one per sequence; positions, rounds: [rows] int64; stream: which use of noise
    → [rows, vocab] float32

Integers: Philox4x32-10 with the key's two halves and counter (token // 4, position, stream, round); token % 4 picks the
word x. Stream 0, round 0 is the coupled noise of target and drafter; rejection verification uses other streams, fresh
each round. u = (x + ½)·2⁻³²; E = -log(1 - u), exponentially distributed; noise = -log E, in [-3.2, 23]: finite always,
since u is never rounded to 0 or 1 (for u < ½ from x itself, else from its complement). Moves vocab·4 bytes per row;
bound by arithmetic. Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox); Gumbel-max:
argmax(logits + noise) is a sample from softmax(logits).
"""

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

from dspark.kernels.cpu import cpu_kernel, inner
from dspark.kernels.simd import bits_to_float, float_to_bits

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox_reference(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def gumbel_noise_reference(
    keys: NDArray[np.uint64], positions: NDArray[np.int64], rounds: NDArray[np.int64], vocab: int, stream: int = 0
) -> NDArray[np.float64]:
    """The same in double precision from the reference integers."""
    words = []
    for key, position, turn in zip(keys.tolist(), positions.tolist(), rounds.tolist(), strict=True):
        halves = (key & _MASK, key >> 32)
        blocks = [philox_reference((group, position, stream, turn), halves) for group in range((vocab + 3) // 4)]
        words.append([word for block in blocks for word in block][:vocab])
    u = (np.array(words, np.float64) + 0.5) * 2.0**-32
    return -np.log(-np.log1p(-u))


@inner
def log(x):
    """Natural logarithm of a positive normal float32, error below 1 ulp of max(1, |log x|); plain arithmetic."""
    bits = float_to_bits(x)
    shifted = np.int32(bits - np.uint32(0x3F3504F3))  # from √½: the mantissa ends up in [√½, √2)
    exponent = shifted >> np.int32(23)
    mantissa = bits_to_float(np.uint32(np.int32(bits) - (exponent << np.int32(23))))
    f = mantissa - np.float32(1.0)
    square = f * f
    p = np.float32(7.0376836292e-2)
    p = p * f + np.float32(-1.1514610310e-1)
    p = p * f + np.float32(1.1676998740e-1)
    p = p * f + np.float32(-1.2420140846e-1)
    p = p * f + np.float32(1.4249322787e-1)
    p = p * f + np.float32(-1.6668057665e-1)
    p = p * f + np.float32(2.0000714765e-1)
    p = p * f + np.float32(-2.4999993993e-1)
    p = p * f + np.float32(3.3333331174e-1)
    e = np.float32(exponent)
    y = p * f * square + e * np.float32(-2.12194440e-4) - np.float32(0.5) * square
    return (f + y) + e * np.float32(0.693359375)


@inner
def gumbel(word):
    """One noise value from one random word."""
    two_to_minus_32 = np.float32(2.3283064365386963e-10)
    u = (np.float32(word) + np.float32(0.5)) * two_to_minus_32
    v = (np.float32(~word) + np.float32(0.5)) * two_to_minus_32
    low = word < np.uint32(0x80000000)
    w = np.float32(1.0) - u if low else v
    minus_log = -log(w)
    # log1p by the quotient trick: -log(1-u) = -log(w)·u/(1-w), exact in the rounding error of w = 1-u
    gap = np.float32(1.0) - w
    small = minus_log * (u / (gap if gap > np.float32(0.0) else np.float32(1.0)))
    small = small if gap > np.float32(0.0) else u
    return -log(small if low else minus_log)


@inner
def philox_words(first_group, position, stream, turn, key, words):
    """Fill `words` [4, 16] with the Philox blocks of 16 groups: words[j, i] is word j of group first_group + i."""
    for i in range(16):
        c0, c1, c2, c3 = np.uint32(first_group + i), np.uint32(position), np.uint32(stream), np.uint32(turn)
        k0, k1 = np.uint32(key), np.uint32(key >> np.uint64(32))
        for _ in range(10):
            p0 = np.uint64(0xD2511F53) * np.uint64(c0)
            p1 = np.uint64(0xCD9E8D57) * np.uint64(c2)
            c0, c1 = np.uint32(p1 >> np.uint64(32)) ^ c1 ^ k0, np.uint32(p1)
            c2, c3 = np.uint32(p0 >> np.uint64(32)) ^ c3 ^ k1, np.uint32(p0)
            k0 = np.uint32(k0 + np.uint32(0x9E3779B9))
            k1 = np.uint32(k1 + np.uint32(0xBB67AE85))
        words[0, i], words[1, i], words[2, i], words[3, i] = c0, c1, c2, c3


def _gumbel_noise(keys, positions, rounds, stream, vocab, out):
    groups = (vocab + 3) // 4
    for row in numba.prange(positions.size):
        words = np.empty((4, 16), np.uint32)
        values = np.empty(64, np.float32)
        target = out[row]
        for first_group in range(0, groups, 16):
            philox_words(first_group, positions[row], stream, rounds[row], keys[row], words)
            flat = words.reshape(64)
            for i in range(64):
                values[i] = gumbel(flat[i])
            count = min(64, vocab - first_group * 4)
            for t in range(count):
                target[first_group * 4 + t] = values[t % 4 * 16 + t // 4]


_kernel = cpu_kernel(_gumbel_noise)


def gumbel_noise(
    keys: NDArray[np.uint64], positions: NDArray[np.int64], rounds: NDArray[np.int64], vocab: int, stream: int = 0
) -> NDArray[np.float32]:
    """Launch on the CPU; keys, positions and rounds: [rows] → [rows, vocab] float32."""
    out = np.empty((positions.size, vocab), np.float32)
    _kernel(keys, positions, rounds, stream, vocab, out)
    return out

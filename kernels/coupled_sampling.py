"""The target's token at every row: argmax of the perturbed, truncated logits.

    logits: [rows, vocab] float32, after all logits processors (argmax_rows: float32 or bfloat16)
    temperature, min_p, top_p: [rows] float32; top_k: [rows] int64 (0: off); temperature 0: greedy, noise unused
    noise: [rows, vocab] float32, Gumbel
    → [rows] int64

token = argmax(z + noise) over {z ≥ threshold}, z = logits / temperature: an exact sample of the truncated softmax(z).
Ties go to the lowest id. The threshold is a value, everything at or above it stays (ties included): top_k keeps the
k-th largest z; top_p, over what top_k kept, the smallest z such that the probability strictly above it is below top_p;
min_p z_max + log(min_p). Reads the logits once or twice and the noise once: 8-12·vocab bytes per row.
Source: Daliri, Musco, Suresh, arXiv 2408.07978.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from dspark.kernels.cpu import cpu_kernel, inner, like, view
from dspark.kernels.simd import dot, exp, to_float

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy."""


def truncation_threshold(z: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> float:
    """The smallest z [vocab] that the truncation keeps, by sorting; -inf when it keeps all."""
    threshold = -np.inf
    if 0 < top_k < z.size:
        threshold = np.sort(z)[-top_k]
    if top_p < 1.0:
        kept = np.sort(z[z >= threshold])[::-1].astype(np.float64)
        p = np.exp(kept - kept[0])
        p /= p.sum()
        threshold = max(threshold, kept[np.cumsum(p) - p < top_p][-1])
    if min_p > 0.0:
        threshold = max(threshold, z.max() + np.log(min_p))
    return float(threshold)


def sample_rows_reference(
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float32],
    min_p: NDArray[np.float32],
    noise: NDArray[np.float32],
) -> NDArray[np.int64]:
    """The same by sorting, in numpy."""
    tokens = np.empty(len(logits), np.int64)
    for row, values in enumerate(logits):
        if temperature[row] < GREEDY_BELOW:
            tokens[row] = values.argmax()
            continue
        z = values / temperature[row]
        threshold = truncation_threshold(z, int(top_k[row]), float(top_p[row]), float(min_p[row]))
        tokens[row] = np.where(z >= threshold, z + noise[row], -np.inf).argmax()
    return tokens


@inner
def _top_p_threshold(z, floor, highest, top_p):
    """Smallest z kept by top_p among z ≥ floor. Only ids that can be in the nucleus are sorted: those below

    (1 - top_p) / count of the largest weight sum to less than the excluded mass.
    """
    total = np.float64(0.0)
    for i in range(z.size):
        if z[i] >= floor:
            total += np.float64(exp(z[i] - highest))
    negligible = np.float32(np.float64(1.0 - top_p) * total / np.float64(z.size))
    count = 0
    for i in range(z.size):
        if z[i] >= floor and exp(z[i] - highest) >= negligible:
            count += 1
    candidates = np.empty(count, np.float32)
    at = 0
    for i in range(z.size):
        if z[i] >= floor and exp(z[i] - highest) >= negligible:
            candidates[at] = -z[i]
            at += 1
    candidates.sort()
    above = np.float64(0.0)
    last = 0
    for i in range(count):
        if above >= np.float64(top_p) * total:
            break
        last = i
        above += np.float64(exp(-candidates[i] - highest))
    return -candidates[last]


def _sample_rows(logits, temperature, top_k, top_p, min_p, noise, tokens):
    vocab = logits.shape[1]
    for row in numba.prange(logits.shape[0]):
        greedy = temperature[row] < np.float32(GREEDY_BELOW)
        z = np.empty(vocab, np.float32)
        scale = np.float32(1.0) if greedy else temperature[row]
        source = logits[row]
        for i in range(vocab):
            z[i] = source[i] / scale
        threshold = np.float32(-np.inf)
        if not greedy and (top_k[row] > 0 or top_p[row] < np.float32(1.0) or min_p[row] > np.float32(0.0)):
            highest = z.max()
            if 0 < top_k[row] < vocab:
                threshold = np.partition(z, vocab - top_k[row])[vocab - top_k[row]]
            if top_p[row] < np.float32(1.0):
                threshold = max(threshold, _top_p_threshold(z, threshold, highest, top_p[row]))
            if min_p[row] > np.float32(0.0):
                threshold = max(threshold, highest + np.log(min_p[row]))
        best = np.float32(-np.inf)
        token = 0
        for i in range(vocab):
            if z[i] >= threshold:
                value = z[i] if greedy else z[i] + noise[row, i]
                if value > best:
                    best = value
                    token = i
        tokens[row] = token


_sample_kernel = cpu_kernel(_sample_rows)


def sample_rows(
    logits: NDArray[np.float32],
    temperature: NDArray[np.float32],
    top_k: NDArray[np.int64],
    top_p: NDArray[np.float32],
    min_p: NDArray[np.float32],
    noise: NDArray[np.float32],
) -> NDArray[np.int64]:
    """Launch on the CPU. `noise` may have zero columns when every row is greedy."""
    tokens = np.empty(len(logits), np.int64)
    _sample_kernel(logits, temperature, top_k, top_p, min_p, noise, tokens)
    return tokens


def _argmax_rows(like, logits_address, hidden_address, weight_address, rows, vocab, size, tokens):
    logits = view(logits_address, rows * vocab, like)
    hidden = view(hidden_address, rows * size, like)
    weight = view(weight_address, vocab * size, like)
    lanes = 64
    for row in numba.prange(rows):
        source = logits[row * vocab : (row + 1) * vocab]
        highest = np.full(lanes, np.float32(-np.inf))
        whole = vocab // lanes * lanes
        for start in range(0, whole, lanes):
            piece = source[start : start + lanes]
            for i in range(lanes):
                value = to_float(piece[i])
                highest[i] = value if value > highest[i] else highest[i]
        best = highest.max()
        for i in range(whole, vocab):
            best = max(best, to_float(source[i]))
        token = -1
        exact = np.float32(0.0)
        rounded = source.itemsize < 4
        for i in range(vocab):
            if to_float(source[i]) == best and (rounded or token < 0):
                value = dot(hidden, row * size, weight, i * size, size)
                if token < 0 or value > exact:
                    token = i
                    exact = value
        tokens[row] = token


_argmax_kernel = cpu_kernel(_argmax_rows)


def argmax_rows(logits: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor) -> NDArray[np.int64]:
    """Greedy tokens straight from the head's output [rows, vocab] → [rows].

    bfloat16 logits are often equal at the top (they are 0.125 apart near 25), so equals are decided by their fp32
    logits, from hidden [rows, size] and the head's weight [vocab, size], `size` a multiple of 16. float32 logits, and
    what is still equal, go to the lowest id.
    """
    rows, vocab = logits.shape
    tokens = np.empty(rows, np.int64)
    _argmax_kernel(
        like(logits), logits.data_ptr(), hidden.data_ptr(), weight.data_ptr(), rows, vocab, weight.shape[1], tokens
    )
    return tokens


REFINE_WITHIN = 6.0
"""Logits further below the largest keep their rounding: at temperature 1 such a token has a chance below 1 in 400,
which rounding moves by 6 %."""


def _refine_logits(logits, like, hidden_address, weight_address, size, within):
    rows, vocab = logits.shape
    hidden = view(hidden_address, rows * size, like)
    weight = view(weight_address, vocab * size, like)
    for row in numba.prange(rows):
        values = logits[row]
        lowest = values.max() - within
        for i in range(vocab):
            if values[i] >= lowest:
                values[i] = dot(hidden, row * size, weight, i * size, size)


_refine_kernel = cpu_kernel(_refine_logits)


def refine_logits(logits: NDArray[np.float32], hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Replace, in place, every logit within REFINE_WITHIN of its row's largest by the fp32 product it was rounded from.

    logits: [rows, vocab] float32 copies of bfloat16 logits; hidden: [rows, size]; weight: [vocab, size].
    """
    _refine_kernel(
        logits, like(hidden), hidden.data_ptr(), weight.data_ptr(), weight.shape[1], np.float32(REFINE_WITHIN)
    )

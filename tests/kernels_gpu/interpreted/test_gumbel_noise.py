"""The device's noise has the CPU's integers and the CPU's bits, and is finite for every word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark.kernels import gumbel_noise as cpu
from dspark.kernels.gpu import gumbel_noise as gpu
from dspark.kernels.gpu.language import jit, tl

ALL_ONES = 0xFFFFFFFF


@jit
def words_to_noise(words, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    word = tl.load(words + i).to(tl.uint32, bitcast=True)
    tl.store(out + i, gpu.gumbel(word))


@jit
def noise_of_tokens(tokens, key, position, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(
        out + i,
        gpu.token_noise(tl.load(tokens + i), tl.load(key), tl.load(position), tl.load(position) * 0, 0),
    )


def gumbels(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    size = 1 << (len(words) - 1).bit_length()
    padded = torch.zeros(size, dtype=torch.int32)
    padded[: len(words)] = torch.from_numpy(words.view(np.int32))
    out = torch.full((size,), float("nan"))
    words_to_noise[(1,)](padded, out, SIZE=size)
    return out[: len(words)].numpy()


def cpu_gumbels(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.array([cpu.gumbel(word) for word in words], np.float32)


def bits(values: NDArray[np.float32]) -> NDArray[np.uint32]:
    return np.ascontiguousarray(values).view(np.uint32)


def edge_words() -> NDArray[np.uint32]:
    """Around every power of two from below and from above, where the branches of log and log1p meet."""
    powers = (1 << np.arange(32)).astype(np.int64)
    around = np.concatenate([powers + d for d in range(-3, 4)])
    edges = np.concatenate([around, ALL_ONES - around, [0, ALL_ONES]])
    return np.unique(edges[(edges >= 0) & (edges <= ALL_ONES)]).astype(np.uint32)


def counters() -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    keys = np.array([0, 1, 0xFFFFFFFFFFFFFFFF, 0x123456789ABCDEF0, 0x8000000000000000], np.uint64)
    return keys, np.array([0, 1, 131_071, 17, (1 << 31) - 1]), np.array([0, 0, 5, 1 << 20, 3])


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(("vocab", "stream"), [(1, 0), (1023, 3), (1024, 0), (2050, 0)])
def test_has_the_bits_of_the_cpu_for_any_vocabulary_key_position_round_and_stream(vocab: int, stream: int) -> None:
    keys, positions, rounds = counters()
    got = gpu.gumbel_noise(
        torch.from_numpy(keys.view(np.int64)), torch.from_numpy(positions), torch.from_numpy(rounds), vocab, stream
    )
    wanted = cpu.gumbel_noise(keys, positions, rounds, vocab, stream)
    assert got.shape == (5, vocab)
    assert np.array_equal(bits(got.numpy()), bits(wanted))


def test_every_region_of_the_random_word_has_the_bits_of_the_cpu() -> None:
    words = np.concatenate([edge_words(), np.random.default_rng(0).integers(0, 1 << 32, 20_000, np.uint32)])
    assert np.array_equal(bits(gumbels(words)), bits(cpu_gumbels(words)))


def test_every_region_of_the_random_word_is_within_4_ulp_of_double_precision() -> None:
    words = edge_words()
    exact = -np.log(-np.log1p(-(words.astype(np.float64) + 0.5) * 2.0**-32))
    ulp = np.spacing(np.maximum(1.0, np.abs(exact)).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(gumbels(words) - exact) / ulp) <= 4


def test_extreme_words_give_finite_noise_within_the_stated_bounds() -> None:
    lowest, highest = gumbels(np.array([ALL_ONES, 0], np.uint32))
    assert -3.2 < lowest < -3.0
    assert 22.0 < highest < 23.0


def test_noise_of_single_tokens_is_that_of_the_whole_row() -> None:
    tokens = torch.tensor([0, 1, 2, 3, 4, 129, 126, 7], dtype=torch.int32)
    out = torch.full((8,), float("nan"))
    noise_of_tokens[(1,)](tokens, torch.tensor([-5]), torch.tensor([77]), out, SIZE=8)
    row = cpu.gumbel_noise(np.array([-5]).view(np.uint64), np.array([77]), np.array([0]), 130)[0]
    assert np.array_equal(bits(out.numpy()), bits(row[tokens.numpy()]))


def test_a_row_depends_on_nothing_but_its_own_numbers() -> None:
    keys, positions, rounds = (torch.from_numpy(one.view(np.int64)) for one in counters())
    together = gpu.gumbel_noise(keys, positions, rounds, 130)
    for i in range(5):
        alone = gpu.gumbel_noise(keys[i : i + 1], positions[i : i + 1], rounds[i : i + 1], 130)
        assert torch.equal(alone[0], together[i])


def test_no_rows_give_no_rows() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert gpu.gumbel_noise(none, none, none, 130).shape == (0, 130)

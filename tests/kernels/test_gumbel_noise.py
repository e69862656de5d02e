"""The noise is Philox, is Gumbel, is finite, and depends on key, position, round, stream and token only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import gumbel_r, kstest, pearsonr

from dspark.kernels import gumbel_noise as module
from dspark.kernels.gumbel_noise import gumbel_noise, gumbel_noise_reference, philox_reference

ALL_ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # counter, key, output: the published test vectors of Random123
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, (ALL_ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@numba.njit(error_model="numpy")
def words_of(first_group, position, stream, turn, key, words):
    module.philox_words(first_group, position, stream, turn, key, words)


@numba.njit(error_model="numpy")
def gumbel_of_all(words, out):
    for i in range(words.size):
        out[i] = module.gumbel(words[i])


def gumbels(words: NDArray[np.uint32]) -> NDArray[np.float32]:
    out = np.empty(words.size, np.float32)
    gumbel_of_all(words, out)
    return out


def noise(
    key: int = 7, positions: int | list[int] = 1000, vocab: int = 4096, turn: int = 0, stream: int = 0
) -> NDArray[np.float32]:
    """One key and round, [positions, vocab]."""
    at = np.arange(positions) if isinstance(positions, int) else np.array(positions)
    return gumbel_noise(np.full(len(at), key, np.uint64), at, np.full(len(at), turn), vocab, stream)


def assert_within_4_ulp(got: NDArray[np.float32], exact: NDArray[np.float64]) -> None:
    ulp = np.spacing(np.maximum(1.0, np.abs(exact)).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(got - exact) / ulp) <= 4


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_reference_gives_the_published_philox_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], output: tuple[int, int, int, int]
) -> None:
    assert philox_reference(counter, key) == output


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_the_kernel_gives_the_published_philox_vectors(
    counter: tuple[int, int, int, int], key: tuple[int, int], output: tuple[int, int, int, int]
) -> None:
    words = np.empty((4, 16), np.uint32)
    group, position, stream, turn = counter
    words_of(group, position, stream, turn, np.uint64(key[0] | key[1] << 32), words)
    assert tuple(words[:, 0].tolist()) == output


@pytest.mark.parametrize("vocab", [1, 3, 4, 5, 63, 64, 65, 130, 320])
@pytest.mark.parametrize("stream", [0, 3])
def test_equals_the_reference_for_any_vocabulary_size(vocab: int, stream: int) -> None:
    keys = np.array([0, 1, 0xFFFFFFFFFFFFFFFF, 0x123456789ABCDEF0], np.uint64)
    positions, rounds = np.array([0, 1, 131_071, 17]), np.array([0, 0, 5, 1 << 20])
    got = gumbel_noise(keys, positions, rounds, vocab, stream)
    assert got.dtype == np.float32
    assert got.shape == (4, vocab)
    assert_within_4_ulp(got, gumbel_noise_reference(keys, positions, rounds, vocab, stream))


def test_every_region_of_the_random_word_is_within_4_ulp_of_double_precision() -> None:
    powers = (1 << np.arange(32)).astype(np.int64)
    around = np.concatenate([powers + d for d in range(-3, 4)])
    edges = np.concatenate([around, (1 << 32) - 1 - around])
    spread = np.random.default_rng(0).integers(0, 1 << 32, 400_000)
    words = np.concatenate([edges[(edges >= 0) & (edges < 1 << 32)], spread]).astype(np.uint32)
    u = (words.astype(np.float64) + 0.5) * 2.0**-32
    assert_within_4_ulp(gumbels(words), -np.log(-np.log1p(-u)))


def test_extreme_words_give_finite_noise_within_the_stated_bounds() -> None:
    lowest, highest = gumbels(np.array([ALL_ONES, 0], np.uint32))
    assert -3.2 < lowest < -3.0
    assert 22.0 < highest < 23.0


def test_is_distributed_as_gumbel() -> None:
    assert kstest(noise(positions=64).ravel().astype(np.float64), gumbel_r.cdf).pvalue > 1e-3


def test_the_tails_have_gumbels_weight() -> None:
    values = noise(positions=1000)
    for level in (1e-3, 1e-4, 1e-5):
        expected = level * values.size
        for count in ((values > gumbel_r.isf(level)).sum(), (values < gumbel_r.ppf(level)).sum()):
            assert abs(count - expected) < 4 * np.sqrt(expected)


@pytest.mark.parametrize(
    "other",
    [{"key": 8}, {"key": 7 + (1 << 32)}, {"turn": 1}, {"stream": 1}, {"positions": list(range(64, 128))}],
    ids=["key", "upper half of the key", "round", "stream", "position"],
)
def test_noise_of_another_key_position_round_or_stream_is_independent(other: dict[str, Any]) -> None:
    a, b = noise(positions=64).ravel(), noise(**({"positions": 64} | other)).ravel()
    assert abs(pearsonr(a, b).statistic) < 4 / np.sqrt(a.size)
    assert not np.isin(a.reshape(64, -1)[:, :1], b.reshape(64, -1)[:, :1]).any()


def test_neighbouring_tokens_are_independent() -> None:
    values = noise(positions=64)
    for lag in (1, 2, 3, 4, 16, 64):
        a, b = values[:, lag:].ravel(), values[:, :-lag].ravel()
        assert abs(pearsonr(a, b).statistic) < 4 / np.sqrt(a.size)


def test_a_row_depends_on_nothing_but_its_own_numbers() -> None:
    together = noise(positions=[5, 0, 99, 5], vocab=130)
    for i, position in enumerate([5, 0, 99, 5]):
        assert np.array_equal(noise(positions=[position], vocab=130)[0], together[i])


def test_a_larger_vocabulary_only_adds_tokens() -> None:
    assert np.array_equal(noise(positions=3, vocab=200)[:, :67], noise(positions=3, vocab=67))


def test_no_rows_give_no_rows() -> None:
    assert noise(positions=0, vocab=130).shape == (0, 130)


def test_one_and_two_threads_give_the_same_bits(set_threads: Callable[[int], None]) -> None:
    set_threads(1)
    one = noise(positions=9, vocab=130)
    set_threads(2)
    assert np.array_equal(noise(positions=9, vocab=130), one)

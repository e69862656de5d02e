"""Cached noise is the noise itself, the cache is bounded, and keys tell requests, choices and prompts apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dspark.engine import noise as module
from dspark.engine.noise import NoiseCache, Stream, sequence_key
from dspark.kernels.gumbel_noise import gumbel_noise

VOCAB = 130
ROW_BYTES = 4 * VOCAB


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The (key, position) of every row that the generator was asked for, in order."""
    rows: list[tuple[int, int]] = []

    def recording(keys: NDArray[np.uint64], positions: NDArray[np.int64], *rest: Any) -> NDArray[np.float32]:
        rows.extend(zip(keys.tolist(), positions.tolist(), strict=True))
        return gumbel_noise(keys, positions, *rest)

    monkeypatch.setattr(module, "gumbel_noise", recording)
    return rows


def rows_of(cache: NoiseCache, *wanted: tuple[int, int]) -> NDArray[np.float32]:
    keys, positions = zip(*wanted, strict=True)
    return cache.rows(np.array(keys, np.uint64), np.array(positions, np.int64))


def plain(*wanted: tuple[int, int]) -> NDArray[np.float32]:
    keys, positions = zip(*wanted, strict=True)
    at = np.array(positions, np.int64)
    return gumbel_noise(np.array(keys, np.uint64), at, np.zeros(len(at), np.int64), VOCAB, Stream.COUPLED)


def test_rows_are_the_coupled_noise_whether_made_now_or_before() -> None:
    cache = NoiseCache(VOCAB)
    rng = np.random.default_rng(0)
    for _ in range(30):
        wanted = [(int(rng.integers(5)) + 2**63, int(rng.integers(12))) for _ in range(8)]
        assert np.array_equal(rows_of(cache, *wanted), plain(*wanted))
        cache.drop_before(2**63 + int(rng.integers(5)), int(rng.integers(12)))
        cache.forget(2**63 + int(rng.integers(20)))


def test_a_row_is_made_once(made: list[tuple[int, int]]) -> None:
    cache = NoiseCache(VOCAB)
    rows_of(cache, (1, 5), (1, 6))
    rows_of(cache, (1, 6), (1, 7), (2, 6))
    assert made == [(1, 5), (1, 6), (1, 7), (2, 6)]


def test_rows_behind_the_sequence_are_dropped_and_the_others_kept(made: list[tuple[int, int]]) -> None:
    cache = NoiseCache(VOCAB)
    rows_of(cache, (1, 5), (1, 6), (2, 5))
    cache.drop_before(1, 6)
    made.clear()
    rows_of(cache, (1, 5), (1, 6), (2, 5))
    assert made == [(1, 5)]


def test_a_forgotten_sequence_keeps_nothing_and_others_keep_theirs(made: list[tuple[int, int]]) -> None:
    cache = NoiseCache(VOCAB)
    rows_of(cache, (1, 5), (1, 6), (2, 5))
    cache.forget(1)
    made.clear()
    rows_of(cache, (1, 5), (1, 6), (2, 5))
    assert made == [(1, 5), (1, 6)]


def test_dropping_and_forgetting_an_unknown_sequence_is_harmless() -> None:
    cache = NoiseCache(VOCAB)
    cache.drop_before(9, 100)
    cache.forget(9)


def test_no_more_rows_are_kept_than_fit_the_limit(made: list[tuple[int, int]]) -> None:
    cache = NoiseCache(VOCAB, max_bytes=3 * ROW_BYTES + 5)
    wanted = [(1, position) for position in range(5)]
    rows_of(cache, *wanted)
    made.clear()
    assert np.array_equal(rows_of(cache, *wanted), plain(*wanted))
    assert made == wanted[3:]


def test_dropped_and_forgotten_rows_make_room_for_new_ones(made: list[tuple[int, int]]) -> None:
    cache = NoiseCache(VOCAB, max_bytes=2 * ROW_BYTES)
    for key in range(20):
        rows_of(cache, (key, 0), (key, 1))
        cache.drop_before(key, 1)
        rows_of(cache, (key, 2))
        made.clear()
        rows_of(cache, (key, 1), (key, 2))
        assert made == []
        cache.forget(key)


def test_equal_requests_in_one_batch_do_not_use_up_the_limit(made: list[tuple[int, int]]) -> None:
    cache = NoiseCache(VOCAB, max_bytes=2 * ROW_BYTES)
    for position in range(20):
        assert np.array_equal(rows_of(cache, (1, position), (1, position)), plain((1, position), (1, position)))
        cache.drop_before(1, position + 1)
    rows_of(cache, (1, 20), (1, 21))
    made.clear()
    rows_of(cache, (1, 20), (1, 21))
    assert made == []


def test_changing_a_returned_row_does_not_change_the_kept_one() -> None:
    cache = NoiseCache(VOCAB)
    rows_of(cache, (1, 5))[:] = 0.0
    rows_of(cache, (1, 5))[:] = 0.0
    assert np.array_equal(rows_of(cache, (1, 5)), plain((1, 5)))


def test_keys_tell_seeds_choices_and_prompts_apart() -> None:
    prompt = np.array([1, 2, 3], np.int64)
    keys = {
        sequence_key(0, 0, prompt),
        sequence_key(1, 0, prompt),
        sequence_key(-1, 0, prompt),
        sequence_key(2**63, 0, prompt),
        sequence_key(0, 1, prompt),
        sequence_key(0, 0, prompt[:2]),
        sequence_key(0, 0, prompt[::-1].copy()),
        sequence_key(0, 0, np.empty(0, np.int64)),
    }
    assert len(keys) == 8
    assert all(0 <= key < 2**64 for key in keys)


def test_the_same_request_has_the_same_key() -> None:
    prompt = np.array([1, 2, 3], np.int64)
    assert sequence_key(7, 2, prompt) == sequence_key(7, 2, prompt.copy())


def test_streams_are_distinct() -> None:
    assert len({int(stream) for stream in Stream}) == len(Stream) == 4

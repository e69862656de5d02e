"""A token is an exact sample of the truncated softmax, and ties go to the lowest id."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from dspark.kernels.coupled_sampling import (
    REFINE_WITHIN,
    argmax_rows,
    refine_logits,
    sample_rows,
    sample_rows_reference,
)
from dspark.kernels.gumbel_noise import gumbel_noise


@dataclass(frozen=True)
class Rows:
    """The arguments of `sample_rows`."""

    logits: NDArray[np.float32]
    temperature: NDArray[np.float32]
    top_k: NDArray[np.int64]
    top_p: NDArray[np.float32]
    min_p: NDArray[np.float32]
    noise: NDArray[np.float32]

    def sample(self, kernel: Callable[..., NDArray[np.int64]] = sample_rows) -> list[int]:
        tokens = kernel(self.logits, self.temperature, self.top_k, self.top_p, self.min_p, self.noise)
        assert tokens.dtype == np.int64
        return tokens.tolist()

    def row(self, i: int) -> Rows:
        at = slice(i, i + 1)
        return Rows(*(values[at] for values in vars(self).values()))


def rows_of(
    logits: NDArray[np.float32],
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    noise: NDArray[np.float32] | None = None,
) -> Rows:
    """Every row sampled with the same parameters, by default with no noise: the best token that truncation keeps."""
    count = len(logits)
    return Rows(
        logits=logits.astype(np.float32),
        temperature=np.full(count, temperature, np.float32),
        top_k=np.full(count, top_k, np.int64),
        top_p=np.full(count, top_p, np.float32),
        min_p=np.full(count, min_p, np.float32),
        noise=np.zeros_like(logits, np.float32) if noise is None else noise.astype(np.float32),
    )


def kept_by(logits: list[float], **parameters: float) -> list[int]:
    """The ids that truncation keeps: each is made the winner by noise, and wins if it is kept."""
    row = np.array([logits], np.float32)
    every = rows_of(np.repeat(row, row.size, axis=0), noise=1e6 * np.eye(row.size), **parameters)
    tokens = every.sample()
    assert tokens == every.sample(sample_rows_reference)
    return [i for i, token in enumerate(tokens) if token == i]


def mixed_rows(count: int, vocab: int, seed: int) -> Rows:
    """Random logits with many ties; every combination of parameters occurs, greedy included."""
    rng = np.random.default_rng(seed)
    logits = np.round(3 * rng.standard_normal((count, vocab)), 1).astype(np.float32)
    return Rows(
        logits=logits,
        temperature=rng.choice(np.array([0.0, 1e-6, 0.3, 0.7, 1.0, 1.5], np.float32), count),
        top_k=rng.choice(np.array([0, 1, 2, 5, vocab - 1, vocab, vocab + 7]), count),
        top_p=rng.choice(np.array([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6], np.float32), count),
        min_p=rng.choice(np.array([0.0, 0.05, 0.5, 1.0], np.float32), count),
        noise=gumbel_noise(np.arange(count, dtype=np.uint64), np.arange(count), np.zeros(count, np.int64), vocab),
    )


@pytest.mark.parametrize("vocab", [8, 63, 64, 65, 130, 1000])
def test_equals_the_reference_under_any_mix_of_parameters(vocab: int) -> None:
    rows = mixed_rows(300, vocab, seed=vocab)
    assert rows.sample() == rows.sample(sample_rows_reference)


def test_greedy_rows_take_the_lowest_id_of_the_largest_logit_and_need_no_noise() -> None:
    logits = np.array([[1, 5, 5, 0], [7, 7, 7, 7], [-9, -9, -8, -8]], np.float32)
    assert rows_of(logits, temperature=0.0, noise=np.empty((3, 0))).sample() == [1, 0, 2]


def test_greedy_rows_ignore_truncation() -> None:
    logits = np.array([[1, 5, 5, 0]], np.float32)
    assert rows_of(logits, temperature=0.0, top_k=1, top_p=0.1, min_p=0.9).sample() == [1]


def test_equal_perturbed_logits_go_to_the_lowest_id() -> None:
    assert rows_of(np.array([[3.0, 1.0, 2.0]]), noise=np.array([[0.0, 2.0, 1.0]])).sample() == [0]


def test_the_temperature_divides_the_logits_and_not_the_noise() -> None:
    logits, noise = np.array([[0.0, 4.0]]), np.array([[3.0, 0.0]])
    assert rows_of(logits, temperature=1.0, noise=noise).sample() == [1]
    assert rows_of(logits, temperature=2.0, noise=noise).sample() == [0]


def test_banned_tokens_are_never_taken() -> None:
    logits = [-np.inf, 0.0, -np.inf, -1.0]
    assert kept_by(logits) == [1, 3]
    assert kept_by(logits, top_k=3, top_p=0.99, min_p=1e-3) == [1, 3]


def test_top_k_keeps_the_k_largest_and_all_that_equal_the_last_of_them() -> None:
    logits = [1.0, 4.0, 3.0, 3.0, 2.0, 3.0]
    assert kept_by(logits, top_k=1) == [1]
    assert kept_by(logits, top_k=2) == [1, 2, 3, 5]
    assert kept_by(logits, top_k=4) == [1, 2, 3, 5]
    assert kept_by(logits, top_k=5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("top_k", [0, 6, 7, 1000])
def test_top_k_of_zero_or_of_the_vocabulary_and_more_keeps_everything(top_k: int) -> None:
    assert kept_by([1.0, 4.0, 3.0, 3.0, 2.0, 3.0], top_k=top_k) == list(range(6))


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept_by(logits, top_p=0.35) == [1]
    assert kept_by(logits, top_p=0.45) == [1, 3]
    assert kept_by(logits, top_p=0.65) == [1, 3]
    assert kept_by(logits, top_p=0.75) == [1, 2, 3]
    assert kept_by(logits, top_p=0.95) == [0, 1, 2, 3]


def test_a_tiny_top_p_keeps_the_best_and_all_that_equal_it() -> None:
    assert kept_by([1.0, 4.0, 3.0], top_p=1e-9) == [1]
    assert kept_by([4.0, 1.0, 4.0], top_p=1e-9) == [0, 2]


def test_top_p_counts_only_what_top_k_kept() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept_by(logits, top_p=0.55) == [1, 3]
    assert kept_by(logits, top_p=0.55, top_k=2) == [1]  # 0.4 of 0.7 is 0.57


def test_top_p_keeps_very_unlikely_tokens_when_it_is_one() -> None:
    assert kept_by([0.0, -60.0], top_p=1.0) == [0, 1]


def test_min_p_keeps_what_is_at_least_that_share_of_the_most_likely() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept_by(logits, min_p=0.3) == [1, 2, 3]
    assert kept_by(logits, min_p=0.7) == [1, 3]
    assert kept_by(logits, min_p=1.0) == [1]


def test_truncation_looks_at_the_distribution_after_temperature() -> None:
    logits = np.log([0.1, 0.4, 0.2, 0.3]).tolist()
    assert kept_by(logits, min_p=0.3, temperature=4.0) == [0, 1, 2, 3]
    assert kept_by(logits, min_p=0.3, temperature=0.25) == [1, 3]


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_tokens_have_the_frequencies_of_the_truncated_softmax(parameters: dict[str, float]) -> None:
    draws = 20_000
    logits = np.array([0.3, 1.2, -0.5, 0.9, -2.0, 0.1, 1.19, -0.8])
    keep = kept_by(logits.tolist(), **parameters)
    weights = np.exp(logits[keep] / parameters.get("temperature", 1.0))
    noise = gumbel_noise(np.full(draws, 3, np.uint64), np.arange(draws), np.zeros(draws, np.int64), logits.size)
    tokens = rows_of(np.repeat(logits[None], draws, axis=0), noise=noise, **parameters).sample()
    counts = np.bincount(tokens, minlength=logits.size)
    assert counts.sum() == counts[keep].sum()
    if len(keep) > 1:
        assert chisquare(counts[keep], draws * weights / weights.sum()).pvalue > 1e-3


def test_a_row_alone_gives_the_token_of_the_row_in_the_batch() -> None:
    rows = mixed_rows(60, 130, seed=1)
    assert rows.sample() == [rows.row(i).sample()[0] for i in range(60)]


def test_no_rows_give_no_tokens() -> None:
    assert rows_of(np.empty((0, 130))).sample() == []


def test_sampling_leaves_its_inputs_alone() -> None:
    rows = mixed_rows(20, 65, seed=2)
    before = replace(rows, logits=rows.logits.copy(), noise=rows.noise.copy())
    rows.sample()
    assert np.array_equal(rows.logits, before.logits)
    assert np.array_equal(rows.noise, before.noise)


def test_one_and_two_threads_give_the_same_tokens(set_threads: Callable[[int], None]) -> None:
    rows = mixed_rows(60, 130, seed=3)
    set_threads(1)
    one = rows.sample()
    set_threads(2)
    assert rows.sample() == one


def head(vocab: int, size: int, rows: int, dtype: torch.dtype, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in dtype, the hidden states and the weight that gave them."""
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(rows, size, generator=generator).to(dtype)
    weight = (spread * torch.randn(vocab, size, generator=generator)).to(dtype)
    return (hidden.float() @ weight.float().T).to(dtype), hidden, weight


@pytest.mark.parametrize("vocab", [1, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_finds_the_largest_logit_wherever_it_is(vocab: int, dtype: torch.dtype) -> None:
    _, hidden, weight = head(vocab, 32, 1, dtype)
    for token in {0, vocab // 2, max(0, vocab - 2), vocab - 1}:
        logits = torch.full((1, vocab), -3.0, dtype=dtype)
        logits[0, token] = -2.0
        assert argmax_rows(logits, hidden, weight).tolist() == [token]


def test_argmax_of_bfloat16_equals_that_of_the_fp32_product() -> None:
    logits, hidden, weight = head(5000, 32, 400, torch.bfloat16)
    top = logits.max(dim=1, keepdim=True).values
    assert ((logits == top).sum(dim=1) > 1).any(), "no row has a tie, so nothing is tested"
    wanted = (hidden.double() @ weight.double().T).argmax(dim=1)
    assert torch.equal(torch.from_numpy(argmax_rows(logits, hidden, weight)), wanted)


def test_bfloat16_equals_are_decided_by_their_fp32_logits() -> None:
    hidden = torch.zeros(1, 16, dtype=torch.bfloat16)
    hidden[0, :2] = torch.tensor([1.0, 2.0**-10])
    weight = torch.zeros(5, 16, dtype=torch.bfloat16)
    weight[[1, 2, 4], 0] = 8.0
    weight[:, 1] = torch.tensor([64.0, 1.0, 3.0, 64.0, 2.0])
    logits = (hidden.float() @ weight.float().T).bfloat16()
    assert logits[0, 1] == logits[0, 2] == logits[0, 4]
    assert argmax_rows(logits, hidden, weight).tolist() == [2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    _, hidden, weight = head(90, 32, 3, dtype)
    weight[[20, 41, 77, 88]] = 4 * hidden[:1]
    logits = (hidden.float() @ weight.float().T).to(dtype)
    assert argmax_rows(logits[:1], hidden[:1], weight).tolist() == [20]


def test_float32_logits_are_taken_as_they_are() -> None:
    hidden, weight = torch.ones(1, 16), torch.arange(5.0)[:, None].expand(5, 16).contiguous()
    logits = torch.tensor([[0.0, 9.0, 9.0, 0.0, 9.0]])
    assert argmax_rows(logits, hidden, weight).tolist() == rows_of(logits.numpy(), temperature=0.0).sample() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_argmax_of_a_row_alone_and_on_two_threads_is_the_same(
    dtype: torch.dtype, set_threads: Callable[[int], None]
) -> None:
    logits, hidden, weight = head(1000, 32, 12, dtype)
    set_threads(1)
    together = argmax_rows(logits, hidden, weight).tolist()
    alone = [int(argmax_rows(logits[i : i + 1], hidden[i : i + 1], weight)[0]) for i in range(12)]
    set_threads(2)
    assert alone == together == argmax_rows(logits, hidden, weight).tolist()


def test_refining_replaces_the_likely_logits_by_their_fp32_products_and_keeps_the_others() -> None:
    logits, hidden, weight = head(700, 32, 9, torch.bfloat16)
    rounded = logits.float().numpy()
    refined = rounded.copy()
    refine_logits(refined, hidden, weight)
    likely = rounded >= rounded.max(axis=1, keepdims=True) - REFINE_WITHIN
    assert likely.any()
    assert not likely.all()
    exact = (hidden.double() @ weight.double().T).numpy()
    np.testing.assert_allclose(refined[likely], exact[likely], rtol=1e-6, atol=1e-5)
    assert not np.array_equal(refined[likely], rounded[likely])
    assert np.array_equal(refined[~likely], rounded[~likely])


def test_refining_a_row_alone_and_on_two_threads_gives_the_same_bits(set_threads: Callable[[int], None]) -> None:
    logits, hidden, weight = head(700, 32, 9, torch.bfloat16)
    set_threads(1)
    together = logits.float().numpy()
    refine_logits(together, hidden, weight)
    alone = logits.float().numpy()
    for i in range(9):
        refine_logits(alone[i : i + 1], hidden[i : i + 1], weight)
    set_threads(2)
    threaded = logits.float().numpy()
    refine_logits(threaded, hidden, weight)
    assert np.array_equal(alone, together)
    assert np.array_equal(threaded, together)


def test_argmax_agrees_with_the_greedy_sample_of_refined_logits() -> None:
    logits, hidden, weight = head(5000, 32, 400, torch.bfloat16)
    refined = logits.float().numpy()
    refine_logits(refined, hidden, weight)
    assert rows_of(refined, temperature=0.0).sample() == argmax_rows(logits, hidden, weight).tolist()

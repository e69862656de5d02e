"""The device takes the CPU's tokens, under any mix of parameters, whatever else is in the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark.engine.verification import accept_coupled
from dspark.kernels.coupled_sampling import sample_rows_reference
from dspark.kernels.gpu.coupled_sampling import GROUP, LISTED, TILE, accept_drafts, best_of_tiles, sample_rows
from dspark.kernels.gpu.language import jit, tl
from dspark.kernels.gumbel_noise import gumbel_noise

pytestmark = pytest.mark.usefixtures("nan_filled")

INF = float("inf")


@dataclass(frozen=True)
class Rows:
    """The arguments of `sample_rows`."""

    logits: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    keys: Tensor
    positions: Tensor

    def sample(self) -> list[int]:
        tokens = sample_rows(**vars(self))
        assert tokens.dtype == torch.int64
        return tokens.tolist()

    def by_the_cpu(self) -> list[int]:
        """The reference sorts, and takes the CPU's noise."""
        positions = self.positions.numpy()
        noise = gumbel_noise(
            self.keys.numpy().view(np.uint64), positions, np.zeros_like(positions), self.logits.shape[1]
        )
        params = (one.numpy() for one in (self.temperature, self.top_k, self.top_p, self.min_p))
        return sample_rows_reference(self.logits.float().numpy(), *params, noise).tolist()

    def pick(self, rows: list[int]) -> Rows:
        return Rows(*(values[rows] for values in vars(self).values()))


def rows_of(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = 0
) -> Rows:
    """Every row sampled with the same parameters and a key of its own."""
    count = len(logits)
    return Rows(
        logits=logits,
        temperature=torch.full((count,), temperature),
        top_k=torch.full((count,), top_k),
        top_p=torch.full((count,), top_p),
        min_p=torch.full((count,), min_p),
        keys=torch.arange(count) * 7919 + seed,
        positions=torch.arange(count) % 5,
    )


MIXED = [  # temperature, top_k, top_p, min_p
    (0.0, 5, 0.5, 0.5),
    (1e-6, 0, 1.0, 0.0),
    (0.7, 0, 1.0, 0.0),
    (1.5, 10_000, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (1.5, 0, 0.9, 0.0),
    (0.3, 0, 1.0, 0.05),
    (1.0, 7, 0.5, 0.0),
    (1.5, 40, 0.999, 0.02),
    (1.0, 0, 0.1, 0.5),
]


def mixed_rows(vocab: int, seed: int, dtype: torch.dtype = torch.float32) -> Rows:
    """A row for each of MIXED, greedy first; random logits, many of them equal."""
    rng = np.random.default_rng(seed)
    temperature, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*MIXED, strict=True))
    return Rows(
        logits=torch.from_numpy(np.round(3 * rng.standard_normal((len(MIXED), vocab)), 1)).to(dtype),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        keys=torch.from_numpy(rng.integers(-(2**63), 2**63, len(MIXED))),
        positions=torch.from_numpy(rng.integers(0, 2**20, len(MIXED))),
    )


@pytest.mark.parametrize("vocab", [8, 2048, 4099])
def test_equals_the_cpu_under_any_mix_of_parameters(vocab: int) -> None:
    rows = mixed_rows(vocab, seed=vocab)
    assert rows.sample() == rows.by_the_cpu()


def test_equals_the_cpu_on_fp16_logits() -> None:
    rows = mixed_rows(300, seed=1, dtype=torch.float16)
    assert rows.sample() == rows.by_the_cpu()


def test_rows_may_lie_apart() -> None:
    rows = mixed_rows(100, seed=2).pick([0, 2, 8])
    wide = torch.full((3, 300), 50.0)
    wide[:, 100:200] = rows.logits
    apart = Rows(**(vars(rows) | {"logits": wide[:, 100:200]}))
    assert apart.sample() == rows.sample()


def test_greedy_rows_take_the_lowest_id_of_the_largest_logit_in_any_tile() -> None:
    logits = torch.full((5, 3 * TILE), -3.0)
    places = [[0], [TILE - 1, TILE], [TILE + 7, 2 * TILE + 7], [3 * TILE - 1], []]
    for row, where in zip(logits, places, strict=True):
        row[where] = 5.0
    assert rows_of(logits, temperature=0.0).sample() == [0, TILE - 1, TILE + 7, 3 * TILE - 1, 0]


def test_greedy_rows_ignore_truncation_and_noise() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 0.0]])
    assert rows_of(logits, temperature=0.0, top_k=1, top_p=0.1, min_p=0.9).sample() == [1]
    assert rows_of(logits, temperature=9e-6, seed=5).sample() == [1]


@pytest.mark.parametrize(
    "parameters", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 1e-3}, {"top_k": 50, "top_p": 0.99}], ids=str
)
def test_forbidden_and_nan_tokens_are_never_taken(parameters: dict[str, float]) -> None:
    logits = torch.full((4, TILE + 40), -INF)
    logits[:, TILE - 2] = float("nan")
    logits[:, TILE + 3] = -1e30
    assert rows_of(logits, **parameters).sample() == [TILE + 3] * 4
    logits[:, [5, 900]] = 0.0
    assert set(rows_of(logits, **parameters).sample()) <= {5, 900}


def test_a_row_without_any_allowed_token_gives_the_first_as_on_the_cpu() -> None:
    logits = torch.full((1, 70), -INF)
    for parameters in ({"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert rows_of(logits, **parameters).sample() == [0]


def test_infinite_and_huge_logits_are_taken() -> None:
    logits = torch.zeros(1, 70)
    logits[0, 30] = INF
    for parameters in ({"temperature": 0.0}, {}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 1e-4, "min_p": 0.5}):
        assert rows_of(logits, **parameters).sample() == [30]


def keys_that_favour(ids: list[int], logits: Tensor) -> Tensor:
    """For each id a key whose noise, at position 0, makes it the winner among all tokens."""
    keys = np.arange(20_000)
    noise = gumbel_noise(keys.astype(np.uint64), np.zeros_like(keys), np.zeros_like(keys), len(logits))
    winners = (logits.numpy() + noise).argmax(axis=1)
    return torch.tensor([keys[winners == one][0] for one in ids])


def kept_among(ids: list[int], logits: Tensor, **parameters: float) -> list[int]:
    """Those of the ids that truncation keeps: each is made the winner by its row's noise, and wins if it is kept."""
    rows = rows_of(logits.repeat(len(ids), 1), **parameters)
    rows.keys[:], rows.positions[:] = keys_that_favour(ids, logits), 0
    tokens = rows.sample()
    assert tokens == rows.by_the_cpu()
    return [one for one, token in zip(ids, tokens, strict=True) if token == one]


def test_top_k_keeps_the_k_largest_and_all_that_equal_the_last_of_them() -> None:
    logits = torch.tensor([1.0, 4.0, 3.0, 3.0, 2.0])
    assert kept_among([1, 2, 3, 4], logits, top_k=2) == [1, 2, 3]
    assert kept_among([0, 4], logits, top_k=4) == [4]
    assert kept_among([0, 1, 2], torch.tensor([0.0, -0.0, -4.0]), top_k=1) == [0, 1], "the two zeros are equal"


def test_top_p_keeps_the_smallest_set_that_reaches_it_and_counts_only_what_top_k_kept() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept_among([0, 2, 3], logits, top_p=0.65) == [3]
    assert kept_among([0, 2, 3], logits, top_p=0.75) == [2, 3]
    assert kept_among([1, 3], logits, top_p=0.55) == [1, 3]
    assert kept_among([1, 3], logits, top_p=0.55, top_k=2) == [1]  # 0.4 of 0.7 is 0.57
    assert kept_among([0, 1, 2], torch.tensor([4.0, 1.0, 4.0]), top_p=1e-9) == [0, 2], "ties stay"


def test_min_p_keeps_what_is_at_least_that_share_of_the_most_likely() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert kept_among([0, 1, 2, 3], logits, min_p=0.3) == [1, 2, 3]
    assert kept_among([1, 3], logits, min_p=1.0) == [1]
    assert kept_among([0, 2], logits, min_p=0.3, top_p=0.8, top_k=3) == [2]


@pytest.mark.parametrize("rank", [2, 30, 120])
def test_top_p_cuts_at_the_token_even_when_it_is_within_2e_6_of_the_edge(rank: int) -> None:
    """A long tail (Zipf's) in random order; top_p on either side of the probability of the first `rank` tokens."""
    order = torch.randperm(300, generator=torch.Generator().manual_seed(rank))
    logits = (-1.1 * torch.log(torch.arange(1.0, 301.0)))[order]
    reached = float(logits.double().softmax(dim=0).sort(descending=True).values[:rank].sum())
    last, beyond = ((order == r).nonzero().item() for r in (rank - 1, rank))
    assert kept_among([last, beyond], logits, top_p=reached - 2e-6) == [last]
    assert kept_among([last, beyond], logits, top_p=reached + 2e-6) == [last, beyond]


def test_a_top_k_beyond_the_number_of_groups_gives_the_same_tokens() -> None:
    rows = mixed_rows(3 * GROUP + 1, seed=5).pick([4])
    rows.top_k[:] = 30
    assert rows.sample() == rows.by_the_cpu()


def test_a_list_that_overflows_gives_the_same_tokens() -> None:
    """All are within the bound, and the likeliest have no place in the list."""
    levels = np.random.default_rng(4).integers(0, 4, (1, LISTED + 40)) / 4
    levels[:, LISTED:] = 9.0
    rows = rows_of(torch.from_numpy(levels).float(), top_p=0.97)
    (token,) = rows.sample()
    assert token >= LISTED
    assert [token] == rows.by_the_cpu()


def test_equal_perturbed_logits_go_to_the_lowest_id() -> None:
    logits = torch.full((1, 1300), 1e9)  # of which noise is less than half a unit in the last place
    for parameters in ({}, {"top_k": 1}, {"min_p": 0.5}):
        assert rows_of(logits, **parameters).sample() == [0]


@jit
def first_best(values, tokens, out, tiles, CHUNK: tl.constexpr):
    tl.store(out, best_of_tiles(values, tokens, tiles, CHUNK))


def test_equal_tiles_go_to_the_first_however_many_there_are() -> None:
    values, tokens = torch.zeros(37), torch.arange(37, dtype=torch.int32) + 100
    values[[9, 13, 20, 36]] = 1.0
    out = torch.zeros(1, dtype=torch.int32)
    first_best[(1,)](values, tokens, out, 37, CHUNK=8)
    assert out.item() == 109


def test_a_row_alone_gives_the_token_of_the_row_in_the_batch() -> None:
    rows = mixed_rows(2100, seed=3)
    together = rows.sample()
    for i in (0, 2, 4, 5):
        assert rows.pick([i]).sample() == [together[i]]
    order = [8, 3, 0]
    assert rows.pick(order).sample() == [together[i] for i in order]


def test_no_rows_give_no_tokens() -> None:
    assert rows_of(torch.empty(0, 130)).sample() == []


@pytest.mark.parametrize("seed", range(3))
def test_accepts_the_drafts_that_the_target_agrees_with(seed: int) -> None:
    rng = np.random.default_rng(seed)
    drafts = np.array([0, 7, 3, 1, 40, 2, 7, 31, 33, 32, 5])
    agreed = np.minimum(np.array([0, 7, 0, 1, 39, 1, 3, 31, 32, 9, 9]), drafts)
    token_ids, target, wanted = [], [], []
    for count, length in zip(drafts, agreed, strict=True):
        own = rng.integers(0, 1000, count + 1)
        guess = own[:count].copy()
        guess[length : length + 1] += 1  # later ones agree again, and must not count
        token_ids.append(np.concatenate([[own[0]], guess]))
        target.append(own)
        assert accept_coupled(guess, own) == length
        wanted.append((length, own[length]))
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(drafts + 1)]).astype(np.int32))
    accepted, after = accept_drafts(
        torch.from_numpy(np.concatenate(token_ids)), torch.from_numpy(np.concatenate(target)), starts
    )
    assert accepted.dtype == torch.int32
    assert list(zip(accepted.tolist(), after.tolist(), strict=True)) == wanted


def test_sequences_without_rows_accept_nothing() -> None:
    tokens = torch.tensor([9, 4, 5])
    accepted, after = accept_drafts(tokens, torch.tensor([4, 5, 6]), torch.tensor([0, 0, 3, 3], dtype=torch.int32))
    assert accepted.tolist() == [0, 2, 0]
    assert after.tolist() == [0, 6, 0]

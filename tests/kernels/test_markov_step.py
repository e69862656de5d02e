"""Slots of draft blocks on the CPU: the head's scores, corrected by the token before, and the best of them drawn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark.kernels.gumbel_noise import gumbel_noise
from dspark.kernels.markov_step import draw_slots, markov_block_reference
from dspark.kernels.panel_linear import PanelLinear

SLOTS = 4


@dataclass(frozen=True)
class Blocks:
    """scores: [B, slots, v]; w1: [V, r], w2: [v, r], r may be 0; noise: [B, slots, V]; ids: [v]."""

    scores: Tensor
    anchors: Tensor
    w1: Tensor
    w2: Tensor
    temperature: Tensor
    noise: Tensor
    ids: Tensor | None

    def drawn(self) -> Tensor:
        """By the kernel, which leaves the corrected scores in `scores`."""
        sampled = self.temperature > 0
        tokens = draw_slots(
            self.scores,
            self.w1,
            self.anchors.numpy(),
            PanelLinear(self.w2) if self.w2.shape[1] else None,
            self.temperature.numpy(),
            self.noise[sampled] if sampled.any() else None,
            None if self.ids is None else self.ids.numpy(),
        )
        return torch.from_numpy(tokens)

    def plainly(self) -> tuple[Tensor, Tensor]:
        """(the corrected scores, the tokens drawn), by plain operations."""
        corrected, tokens, previous = self.scores.clone(), [], self.anchors
        sampled = self.temperature[:, None] > 0
        divisors = torch.where(sampled, self.temperature[:, None], 1.0)
        for slot in range(corrected.shape[1]):
            if self.w2.shape[1]:
                corrected[:, slot] += PanelLinear(self.w2)(self.w1[previous].float())
            noise = self.noise[:, slot] if self.ids is None else self.noise[:, slot, self.ids]
            drawn_from = torch.where(sampled, corrected[:, slot] / divisors + noise, corrected[:, slot])
            best = drawn_from.argmax(dim=1)
            previous = best if self.ids is None else self.ids[best]
            tokens.append(previous)
        return corrected, torch.stack(tokens, dim=1)


def blocks(rows: int, vocab: int, rank: int, drafted: int | None = None, dtype: torch.dtype = torch.float32) -> Blocks:
    generator = torch.Generator().manual_seed(rows + vocab + rank)
    count = vocab if drafted is None else drafted

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Blocks(
        scores=normal(rows, SLOTS, count),
        anchors=torch.randint(vocab, (rows,), generator=generator),
        w1=normal(vocab, rank).to(dtype),
        w2=normal(count, rank).to(dtype).float(),
        temperature=torch.tensor([(0.0, 0.7, 1.0, 0.0, 2.5)[row % 5] for row in range(rows)]),
        noise=-torch.log(-torch.log(torch.rand(rows, SLOTS, vocab, generator=generator))),
        ids=None if drafted is None else torch.randperm(vocab, generator=generator)[:drafted],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, 8, 64], ids=lambda rank: f"rank{rank}")
@pytest.mark.parametrize(("rows", "vocab", "drafted"), [(1, 17, None), (2, 64, 40), (7, 500, 33), (13, 1000, 999)])
def test_blocks_are_drawn_as_by_plain_operations_to_the_bit(
    rows: int,
    vocab: int,
    drafted: int | None,
    rank: int,
    threads: int,
    dtype: torch.dtype,
    set_threads: Callable[[int], None],
) -> None:
    set_threads(threads)
    given = blocks(rows, vocab, rank, drafted, dtype)
    corrected, tokens = given.plainly()
    assert torch.equal(given.drawn(), tokens)
    assert torch.equal(given.scores, corrected), "the corrected scores take the place of the head's"


def test_one_slot_of_many_is_drawn_where_it_lies() -> None:
    """As for a head whose x is computed between the slots: rows of the table are then the sequences'."""
    given = blocks(5, 60, 16)
    before = given.scores.clone()
    one = replace(
        given, scores=given.scores[:, 2:3], noise=given.noise[:, 2:3], w1=given.w1[:5], anchors=torch.arange(5)
    )
    corrected, tokens = one.plainly()
    assert torch.equal(one.drawn(), tokens)
    assert torch.equal(given.scores[:, 2:3], corrected)
    assert torch.equal(given.scores[:, [0, 1, 3]], before[:, [0, 1, 3]]), "other slots are left alone"


def test_ties_go_to_the_lowest_id_within_and_across_panels() -> None:
    scores = torch.zeros(2, 1, 50)
    scores[0, 0, [5, 9, 40]] = 1.0
    scores[1, 0, [31, 48]] = 1.0
    drawn = draw_slots(scores, torch.empty(2, 0), np.zeros(2, np.int64), None, np.zeros(2, np.float32))
    assert drawn.tolist() == [[5], [31]]


def test_it_draws_the_block_of_the_reference() -> None:
    given = blocks(5, 300, 16)
    keys, sampled = torch.arange(5) + 77, given.temperature > 0
    positions = torch.arange(SLOTS)[None] + torch.arange(5)[:, None] * 10
    wanted = markov_block_reference(
        given.scores.clone(), given.anchors, given.w1, given.w2, given.temperature, keys, positions
    )
    at = positions[sampled].flatten().numpy()
    of = keys[sampled].repeat_interleave(SLOTS).numpy().view(np.uint64)
    noise = torch.zeros(5, SLOTS, 300)
    noise[sampled] = torch.from_numpy(gumbel_noise(of, at, np.zeros_like(at), 300)).view(-1, SLOTS, 300)
    assert torch.equal(replace(given, noise=noise).drawn(), wanted)
    assert len({tuple(row) for row in wanted.tolist()}) == 5, "rows drew the same, which would hide a mixed-up row"

"""A slot of a draft block on the CPU: the head's scores, corrected by the token before, and the best of them drawn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dspark.kernels.gumbel_noise import gumbel_noise
from dspark.kernels.markov_step import draw_slot, markov_block_reference
from dspark.kernels.panel_linear import PanelLinear


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plainly(
    scores: Tensor, bias: Tensor | None, temperature: Tensor, noise: Tensor, ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(the corrected scores, which of the ids each row draws); noise: [B, V]."""
    corrected = scores if bias is None else scores + bias
    of_ids = noise if ids is None else noise[:, ids]
    sampled = temperature[:, None] > 0
    drawn_from = torch.where(sampled, corrected / torch.where(sampled, temperature[:, None], 1.0) + of_ids, corrected)
    return corrected, drawn_from.argmax(dim=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rank", [0, 1, 8, 64], ids=lambda rank: f"rank{rank}")
@pytest.mark.parametrize(("rows", "vocab", "drafted"), [(1, 17, None), (2, 64, 40), (7, 500, 33), (13, 1000, 999)])
def test_a_slot_is_drawn_as_by_plain_operations_to_the_bit(
    rows: int, vocab: int, drafted: int | None, rank: int, threads: int, set_threads: Callable[[int], None]
) -> None:
    set_threads(threads)
    ids = None if drafted is None else torch.randperm(vocab, generator=torch.Generator().manual_seed(1))[:drafted]
    count = vocab if drafted is None else drafted
    block = normal(rows, 3, count)
    temperature = torch.tensor([(0.0, 0.7, 1.0, 0.0, 2.5)[row % 5] for row in range(rows)])
    w2, x = normal(count, max(rank, 1), seed=2), normal(rows, max(rank, 1), seed=3)
    layer = PanelLinear(w2) if rank else None
    noise = -torch.log(-torch.log(torch.rand(rows, 3, vocab, generator=torch.Generator().manual_seed(4))))
    bias = None if layer is None else layer(x)
    wanted, best = plainly(block[:, 1], bias, temperature, noise[:, 1], ids)
    before = block.clone()

    sampled = temperature > 0
    drawn = draw_slot(
        block[:, 1],  # a slot of a block: its rows are not next to each other
        x if rank else None,
        layer,
        temperature.numpy(),
        noise[sampled][:, 1] if sampled.any() else None,
        None if ids is None else ids.numpy(),
    )

    assert torch.equal(torch.from_numpy(drawn), best)
    assert torch.equal(block[:, 1], wanted), "the corrected scores take the place of the head's"
    assert torch.equal(block[:, [0, 2]], before[:, [0, 2]]), "other slots are left alone"


def test_ties_go_to_the_lowest_id_within_and_across_panels() -> None:
    scores = torch.zeros(2, 50)
    scores[0, [5, 9, 40]] = 1.0
    scores[1, [31, 48]] = 1.0
    assert draw_slot(scores, None, None, np.zeros(2, np.float32)).tolist() == [5, 31]


def test_slot_after_slot_it_draws_the_block_of_the_reference() -> None:
    rows, slots, vocab, rank = 5, 4, 300, 16
    logits, w1, w2 = normal(rows, slots, vocab), normal(vocab, rank, seed=5), normal(vocab, rank, seed=6)
    temperature = torch.tensor([0.0, 1.0, 0.6, 0.0, 1.3])
    keys, anchors = torch.arange(rows) + 77, torch.arange(rows) * 3
    positions = torch.arange(slots)[None] + torch.arange(rows)[:, None] * 10
    wanted = markov_block_reference(logits.clone(), anchors, w1, w2, temperature, keys, positions)

    layer, previous, drawn = PanelLinear(w2), anchors, []
    for slot in range(slots):
        at = positions[temperature > 0, slot].numpy()
        noise = gumbel_noise(keys[temperature > 0].numpy().view(np.uint64), at, np.zeros_like(at), vocab)
        best = draw_slot(logits[:, slot], w1[previous], layer, temperature.numpy(), torch.from_numpy(noise))
        previous = torch.from_numpy(best)
        drawn.append(previous)
    assert torch.equal(torch.stack(drawn, dim=1), wanted)
    assert len({tuple(row) for row in wanted.tolist()}) == rows, "rows drew the same, which would hide a mixed-up row"

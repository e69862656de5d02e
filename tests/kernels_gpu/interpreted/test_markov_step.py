"""A block drawn on the device, each token from a tensor that the last slot wrote, is the reference's block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.engine.drafters.dspark import MarkovHead
from dspark.kernels.gpu.markov_step import markov_block
from dspark.kernels.gumbel_noise import gumbel_noise
from dspark.kernels.markov_step import Transition, markov_block_reference

pytestmark = pytest.mark.usefixtures("nan_filled")


@dataclass(frozen=True)
class Block:
    """The arguments of `markov_block`."""

    logits: Tensor
    anchors: Tensor
    w1: Tensor
    w2: Tensor
    temperature: Tensor
    keys: Tensor
    positions: Tensor
    draft_ids: Tensor | None = None
    transition: Transition | None = None

    def drawn(self) -> Tensor:
        return markov_block(**vars(self))

    def wanted(self) -> Tensor:
        return markov_block_reference(**vars(self))


def block_of(
    sequences: int,
    slots: int,
    vocab: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    drafted: int | None = None,
    temperatures: tuple[float, ...] = (0.0, 1.0, 0.7),
) -> Block:
    """Random weights, the bias as large as the logits, so that the token before decides as much as the slot."""
    generator = torch.Generator().manual_seed(vocab + rank)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    ids = None if drafted is None else torch.randperm(vocab, generator=generator)[:drafted].sort().values
    first = torch.randint(0, 1000, (sequences, 1), generator=generator)
    return Block(
        logits=normal(sequences, slots, drafted or vocab, scale=2.0),
        anchors=torch.randint(0, vocab, (sequences,), generator=generator),
        w1=normal(vocab, rank),
        w2=normal(drafted or vocab, rank, scale=2.0 * rank**-0.5),
        temperature=torch.tensor(temperatures).repeat(sequences)[:sequences],
        keys=torch.randint(-(2**62), 2**62, (sequences,), generator=generator),
        positions=first + torch.arange(1, slots + 1),
        draft_ids=ids,
    )


@pytest.mark.parametrize(
    ("sequences", "vocab", "rank", "dtype"),
    [
        (1, 100, 64, torch.float32),
        (5, 130, 16, torch.float32),
        (17, 65, 80, torch.float16),
        (33, 64, 128, torch.float32),
        (3, 200, 256, torch.float16),
    ],
)
def test_equals_the_reference(sequences: int, vocab: int, rank: int, dtype: torch.dtype) -> None:
    block = block_of(sequences, 3, vocab, rank, dtype)
    tokens = block.drawn()
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, block.wanted())


def test_the_token_before_matters() -> None:
    block = block_of(16, 2, 60, 64)
    tokens, others = block.drawn(), replace(block, anchors=(block.anchors + 1) % 60).drawn()
    assert (tokens != others).any(dim=0).all()


def test_only_the_ids_of_a_reduced_vocabulary_are_drafted_with_their_own_noise() -> None:
    block = block_of(6, 3, 500, 64, drafted=70)
    tokens = block.drawn()
    assert torch.isin(tokens, block.draft_ids).all()
    assert torch.equal(tokens, block.wanted())


def test_greedy_blocks_need_no_noise() -> None:
    block = block_of(4, 3, 100, 64, temperatures=(0.0,))
    assert torch.equal(block.drawn(), replace(block, keys=block.keys + 1).drawn())
    assert torch.equal(block.drawn(), block.wanted())


class PlainLinear:
    """Makes the gates of the engine's Markov head of plain products."""

    def fused(self, weights: Mapping[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
        return partial(F.linear, weight=weights[f"{name}.weight"], bias=weights[f"{name}.bias"])


def engines_head(kind: str, block: Block, hidden_size: int) -> MarkovHead:
    rank = block.w1.shape[1]
    inputs, outputs = {"vanilla": (0, 0), "gated": (1, 1), "rnn": (2, 3)}[kind]
    generator = torch.Generator().manual_seed(3)
    weights = {"markov_w1.weight": block.w1, "markov_w2.weight": block.w2}
    for name in ("gate_proj", "joint_proj"):
        weights[f"{name}.weight"] = torch.randn(outputs * rank, inputs * rank + hidden_size, generator=generator) / 8
        weights[f"{name}.bias"] = torch.randn(outputs * rank, generator=generator) / 8
    prefixed = {f"markov_head.{name}": weight for name, weight in weights.items()}
    return MarkovHead(SimpleNamespace(markov=kind, draft_token_ids=None), prefixed, PlainLinear())


@pytest.mark.parametrize("kind", ["vanilla", "gated", "rnn"])
def test_draws_what_the_engines_head_draws_with_its_state_from_slot_to_slot(kind: str) -> None:
    block = block_of(4, 4, 90, 16)
    hidden = torch.randn(4, 4, 24, generator=torch.Generator().manual_seed(1))
    head = engines_head(kind, block, 24)
    previous, state, wanted = block.anchors, None, []
    for slot in range(4):
        mixed, state = head.transition(head.embed(previous), hidden[:, slot], state)
        at = block.positions[:, slot].numpy()
        noise = torch.from_numpy(gumbel_noise(block.keys.numpy().view(np.uint64), at, np.zeros_like(at), 90))
        scores = block.logits[:, slot] + mixed @ block.w2.T
        sampled = (block.temperature > 0)[:, None]
        divisor = torch.where(sampled, block.temperature[:, None], 1.0)
        previous = torch.where(sampled, scores / divisor + noise, scores).argmax(dim=1)
        wanted.append(previous)

    states: list[Tensor | None] = [None]

    def transition(slot: int, rows: Tensor) -> Tensor:
        x, after = head.transition(rows, hidden[:, slot], states[slot])
        states.append(after)
        return x

    tokens = replace(block, transition=transition).drawn()
    assert torch.equal(tokens, torch.stack(wanted, dim=1))
    assert torch.equal(tokens, block.drawn()) == (kind == "vanilla"), "the hidden state matters to the others"


def test_ties_go_to_the_lowest_id() -> None:
    block = block_of(2, 2, 200, 64, temperatures=(0.0,))
    logits = torch.zeros_like(block.logits)
    logits[:, :, [70, 130, 199]] = 1.0
    block = replace(block, logits=logits, w2=torch.zeros_like(block.w2))
    assert (block.drawn() == 70).all()


def test_a_sequence_alone_gets_the_block_it_gets_in_a_crowd() -> None:
    block = block_of(19, 2, 100, 64)
    together = block.drawn()
    for i in (7, 18):
        names = ("logits", "anchors", "temperature", "keys", "positions")
        alone = replace(block, **{name: getattr(block, name)[i : i + 1] for name in names})
        assert torch.equal(alone.drawn()[0], together[i])


def test_no_sequences_give_no_blocks() -> None:
    assert block_of(0, 3, 100, 64).drawn().shape == (0, 3)

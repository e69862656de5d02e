"""The hand-made gradient is that of the formulae in the module's head."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dspark.training.losses import CHUNK_ROWS, DFLASH, EAGLE3, LossWeights, confidence_loss, draft_loss

SLOTS, IDS, WIDTH, RANK = 2 * CHUNK_ROWS + 7, 50, 16, 4
WEIGHTS = {
    "dspark": LossWeights(),
    "dflash": DFLASH,
    "eagle3": EAGLE3,
    "distance": LossWeights(0.0, 0.0, 1.0),
    "all": LossWeights(0.3, 0.5, 0.7),
}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor
    head: Tensor
    low_rank: Tensor | None
    w2: Tensor | None
    target_logits: Tensor
    labels: Tensor
    weight: Tensor

    def tensors(self) -> list[Tensor]:
        return [value for value in vars(self).values() if value is not None]

    def trained(self) -> list[Tensor]:
        return [value for value in (self.hidden, self.low_rank, self.w2) if value is not None]


def random_inputs(markov: bool) -> Inputs:
    """A quarter of the labels is not among the ids, a third of the weights zero."""
    draw = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    labels = torch.randint(0, IDS, (SLOTS,), generator=draw)
    weight = torch.rand(SLOTS, generator=draw)
    labels[::4] = -1
    weight[::3] = 0
    return Inputs(
        hidden=normal(SLOTS, WIDTH).requires_grad_(),
        head=normal(IDS, WIDTH) / 2,
        low_rank=normal(SLOTS, RANK).requires_grad_() if markov else None,
        w2=normal(IDS, RANK).requires_grad_() if markov else None,
        target_logits=2 * normal(SLOTS, IDS),
        labels=labels,
        weight=weight,
    )


def by_autograd(given: Inputs, weights: LossWeights) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The formulae, in double precision."""
    logits = given.hidden.double() @ given.head.double().T
    if given.low_rank is not None and given.w2 is not None:
        logits = logits + given.low_rank.double() @ given.w2.double().T
    log_q, log_p = logits.log_softmax(-1), given.target_logits.double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    known = given.labels >= 0
    cross_entropy = torch.where(known, -log_q[torch.arange(SLOTS), given.labels.clamp_min(0)], 0.0)
    distance = (q - p).abs().sum(-1)
    each = {"ce": cross_entropy, "kl": (p * (log_p - log_q)).sum(-1), "l1": distance}
    total = given.weight.double().sum().clamp_min(1e-6)
    parts = {name: (given.weight.double() * values).sum() / total for name, values in each.items()}
    loss = weights.cross_entropy * parts["ce"] + weights.kl * parts["kl"] + weights.l1 * parts["l1"]
    return loss, parts, distance


def computed(given: Inputs, weights: LossWeights) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    return draft_loss(
        given.hidden,
        given.head,
        given.low_rank,
        given.w2,
        given.target_logits,
        given.labels,
        given.weight,
        weights,
    )


@pytest.mark.parametrize("markov", [True, False], ids=["with Markov bias", "without"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_loss_parts_and_gradients_are_those_of_the_formulae(weights: LossWeights, markov: bool) -> None:
    given = random_inputs(markov)
    with torch.enable_grad():
        loss, parts, distance = computed(given, weights)
        expected_loss, expected_parts, expected_distance = by_autograd(given, weights)
        gradients = torch.autograd.grad(3 * loss, given.trained())
        expected_gradients = torch.autograd.grad(3 * expected_loss, given.trained())
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(distance.double(), expected_distance, rtol=1e-5, atol=1e-6)
    for name, part in parts.items():
        torch.testing.assert_close(part.double(), expected_parts[name], rtol=1e-5, atol=1e-6)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_slot_without_weight_neither_counts_nor_moves_anything() -> None:
    given = random_inputs(markov=True)
    with torch.enable_grad():
        loss, _, _ = computed(given, LossWeights())
        gradient, low_rank_gradient, _ = torch.autograd.grad(loss, given.trained())
    assert gradient[::3].abs().max() == low_rank_gradient[::3].abs().max() == 0
    changed = given.hidden.detach().clone()
    changed[::3] += 1
    again, _, _ = computed(Inputs(**vars(given) | {"hidden": changed}), LossWeights())
    torch.testing.assert_close(again, loss.detach(), rtol=0, atol=0)


def test_without_any_weight_loss_and_gradients_are_zero() -> None:
    given = random_inputs(markov=True)
    given.weight.zero_()
    with torch.enable_grad():
        loss, _, _ = computed(given, LossWeights())
        gradients = torch.autograd.grad(loss, given.trained())
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_given_is_left_as_it_is(dtype: torch.dtype) -> None:
    given = random_inputs(markov=True)
    given = Inputs(**vars(given) | {"head": given.head.to(dtype), "target_logits": given.target_logits.to(dtype)})
    before = [tensor.detach().clone() for tensor in given.tensors()]
    with torch.enable_grad():
        computed(given, LossWeights(0.3, 0.5, 0.7))[0].backward()
    for tensor, copy in zip(given.tensors(), before, strict=True):
        torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0)


def test_bfloat16_gradients_are_near_those_of_fp32() -> None:
    given = random_inputs(markov=True)
    half = Inputs(**vars(given) | {"head": given.head.bfloat16(), "target_logits": given.target_logits.bfloat16()})
    with torch.enable_grad():
        exact = torch.autograd.grad(computed(given, LossWeights())[0], given.trained())
        rounded = torch.autograd.grad(computed(half, LossWeights())[0], half.trained())
    for a, b in zip(exact, rounded, strict=True):
        assert b.dtype == torch.float32
        assert F.cosine_similarity(a.flatten(), b.flatten(), dim=0) > 0.999


def test_the_confidence_is_taught_the_acceptance_that_the_distance_leaves() -> None:
    log_odds = torch.tensor([0.3, -1.0, 2.0]).requires_grad_()
    distance, weight = torch.tensor([0.0, 2.0, 0.5]), torch.tensor([1.0, 0.5, 0.0])
    with torch.enable_grad():
        loss = confidence_loss(log_odds, distance, weight)
    sure, doubtful = torch.sigmoid(torch.tensor(0.3)), torch.sigmoid(torch.tensor(-1.0))
    torch.testing.assert_close(loss.detach(), (-sure.log() - 0.5 * (1 - doubtful).log()) / 1.5)

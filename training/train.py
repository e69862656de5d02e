"""Stage (c): optimise a drafter on captured features; resumable, and the same run after any number of interruptions.

Everything random of step i follows from (seed, i), and the state on disk holds parameters, their averages and Adam's moments.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspark.training.answers import Answer
from dspark.training.draft_network import DraftNetwork
from dspark.training.losses import LossWeights, draft_loss


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """steps: optimiser steps. sequences × anchors blocks make one step. average: decay of the parameters' running mean."""

    steps: int
    sequences: int = 8
    anchors: int = 16
    learning_rate: float = 1e-3
    warmup_share: float = 0.04
    decay_share: float = 0.3
    clip: float = 1.0
    average: float = 0.995
    seed: int = 0
    save_every_s: float = 120.0


class AnswerData:
    """Answers and their features, by sequence. features: [all tokens, (m + 1)·hidden] bfloat16 bits."""

    def __init__(self, answers: Sequence[Answer], features: NDArray[np.int16], hidden: int, block: int) -> None:
        ends = np.cumsum([len(one.tokens) for one in answers])
        self._rows = [(end - len(one.tokens), end) for one, end in zip(answers, ends, strict=True)]
        self._answers = answers
        self._features = features
        self._hidden = hidden
        # an anchor is an output token with at least one token after it
        self.usable = [i for i, one in enumerate(answers) if len(one.tokens) - one.prompt_len >= 2]
        self._lengths = np.array([len(one.tokens) for one in answers])
        self._block = block

    def epoch_batch(self, config: TrainConfig, step: int) -> Batch:
        """The batch of one step: sequences of like length, in an order that is new in every epoch."""
        per_epoch = max(1, len(self.usable) // config.sequences)
        epoch, within = divmod(step, per_epoch)
        rng = np.random.default_rng((config.seed, epoch))
        order = rng.permutation(self.usable)
        window = 32 * config.sequences  # sorted within a window: little padding, still mixed
        order = np.concatenate(
            [chunk[np.argsort(self._lengths[chunk], kind="stable")] for chunk in _chunks(order, window)]
        )
        place = rng.permutation(per_epoch)[within]
        chosen = order[place * config.sequences : (place + 1) * config.sequences]
        return self.batch(chosen, np.random.default_rng((config.seed, 1, step)), config.anchors)

    def batch(self, indices: Sequence[int], rng: np.random.Generator, anchors: int) -> Batch:
        length = int(self._lengths[indices].max())
        tokens = np.zeros((len(indices), length + self._block + 1), np.int64)
        features = np.zeros((len(indices), length, self._features.shape[1]), np.int16)
        where = np.zeros((len(indices), anchors), np.int64)
        valid = np.zeros((len(indices), anchors, self._block), np.bool_)
        for row, index in enumerate(indices):
            one, (begin, end) = self._answers[index], self._rows[index]
            tokens[row, : end - begin] = one.tokens
            features[row, : end - begin] = self._features[begin:end]
            where[row] = rng.integers(one.prompt_len, end - begin - 1, anchors)
            valid[row] = where[row][:, None] + 1 + np.arange(self._block) < end - begin
        both = torch.from_numpy(features).view(torch.bfloat16)
        return Batch(
            torch.from_numpy(tokens),
            both[..., : -self._hidden],
            both[..., -self._hidden :],
            torch.from_numpy(where),
            torch.from_numpy(valid),
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens: [S, T + B + 1] int64; features: [S, T, m·d], hidden: [S, T, d]; anchors: [S, A]; valid: [S, A, B] bool."""

    tokens: Tensor
    features: Tensor
    hidden: Tensor
    anchors: Tensor
    valid: Tensor


def _chunks(values: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


@dataclass(frozen=True, slots=True)
class SharedHead:
    """The target's head over the ids that are drafted. ids: [v] ascending; weight: [v, d]; column: [V], id → index or -1."""

    ids: Tensor
    weight: Tensor
    column: Tensor

    @classmethod
    def of(cls, weight: Tensor, ids: Tensor | None) -> SharedHead:
        chosen = torch.arange(len(weight)) if ids is None else ids
        column = torch.full((len(weight),), -1)
        column[chosen] = torch.arange(len(chosen))
        return cls(chosen, weight[chosen].contiguous(), column)


def block_loss(
    network: DraftNetwork, batch: Batch, head: SharedHead, weights: LossWeights
) -> tuple[Tensor, dict[str, float]]:
    block = network.spec.block_size
    hidden = network.backbone(batch.features, batch.tokens, batch.anchors)
    at = batch.anchors[..., None] + torch.arange(block + 1)  # positions of the anchor and of the B labels
    window = batch.tokens.gather(1, at.flatten(1)).view(at.shape)
    previous, labels = window[..., :-1].flatten(0, 1), head.column[window[..., 1:]].flatten(0, 1)
    source = at[..., :-1].clamp_max(batch.hidden.shape[1] - 1)  # e_{i+k} predicts the token at i+k+1
    states = batch.hidden.gather(1, source.flatten(1)[..., None].expand(-1, -1, batch.hidden.shape[-1]))
    with torch.no_grad():
        target_logits = torch.nn.functional.linear(states, head.weight).float().view(*labels.shape, -1)
    hidden = hidden.flatten(0, 1)
    draft_logits = network.logits(hidden, previous, head.weight, head.ids)
    log_odds = network.confidence(hidden, previous) if network.spec.confidence_head else None
    return draft_loss(draft_logits, target_logits, labels, batch.valid.flatten(0, 1), log_odds, weights)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    up = (step + 1) / max(1.0, config.warmup_share * config.steps)
    down = (config.steps - step) / max(1.0, config.decay_share * config.steps)
    return config.learning_rate * min(1.0, up, down)


def train(
    network: DraftNetwork,
    data: AnswerData,
    head: SharedHead,
    weights: LossWeights,
    config: TrainConfig,
    folder: Path,
    report: Callable[[int, dict[str, float]], None] = lambda step, facts: None,
) -> dict[str, Tensor]:
    """Train, or go on with the state in `folder`; returns the averaged parameters, fp32, by DeepSpec's names."""
    torch.set_grad_enabled(True)
    parameters = dict(network.named_parameters())
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    optimiser = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    start = _restore(folder, config, parameters, averages, optimiser)
    saved_s = time.monotonic()
    for step in range(start, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss, facts = block_loss(network, data.epoch_batch(config, step), head, weights)
        optimiser.zero_grad()
        loss.backward()
        facts["gradient"] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip))
        optimiser.step()
        mean = min(config.average, (step + 1) / (step + 10))
        for name, parameter in parameters.items():
            averages[name].lerp_(parameter.detach(), 1 - mean)
        report(step, facts | {"loss": float(loss.detach())})
        if time.monotonic() - saved_s > config.save_every_s or step + 1 == config.steps:
            _save(folder, config, step + 1, parameters, averages, optimiser)
            saved_s = time.monotonic()
    torch.set_grad_enabled(False)
    return averages


def _save(
    folder: Path,
    config: TrainConfig,
    step: int,
    parameters: dict[str, torch.nn.Parameter],
    averages: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> None:
    tensors = {}
    for name, parameter in parameters.items():
        moments = optimiser.state[parameter]
        tensors[f"parameter.{name}"] = parameter.detach()
        tensors[f"average.{name}"] = averages[name]
        tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
    partial = folder / "state.partial"
    about = {"step": str(step), "config": json.dumps(asdict(config), sort_keys=True)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=about)
    partial.replace(folder / "state.safetensors")


def _restore(
    folder: Path,
    config: TrainConfig,
    parameters: dict[str, torch.nn.Parameter],
    averages: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
) -> int:
    """The step to go on with; 0 and nothing changed when there is no state. Raises ValueError for another run's state."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file:
        about = file.metadata()
    if about["config"] != json.dumps(asdict(config), sort_keys=True):
        raise ValueError(f"{path} belongs to a run with other settings: {about['config']}; remove it or use them")
    tensors = load_file(path)
    step = int(about["step"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            averages[name].copy_(tensors[f"average.{name}"])
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": tensors[f"first.{name}"],
                "exp_avg_sq": tensors[f"second.{name}"],
            }
    return step

"""Stage (c): optimise a drafter on captured features; resumable, and the same run after any number of interruptions.

Everything random of step i follows from (seed, i), and the state on disk holds parameters, their averages and Adam's moments.
Training computes on the device of the head that it is given, and in bfloat16 (with fp32 parameters) where the head is.
"""

from __future__ import annotations

import json
import reprlib
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

from dspark.engine.errors import ConfigError
from dspark.training.answers import Answer
from dspark.training.draft_network import DraftNetwork
from dspark.training.eagle3_network import Eagle3Network
from dspark.training.losses import LossWeights, confidence_loss, draft_loss


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """steps: optimiser steps. sequences × anchors blocks make one step. average: decay of the parameters' running mean."""

    steps: int
    sequences: int = 4
    anchors: int = 32
    learning_rate: float = 1e-3
    warmup_share: float = 0.04
    decay_share: float = 0.3
    clip: float = 1.0
    average: float = 0.998
    seed: int = 0
    save_every_s: float = 120.0


class AnswerData:
    """Answers and their features, by shard. features: per shard [its tokens, (m + 1)·hidden] bfloat16 bits."""

    def __init__(
        self, shards: Sequence[Sequence[Answer]], features: Sequence[NDArray[np.int16]], hidden: int, block: int
    ) -> None:
        """Raises ConfigError("prompts") without a single answer to train on."""
        self._answers = [answer for shard in shards for answer in shard]
        self._features = [
            part
            for shard, rows in zip(shards, features, strict=True)
            for part in np.split(rows, np.cumsum([len(one.tokens) for one in shard])[:-1])
        ]
        self._hidden = hidden
        # an anchor is an output token with at least one token after it
        self.usable = [i for i, one in enumerate(self._answers) if len(one.tokens) - one.prompt_len >= 2]
        if not self.usable:
            raise ConfigError("prompts", f"none of their {len(self._answers)} answers has two tokens to train on")
        self._lengths = np.array([len(one.tokens) for one in self._answers])
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

    def batch(self, indices: NDArray[np.int64], rng: np.random.Generator, anchors: int) -> Batch:
        length = int(self._lengths[indices].max())
        tokens = np.zeros((len(indices), length + self._block + 1), np.int64)
        features = np.zeros((len(indices), length, self._features[0].shape[1]), np.int16)
        where = np.zeros((len(indices), anchors), np.int64)
        valid = np.zeros((len(indices), anchors, self._block), np.bool_)
        for row, index in enumerate(indices):
            one, end = self._answers[index], self._lengths[index]
            tokens[row, :end] = one.tokens
            features[row, :end] = self._features[index]
            where[row] = rng.integers(one.prompt_len, end - 1, anchors)
            valid[row] = where[row][:, None] + 1 + np.arange(self._block) < end
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

    def like(self, weight: Tensor) -> Batch:
        """On the device of `weight`, states in its dtype."""
        device, dtype = weight.device, weight.dtype
        return Batch(
            self.tokens.to(device),
            self.features.to(device, dtype),
            self.hidden.to(device, dtype),
            self.anchors.to(device),
            self.valid.to(device),
        )


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
        """weight: [V, d], on the device and of the dtype to compute with; ids: None for all."""
        device = weight.device
        chosen = torch.arange(len(weight), device=device) if ids is None else ids.to(device)
        column = torch.full((len(weight),), -1, device=device)
        column[chosen] = torch.arange(len(chosen), device=device)
        return cls(chosen, weight[chosen].contiguous(), column)


def block_loss(
    network: DraftNetwork | Eagle3Network, batch: Batch, head: SharedHead, weights: LossWeights
) -> tuple[Tensor, dict[str, float]]:
    """The loss of all slots of a batch's blocks, its parts, and the expected acceptance of slot 1, 1 - ½‖q - p‖₁."""
    block = batch.valid.shape[2]
    hidden = network.backbone(batch.features, batch.tokens, batch.anchors).flatten(0, 2)
    at = batch.anchors[..., None] + torch.arange(
        block + 1, device=batch.anchors.device
    )  # positions of the anchor and of the B labels
    window = batch.tokens.gather(1, at.flatten(1)).view(at.shape)
    previous, labels = window[..., :-1].flatten(), head.column[window[..., 1:]].flatten()
    source = at[..., :-1].clamp_max(batch.hidden.shape[1] - 1)  # e_{i+k} predicts the token at i+k+1
    states = batch.hidden.gather(1, source.flatten(1)[..., None].expand(-1, -1, batch.hidden.shape[-1])).flatten(0, 1)
    with torch.no_grad():
        target_logits = torch.nn.functional.linear(states, head.weight)
    slots = torch.arange(block, device=batch.valid.device)
    weight = (batch.valid * torch.exp(-slots / weights.decay)).flatten()
    low_rank, w2 = network.markov_factors(hidden, previous, head.ids)
    loss, parts, distance = draft_loss(hidden, head.weight, low_rank, w2, target_logits, labels, weight, weights)
    log_odds = network.confidence(hidden, previous)
    if log_odds is not None:
        parts["conf"] = confidence_loss(log_odds, distance, weight)
        loss = loss + weights.confidence * parts["conf"]
    first = weight.view(-1, block)[:, 0] > 0
    parts["accept_1"] = (1 - distance.view(-1, block)[:, 0] / 2)[first].mean()
    return loss, {name: float(value.detach()) for name, value in parts.items()}


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero."""
    up = (step + 1) / max(1.0, config.warmup_share * config.steps)
    down = (config.steps - step) / max(1.0, config.decay_share * config.steps)
    return config.learning_rate * min(1.0, up, down)


def train(
    network: DraftNetwork | Eagle3Network,
    data: AnswerData,
    head: SharedHead,
    weights: LossWeights,
    config: TrainConfig,
    folder: Path,
    report: Callable[[int, dict[str, float]], None] = lambda step, facts: None,
) -> dict[str, Tensor]:
    """Train, or go on with the state in `folder`; returns the averaged parameters, fp32 on the CPU, by DeepSpec's names.

    report: told (step from 0, its loss, the parts of that and the gradient's norm).
    Raises ConfigError("out") where the state belongs to a run with other settings.
    """
    device = head.weight.device
    parameters = dict(network.to(device).named_parameters())
    averages = {name: p.detach().clone() for name, p in parameters.items()}
    optimiser = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    state = _State(
        folder / "state.safetensors", _settings(network, data, weights, config), parameters, averages, optimiser
    )
    saved_s = time.monotonic()
    for step in range(state.restore(), config.steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(config, step)
        batch = data.epoch_batch(config, step).like(head.weight)
        half = torch.autocast(device.type, torch.bfloat16, enabled=head.weight.dtype == torch.bfloat16)
        with torch.enable_grad(), half:
            loss, facts = block_loss(network, batch, head, weights)
        optimiser.zero_grad()
        loss.backward()
        facts["gradient"] = float(torch.nn.utils.clip_grad_norm_(parameters.values(), config.clip))
        optimiser.step()
        mean = min(config.average, (step + 1) / (step + 10))
        for name, parameter in parameters.items():
            averages[name].lerp_(parameter.detach(), 1 - mean)
        report(step, facts | {"loss": float(loss.detach())})
        if time.monotonic() - saved_s > config.save_every_s or step + 1 == config.steps:
            state.save(step + 1)
            saved_s = time.monotonic()
    return {name: average.cpu() for name, average in averages.items()}


def _settings(
    network: DraftNetwork | Eagle3Network, data: AnswerData, weights: LossWeights, config: TrainConfig
) -> dict[str, object]:
    """All that the result depends on, as JSON gives it back."""
    own = asdict(network.spec) | asdict(weights) | asdict(config) | {"usable_answers": len(data.usable)}
    del own["save_every_s"]
    return json.loads(json.dumps(own))


@dataclass(frozen=True, slots=True)
class _State:
    """A training run as it is on disk."""

    path: Path
    settings: dict[str, object]
    parameters: dict[str, torch.nn.Parameter]
    averages: dict[str, Tensor]
    optimiser: torch.optim.Optimizer

    def save(self, step: int) -> None:
        tensors = {}
        for name, parameter in self.parameters.items():
            moments = self.optimiser.state[parameter]
            tensors[f"parameter.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.averages[name]
            tensors[f"first.{name}"], tensors[f"second.{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        partial = self.path.with_suffix(".partial")
        about = {"step": str(step), "settings": json.dumps(self.settings)}
        save_file({name: t.contiguous() for name, t in tensors.items()}, partial, metadata=about)
        partial.replace(self.path)

    @torch.no_grad()
    def restore(self) -> int:
        """The step to go on with; 0 and nothing changed when there is no state. Raises ConfigError("out")."""
        if not self.path.exists():
            return 0
        with safe_open(self.path, framework="pt") as file:
            about = file.metadata()
        self._check(json.loads(about.get("settings", "{}")))
        tensors = load_file(self.path)
        step = int(about["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter.{name}"])
            self.averages[name].copy_(tensors[f"average.{name}"])
            self.optimiser.state[parameter] = {
                "step": torch.tensor(float(step), device=parameter.device),
                "exp_avg": tensors[f"first.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"second.{name}"].to(parameter.device),
            }
        return step

    def _check(self, stored: dict[str, object]) -> None:
        shown = [
            f"{name} {reprlib.repr(stored.get(name))} there and {reprlib.repr(self.settings.get(name))} here"
            for name in sorted(stored.keys() | self.settings.keys())
            if stored.get(name) != self.settings.get(name)
        ]
        if shown:
            raise ConfigError(
                "out", f"{self.path} is of a run with other settings: {', '.join(shown)}; remove it or use them"
            )

"""Rounds of an imaginary drafter whose chance of acceptance is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from dspark.training.replay import Rounds

PLENTY = 1000
"""Tokens left in an answer that does not end soon."""


def some_rounds(accepted: list[int], block: int = 3, **fields: Any) -> Rounds:
    """One round of one answer per entry: whole blocks in the middle of a greedy text, unless `fields` say otherwise."""
    count = len(accepted)
    zeros = np.zeros((count, block), np.float32)
    values: dict[str, Any] = {
        "answer": np.arange(count),
        "kind": np.array(["any"] * count),
        "temperature": np.zeros(count),
        "confidence": zeros,
        "survival": zeros,
        "proposed": np.full(count, block),
        "verified": np.full(count, block),
        "accepted": accepted,
        "left": np.full(count, PLENTY),
        "source": np.zeros(count),
    } | fields
    kinds = {"temperature": np.float32, "confidence": np.float32, "survival": np.float32, "source": np.int8}
    return Rounds(
        **{
            name: value if name == "kind" else np.asarray(value, kinds.get(name, np.int32))
            for name, value in values.items()
        }
    )


def random_rounds(
    answers: int, rounds: int, log_odds_spread: float, temperature: float = 0.0, block: int = 4
) -> Rounds:
    """`rounds` rounds of each of `answers` answers; the chance of draft k is σ(c_k), c normal around 0 with that spread.

    The survival is the true one.
    """
    random = np.random.default_rng(0)
    confidence = random.normal(0.0, log_odds_spread, (answers * rounds, block))
    chance = 1 / (1 + np.exp(-confidence))
    accepted = np.cumprod(random.random(chance.shape) < chance, axis=1).sum(axis=1)
    return some_rounds(
        accepted.tolist(),
        block,
        answer=np.repeat(np.arange(answers), rounds),
        kind=np.repeat(np.where(np.arange(answers) % 2, "odd", "even"), rounds),
        temperature=np.full(answers * rounds, temperature),
        confidence=confidence,
        survival=np.cumprod(chance, axis=1),
    )

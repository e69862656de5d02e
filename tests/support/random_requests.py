"""Requests drawn at random over every sampling parameter and every way to stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dspark.engine import Request, SamplingParams, StopCheck


def stop_on_sum(modulus: int, keep_last: bool) -> Callable[[], StopCheck]:
    """Stops where a token and the one before it sum to a multiple of `modulus`, whatever batches they come in."""

    def make() -> StopCheck:
        previous = 0

        def check(token_ids: Sequence[int]) -> int | None:
            nonlocal previous
            for index, token in enumerate(token_ids):
                if (previous + token) % modulus == 0:
                    return index + keep_last
                previous = token
            return None

        return check

    return make


def random_requests(count: int, vocab_size: int, eos_token_id: int, seed: int = 0) -> list[Request]:
    """`count` requests with different seeds; prompts of 1..110 tokens, outputs of at most 89."""
    rng = np.random.default_rng(seed)
    return [_random_request(rng, number, vocab_size, eos_token_id) for number in range(count)]


def _random_request(rng: np.random.Generator, number: int, vocab_size: int, eos: int) -> Request:
    def sometimes(probability: float) -> bool:
        return bool(rng.random() < probability)

    ids = np.arange(vocab_size)
    # the long ones outgrow the blocks they were admitted with, so that a small pool runs out
    max_tokens = int(rng.integers(50, 90) if sometimes(0.2) else rng.integers(1, 25))
    bias = dict(zip(rng.choice(ids, 5, replace=False).tolist(), rng.uniform(-8, 8, 5).tolist(), strict=True))
    if sometimes(0.3):
        bias[eos] = 4.0
    sampling = SamplingParams(
        temperature=float(rng.choice([0.0, 0.7, 1.0, 1.5])),
        top_p=float(rng.uniform(0.3, 1.0)) if sometimes(0.4) else 1.0,
        top_k=int(rng.integers(1, 60)) if sometimes(0.4) else 0,
        min_p=float(rng.uniform(0.0, 0.3)) if sometimes(0.3) else 0.0,
        seed=number * 7919,
        presence_penalty=float(rng.uniform(-2, 2)) if sometimes(0.3) else 0.0,
        frequency_penalty=float(rng.uniform(-2, 2)) if sometimes(0.3) else 0.0,
        repetition_penalty=float(rng.uniform(0.7, 1.8)) if sometimes(0.3) else 1.0,
        logit_bias=bias if sometimes(0.3) else {},
        max_tokens=max_tokens,
        min_tokens=int(rng.integers(0, max_tokens + 1)) if sometimes(0.3) else 0,
        stop_token_ids=tuple(rng.choice(ids, 8, replace=False).tolist()) if sometimes(0.3) else (),
        ignore_eos=sometimes(0.3),
        logprobs=int(rng.integers(0, 6)) if sometimes(0.2) else None,
    )
    # short prompts, and some of repeated pieces, so that the lookup drafter finds what it looks for
    prompt = rng.integers(3, vocab_size, int(rng.choice([1, 2, 15, 16, 17, 33, rng.integers(1, 111)])))
    if sometimes(0.3):
        prompt = np.tile(rng.integers(3, vocab_size, 7), 8)
    return Request(
        tuple(prompt.tolist()),
        sampling,
        n=int(rng.choice([1, 1, 1, 2, 3])),
        make_stop_check=stop_on_sum(29, sometimes(0.5)) if sometimes(0.3) else None,
    )

"""What crosses the engine's boundary: a request of token ids in, deltas of token ids out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

StopCheck = Callable[[Sequence[int]], int | None]
"""Called in order with each batch of new token ids of one choice; returns how many of *these* ids are kept
(0..len) when the text must end here, else None. The engine then finishes the choice with `FinishReason.STOP`."""


class Grammar(Protocol):
    """Which tokens the text of one choice may go on with. Used by one thread, the engine's worker.

    The end-of-text tokens belong to it: they are allowed exactly where the text may end.
    """

    def mask(self) -> NDArray[np.int32]:
        """The allowed next tokens as bits, [ceil(vocab / 32)]: token t is bit t % 32 of word t // 32."""

    def advance(self, token_ids: Sequence[int]) -> int:
        """Take in tokens up to the first that is not allowed; returns how many were taken in."""

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens taken in."""

    def forced(self) -> Sequence[int]:
        """Tokens of the text that must follow here, as far as only one may; the text may be cut otherwise, too."""


class FinishReason(StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Out-of-range values are refused by `Engine.submit` with a `RequestError`.

    temperature: 0..2; below 1e-5 is greedy.      top_p: (0, 1].      top_k: 0 = off.      min_p: [0, 1].
    seed: any 64-bit integer; None: the engine draws one.
    presence_penalty, frequency_penalty: -2..2, over output tokens.  repetition_penalty: (0, 2], prompt + output, 1 = off.
    logit_bias: token id -> additive bias, -100..100.
    max_tokens: None = up to the model's context.   min_tokens: no end of text before so many output tokens.
    stop_token_ids: end of text beside the model's own.   ignore_eos: the model's own do not end the text.
    logprobs: None = none; k = the chosen token's and the k likeliest (0..20), of the raw target distribution.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_tokens: int | None = None
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class Request:
    """One request; `n` choices share the prompt's KV."""

    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    n: int = 1
    make_stop_check: Callable[[], StopCheck] | None = None
    """Makes one StopCheck per choice; it runs on the event loop, inside the step's commit."""
    make_grammar: Callable[[], Grammar] | None = None
    """Makes the Grammar of one choice, at its beginning and again after a preemption; it runs in the engine's worker."""
    predicted_token_ids: tuple[int, ...] = ()
    """What the output is expected to be, drafted from at no cost where it fits; never changes the output."""
    speculate: bool = True
    """False: nothing is drafted or verified for this request."""
    max_draft_tokens: int | None = None
    """Most tokens of a draft block, 0..γ; None: all."""
    cache_salt: bytes = b""
    """Prefix-cache blocks are shared only between requests with the same salt (one per tenant)."""
    priority: int = 0
    """Lower runs first, -100..100. Among equals the engine shares fairly between salts; it never changes the output."""
    deadline_s: float | None = None
    """When the answer is of no use any more, of `time.monotonic()`: the request then ends with DeadlineExceededError."""

    @property
    def speculates(self) -> bool:
        """Whether drafts may be verified for it."""
        return self.speculate and self.max_draft_tokens != 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probabilities (natural log, of the raw target distribution) at one position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class TokenDelta:
    """New tokens of one choice from one step.

    `accepted_drafts`: how many of `token_ids` (a prefix) were drafts the target accepted.
    The delta that carries `finish_reason` is the choice's last; it may carry no tokens.
    A stop token that ended the text is the last of `token_ids` (the server leaves it out of the text).
    """

    index: int
    token_ids: tuple[int, ...]
    accepted_drafts: int = 0
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None

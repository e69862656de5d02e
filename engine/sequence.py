"""The engine's own record of a request in flight, and of one step's batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np
from numpy.typing import NDArray

from dspark.engine.errors import GrammarError
from dspark.engine.facts import PlainReason, Reason, RequestFacts
from dspark.engine.kv_cache import BLOCK_SIZE, block_name
from dspark.engine.request import FinishReason, Request, StopCheck, TokenDelta, TokenLogprob


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(frozen=True, slots=True)
class NextDraft:
    """The block drafted for a sequence's next round. confidence, survival: [γ] float32; source: see `Draft.source`.

    free: it cost nothing, for the sequence was not chosen to be drafted for. predicted: it is of the request's prediction.
    legal: drafts that the request's grammar allows, 0..proposed; None: it has no grammar.
    """

    proposed: int
    confidence: NDArray[np.float32]
    survival: NDArray[np.float32]
    source: int = 0
    free: bool = False
    predicted: bool = False
    legal: int | None = None


@dataclass(frozen=True, slots=True)
class ExpectedDraft:
    """A block that a step in flight drafts, while the step that verifies it is planned.

    proposed: tokens that it may have.  free: see `NextDraft`.
    """

    proposed: int
    free: bool


@dataclass(slots=True, eq=False)
class RequestRecord:
    """One request: its n sequences, its facts, and the deltas not yet delivered."""

    request: Request
    facts: RequestFacts
    sequences: list[Sequence] = field(default_factory=list)
    deltas: list[TokenDelta] = field(default_factory=list)
    aborted: bool = False
    siblings_started: bool = False
    failure: GrammarError | None = None
    """What the request ends with, in place of a last delta."""
    on_freed: Callable[[], None] | None = None
    """Called once, when no choice holds or will take a block any more."""

    @property
    def finished(self) -> bool:
        return all(sequence.status is Status.FINISHED for sequence in self.sequences)


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of one request. Only the scheduler writes to it, never while a step is launched.

    tokens: prompt and output. computed: positions whose K/V are in `blocks`; while decoding, the token beyond is the anchor.
    Both are as of the last commit; what the steps in flight add is known only within bounds, which `in_flight` gives.
    names: of the full blocks of `tokens`, as far as known. in_flight: its part in each step in flight, the oldest first.
    draft: for the next round, if that is not planned yet. survival: of the newest block that the host knows, if there is one.
    """

    id: int  # ascending in order of arrival
    record: RequestRecord
    choice: int
    noise_key: int
    max_tokens: int
    stop_check: StopCheck | None
    tokens: list[int]
    prompt_len: int
    salt: bytes
    status: Status = Status.WAITING
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    published: int = 0
    finish_reason: FinishReason | None = None
    in_flight: deque[Decode | Prefill] = field(default_factory=deque)
    draft: NextDraft | None = None
    survival: NDArray[np.float32] | None = None
    plain_reason: PlainReason | None = None  # why nothing is drafted for the next round

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        return self.max_tokens - self.generated

    @property
    def coming(self) -> int:
        """Tokens that the steps in flight give at least, unless it ends in them: one a round."""
        return sum(part.ends for part in self.in_flight)

    @property
    def surely_computed(self) -> int:
        """`computed` after the steps in flight, at least; exactly, while its prompt is computed."""
        return self.computed + sum(part.count for part in self.in_flight)

    @property
    def furthest(self) -> int:
        """`computed` after the steps in flight, at most: all of their drafts may be accepted."""
        return self.surely_computed + sum(part.cap for part in self.in_flight if isinstance(part, Decode))

    @property
    def ending(self) -> bool:
        """The steps in flight give its last token, or it is known to be wanted no more."""
        return bool(self.in_flight) and (self.record.aborted or self.coming >= self.remaining)

    @property
    def decoding(self) -> bool:
        """After the steps in flight all but the anchor are computed, and the anchor is an output token."""
        sampled = self.generated + self.coming
        return sampled > 0 and self.surely_computed == self.prompt_len + sampled - 1

    @property
    def prefill_left(self) -> int:
        """Tokens to be computed after the steps in flight before the next one can be sampled; 0 while decoding."""
        return 0 if self.decoding else len(self.tokens) - self.surely_computed

    def extend_names(self, full_blocks: int) -> None:
        """Name the first `full_blocks` blocks of `tokens`."""
        while len(self.names) < full_blocks:
            start = len(self.names) * BLOCK_SIZE
            ids = np.array(self.tokens[start : start + BLOCK_SIZE], np.int64)
            self.names.append(block_name(self.names[-1] if self.names else self.salt, ids))


@dataclass(frozen=True, slots=True)
class Decode:
    """One round: the anchor and at most `cap` of the block's drafts. `cap_reason`: what bounds cap below proposed.

    expected: in place of `draft` while a step in flight drafts it; `cap` and `proposed` are then upper bounds.
    """

    sequence: Sequence
    draft: NextDraft | None
    cap: int
    cap_reason: Reason | None
    expected: ExpectedDraft | None = None

    @property
    def proposed(self) -> int:
        block = self.expected or self.draft
        return 0 if block is None else block.proposed

    @property
    def count(self) -> int:
        """Positions that it surely computes, as of a prefill."""
        return 1

    @property
    def ends(self) -> bool:
        """A token is sampled, as where a prefill ends."""
        return True


@dataclass(frozen=True, slots=True)
class Prefill:
    """`count` tokens from position `start`; `ends`: the last of them is the sequence's last token, so one is sampled."""

    sequence: Sequence
    start: int
    count: int
    ends: bool


@dataclass(slots=True)
class Batch:
    """One step's work, planned by the scheduler.

    started: sequences that (re)enter the runner with this step. ended: ids it can forget.
    draft_room: rows left in the token budget. queue_tokens: verifier-queue tokens that could start now or next step.
    """

    decodes: list[Decode]
    prefills: list[Prefill]
    started: list[Sequence]
    ended: list[int]
    draft_room: int
    queue_tokens: int
    waiting_sequences: int
    wiped: list[int] = field(default_factory=list)
    """Blocks that a failed step may have left anything in: cleared first, since a masked position takes part as 0 · value."""
    left: list[int] = field(default_factory=list)
    """Blocks of its sequences that ended while it was in flight. It may still write to them: what they are given to next is
    computed behind it."""

    @property
    def sequences(self) -> list[Sequence]:
        return [*(decode.sequence for decode in self.decodes), *(prefill.sequence for prefill in self.prefills)]

    @property
    def prefill_rows(self) -> int:
        return sum(prefill.count for prefill in self.prefills)

    @property
    def context_tokens(self) -> int:
        """K/V entries that attention reads, once per anchor and once per prefill row."""
        decodes = sum(decode.sequence.computed for decode in self.decodes)
        return decodes + sum(p.count * (p.start + p.count // 2) for p in self.prefills)


@dataclass(frozen=True, slots=True)
class Round:
    """What the target made of one decode or of a prefill's end (then verified = accepted = 0).

    tokens: accepted drafts, then the bonus token. failure: why there are none and the request must end.
    """

    tokens: list[int]
    verified: int
    accepted: int
    logprobs: list[TokenLogprob] | None
    failure: GrammarError | None = None


NO_ROUND = Round([], 0, 0, None)
"""Of a sequence that had ended in the step before, as the runner knew: nothing was computed."""


@dataclass(slots=True)
class StepResult:
    """What the runner brings back. rounds: as Batch.decodes; first_rounds: as the prefills that end.

    drafted: ids of the sequences that were drafted for, draft_width slots each; drafts: by sequence id, of those for which
    something was proposed.
    rows: of the target pass. Times in seconds: forward_s target pass with head, sample_s sampling and acceptance,
    inject_s drafter context, draft_s drafting, transfer_s copies to and from a device.
    """

    rounds: list[Round]
    first_rounds: list[Round]
    drafted: list[int]
    draft_width: int
    drafts: dict[int, NextDraft]
    rows: int
    forward_s: float
    sample_s: float
    inject_s: float
    draft_s: float
    transfer_s: float = 0.0
    host_sampled_rows: int = 0
    """Of those that a device computed: sampled on the host, since the device cannot."""

    @property
    def worker_s(self) -> float:
        return self.forward_s + self.sample_s + self.inject_s + self.draft_s

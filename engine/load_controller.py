"""How many drafts this step verifies, and whether to draft again: one rule with a price.

The price λ (tokens/s) is what a second of the engine is worth: the best rate it can earn at the present load with drafts
like the recent ones,

    λ = max( R / (T_verify(R) + T_host),  max over n of (R + S(n)) / (T_verify(R + n) + T_draft + T_host) )

with R anchors and S(n) the expected number of accepted drafts among the n likeliest of R blocks like the recent ones,
scaled by how these R sequences fare relative to those. (Of a whole, not of this step's blocks: a second saved in a poor
step is spent in an average one.) Work in the verifier queue that could run now raises it: a second of prefill is worth
κλ, κ >= 1 being the gain in plain rate from the sequences that the prefill starts, so with S_queue seconds of it
λ' = λ (T + κ S_queue) / (T + S_queue).

1. Budget: n maximises  A(n) - λ' T_verify(R + P + n),  A(n) the sum of the n largest survivals of *this* step. The whole
   cost curve is searched, over every jump.
2. Drafting again: for the m sequences that maximise  (value of their drafts) - λ' T_draft(m);  m = 0 is zero-draft mode,
   entered when drafting has lost more than chance explains and left when probes say that it would pay.

Both searches look at every draft, which is lossless only under coupled verification: there a draft is accepted exactly
when it equals the target's own token, whatever was known when its length was chosen. Rejection verification must stop at
the first drop (DSpark paper, Algorithm 1 and Appendix A) and does not use this module's adaptive mode.
Source: DSpark paper, Algorithm 1 (P = 0 and the same R, T in numerator and denominator); Dinkelbach 1967 for the price.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dspark.engine.calibration import Calibration
from dspark.engine.config import SpeculationMode
from dspark.engine.cost_model import CostModel
from dspark.engine.draft_history import RecentBlocks, SequenceRecords
from dspark.engine.draft_width import DraftWidth
from dspark.engine.facts import PlainReason, Reason

PROBE_COST_RATIO = 0.003
"""Share of the engine's time that each kind of probe may cost."""
FULL_BLOCK_PERIOD_STEPS = 64
"""When idle, one step in so many verifies a block's worth of drafts more than pays (alone: the whole block), so that
calibration sees what truncation hides."""
PLAIN_STEP_PERIOD_STEPS = 16
"""When idle, one step in at least so many verifies no draft. While all steps have about as many rows, a slower machine and
dearer rows look alike to the cost model; and what plain decoding takes is what speculation must beat."""
PLAIN_STEP_COST_RATIO = 0.001
"""Share of the engine's time that such plain steps may cost where they take as long as predicted."""
SURPRISE_COST_RATIO = 0.1
"""The share beside it, per unit of the log-ratio by which the last ones took longer or shorter."""
FIRST_SURPRISE = 0.05
SURPRISE_RATE = 0.25
SHORTEST_PROBE_PERIOD_STEPS = 8
NEW_BATCH_PERIOD_RATIO = 0.25
"""Share of the time between probes that is waited when at least half of the sequences are new."""
REGRET_TOKENS = 3.0
"""Tokens, times the root of the batch, that drafting must have lost before it is given up. (Page's CUSUM test: close to
the break-even point a mean of the last rounds would flip at every streak of bad luck; a real loss adds up quickly.)"""
FIRST_BLOCKS = 32
"""Blocks drafted whatever they seem worth before anything is given up: until then nothing is known."""
LARGEST_ENTRY_MARGIN = 1.0
"""Gain beyond the price of drafting, relative to it, that may be asked for before drafting again."""
ENTRY_MARGIN_DECAY = 0.998
LOAD_RATE = 0.1


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step could do. B sequences have an anchor in it.

    sequence_ids: [B].  survival: [B, γ] float32, calibrated, 0 at and beyond `proposed`.
    proposed: [B] int32, tokens of each draft block, 0..γ.  caps: [B] int32, most drafts by length, KV or grammar, >= 0.
    free: [B] bool, the block cost nothing: no drafter was run for the sequence.  source: [B] int8, see `Draft.source`.
    context_tokens: K/V entries that the step's attention reads.  draft_room: rows left in the step's token budget.
    prefill_tokens: prompt rows in this step.  prefill_ending: sequences whose prompt ends in this step.
    queue_tokens: verifier-queue tokens beyond this step that could start now or share this step's budget.
    draft_context: K/V entries that one more draft row reads on average.
    waiting_requests: sequences behind `prefill_tokens` and `queue_tokens`, those whose prompt is being computed included.
    known: False while a step in flight still drafts the blocks that this one verifies: `survival` is then that of the blocks
    before, `proposed` and `caps` are upper bounds.
    """

    sequence_ids: Sequence[int]
    survival: NDArray[np.float32]
    proposed: NDArray[np.int32]
    caps: NDArray[np.int32]
    free: NDArray[np.bool_]
    source: NDArray[np.int8]
    context_tokens: int
    draft_room: int
    prefill_tokens: int = 0
    prefill_ending: int = 0
    queue_tokens: int = 0
    waiting_requests: int = 0
    draft_context: float = 0.0
    known: bool = True


@dataclass(frozen=True, slots=True)
class Allocation:
    """The controller's answer for one step.

    budget: drafts to verify in total; `fill_budget` says which.  threshold: survival of the least likely draft admitted
    (0: nothing was cut, 1: everything was).  price: λ', tokens/s.
    draft_next: [B] bool, draft the next block after this step.  draft_new: the same for sequences whose prompt ends in it.
    draft_width: slots to draft of each block, 1..γ.  draft_free: take what drafts cost nothing for the others.
    predicted_step_s: of this step.  plain_step_s, plain_decode_s: of plain steps of the same anchors, with and without
    this step's prefill rows.
    reason: [B], why drafts of the sequence were cut, if they were.  plain_reason: [B], why nothing is drafted next,
    None where it is; `plain_reason_new` likewise.
    """

    budget: int
    threshold: float
    price: float
    draft_next: NDArray[np.bool_]
    draft_new: bool
    draft_width: int
    draft_free: bool
    predicted_step_s: float
    plain_step_s: float
    plain_decode_s: float
    reason: list[Reason]
    plain_reason: list[PlainReason | None]
    plain_reason_new: PlainReason | None

    def plain_estimate_s(self, accepted: int) -> float:
        """Seconds that plain decoding would have taken for this step's prefill, its B tokens and `accepted` more."""
        anchors = len(self.reason)
        return self.plain_step_s + (self.plain_decode_s * accepted / anchors if anchors else 0.0)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step did: times in seconds, lengths in drafts.

    rows: of the target pass, 0 if there was none.  verify_s: target pass, sampling and context injection.
    drafting_sequences: sequences drafted for after it, draft_width slots each.  draft_s: what that took.
    host_s: the rest of the step.
    sequence_ids: [B].  survival, confidence: [B, γ] float32, calibrated and raw.  sampled: [B] bool.
    source: [B] int8, see `Draft.source`.  free: [B] bool, see `StepLoad`.
    proposed, verified, accepted: [B] int32.  draft_context_tokens: K/V entries that the verified drafts' rows read.
    """

    rows: int
    context_tokens: int
    verify_s: float
    drafting_sequences: int
    draft_width: int
    draft_s: float
    host_s: float
    sequence_ids: Sequence[int]
    survival: NDArray[np.float32]
    confidence: NDArray[np.float32]
    sampled: NDArray[np.bool_]
    source: NDArray[np.int8]
    proposed: NDArray[np.int32]
    free: NDArray[np.bool_]
    verified: NDArray[np.int32]
    accepted: NDArray[np.int32]
    draft_context_tokens: int = 0


def fill_budget(survival: NDArray[np.float32], caps: NDArray[np.int32], budget: int) -> NDArray[np.int32]:
    """Drafts to verify per sequence, [B] int32: the `budget` highest survivals, a prefix of each block.

    survival: [B, γ] float32, non-increasing along γ.  caps: [B], most drafts of each sequence.
    Ties go to the lower row, and within it to the earlier draft. Sums to min(budget, sum of caps).
    """
    rows, block = survival.shape
    allowed = np.arange(block) < caps[:, None]
    candidates = int(allowed.sum())
    if budget >= candidates:
        return np.minimum(np.maximum(caps, 0), block).astype(np.int32)
    if budget <= 0:
        return np.zeros(rows, dtype=np.int32)
    masked = np.where(allowed, survival, np.float32(-1.0))
    at_margin = np.partition(masked, rows * block - budget, axis=None)[rows * block - budget]
    lengths = (masked > at_margin).sum(axis=1, dtype=np.int32)
    ties = (masked == at_margin).sum(axis=1, dtype=np.int32)
    before = np.cumsum(ties) - ties
    return lengths + np.clip(budget - int(lengths.sum()) - before, 0, ties).astype(np.int32)


class LoadController:
    """Decides per step; one thread calls it. `mode` may be changed between steps."""

    def __init__(
        self,
        mode: SpeculationMode,
        block_size: int,
        cost: CostModel,
        calibration: Calibration,
        itl_target_s: float | None = None,
        narrowest: int = 1,
    ) -> None:
        """block_size: γ.  itl_target_s: drafts may not make a step longer than this.  narrowest: see `DraftWidth`."""
        self.mode = mode
        self.block_size = block_size
        self.cost = cost
        self.calibration = calibration
        self.itl_target_s = itl_target_s
        self.load_ratio = 0.0
        """Smoothed growth of the step's time when its rows double: 0 memory bound, 1 the verifier is saturated."""
        self._recent = RecentBlocks(block_size)
        self._sequences = SequenceRecords()
        self._width = DraftWidth(block_size, narrowest)
        self._last_price = 0.0
        self._positions = np.arange(block_size)
        self._regret_tokens = 0.0
        self._entry_margin = 0.0
        self._drafting = True
        self._probing = False
        self._to_learn: tuple[NDArray[np.bool_], bool] | None = None
        self._steps_since_full = 0
        self._steps_since_probe = 0
        self._probe_credit_s = 0.0
        self._steps_since_plain = 0
        self._plain_credit_s = 0.0
        self._plain_step = False
        self._plain_surprise = FIRST_SURPRISE
        self._state = "plain"

    @property
    def state(self) -> str:
        """off | full (all drafts verified) | limited | minimal (at most one a block) | plain (the drafter rests)."""
        return "off" if self.mode == "off" else self._state

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended."""
        self._sequences.forget(sequence_id)

    def allocate(self, load: StepLoad) -> Allocation:
        """Decide the step's draft budget and which sequences are drafted for after it."""
        self._to_learn = None
        if self.mode == "off":
            return self._off(load)
        anchors = len(load.sequence_ids)
        lengths = np.minimum(load.proposed, load.caps)
        available = int(lengths.sum())
        room = max(0, min(available, load.draft_room, self.cost.max_rows - anchors - load.prefill_tokens))
        slots = self._sequences.slots(load.sequence_ids)
        probe = self._probing
        self._probing = False
        attempted = self._sequences.attempted[slots]
        if load.known:
            self._learn_blocks(load, slots, attempted, probe)
        else:
            self._to_learn = attempted, probe
        prices = self._prices(load, slots)
        self._last_price = prices.quiet
        admissible = np.where(self._positions < lengths[:, None], load.survival, np.float32(0.0))
        likeliest = -admissible.ravel()
        likeliest.sort()
        np.negative(likeliest, out=likeliest)
        if self.mode == "adaptive":
            quiet_budget, budget, plain_step = self._budget(load, likeliest, room, prices, probe)
            draft_next, draft_new, zero_draft, width = self._choose_drafted(load, slots, prices)
        else:
            budget, quiet_budget, plain_step = room, room, False
            draft_next, draft_new, zero_draft, width = np.ones(anchors, np.bool_), True, False, self.block_size
        self._sequences.attempted[slots] = draft_next
        drafting = int(draft_next.sum()) + (load.prefill_ending if draft_new else 0)
        rows = anchors + load.prefill_tokens
        predicted_s = float(prices.verify_s[rows + budget]) + self.cost.draft_s(drafting * width) + prices.host_s
        self._probe_credit_s += PROBE_COST_RATIO * predicted_s
        self._plain_credit_s += (PLAIN_STEP_COST_RATIO + SURPRISE_COST_RATIO * abs(self._plain_surprise)) * predicted_s
        self._note_state(anchors, available, budget, int((lengths > 0).sum()), drafting, zero_draft, prices, rows)
        plain = self._plain_reason(load, prices) if zero_draft else PlainReason.LOW_ACCEPTANCE
        if budget >= available:
            threshold = 0.0
        else:
            threshold = float(likeliest[budget - 1]) if budget else 1.0
        return Allocation(
            budget=budget,
            threshold=threshold,
            price=prices.raised,
            draft_next=draft_next,
            draft_new=draft_new,
            draft_width=width,
            draft_free=True,
            predicted_step_s=predicted_s,
            plain_step_s=float(prices.verify_s[rows]) + prices.host_s,
            plain_decode_s=float(prices.verify_s[anchors]) + prices.host_s,
            reason=self._reasons(
                load, admissible, likeliest, budget, quiet_budget, plain_step or (probe and zero_draft), prices
            ),
            plain_reason=[None if drafted else plain for drafted in draft_next.tolist()],
            plain_reason_new=None if draft_new else plain,
        )

    def resolve(self, load: StepLoad, allocation: Allocation) -> Allocation:
        """The blocks of the step that was allocated last are known now: learn them. → its allocation, as far as they fill it.

        load: as for `allocate`, but known.
        """
        if self._to_learn is None:
            return allocation
        slots = self._sequences.slots(load.sequence_ids)
        self._learn_blocks(load, slots, *self._to_learn)
        self._to_learn = None
        budget = min(allocation.budget, int(np.minimum(load.proposed, load.caps).sum()))
        verify_s = self.cost.verify_curve(load.context_tokens, len(slots), load.draft_context)
        rows = len(slots) + load.prefill_tokens
        spared_s = float(verify_s[rows + allocation.budget] - verify_s[rows + budget])
        return replace(allocation, budget=budget, predicted_step_s=allocation.predicted_step_s - spared_s)

    def mean_survival(self) -> NDArray[np.float32]:
        """[γ] float32, for a block of which nothing is known: the mean of recent ones, the likeliest drafts first."""
        return np.diff(self._recent.expected(1, self.block_size)).astype(np.float32)

    def _off(self, load: StepLoad) -> Allocation:
        """Plain decoding, with a prediction of its time; blocks that are still there are not verified."""
        anchors = len(load.sequence_ids)
        rows = anchors + load.prefill_tokens
        host_s = self.cost.host_s(anchors)
        step_s = float(self.cost.verify_s(rows, load.context_tokens)) + host_s
        decode_s = float(self.cost.verify_s(max(anchors, 1), load.context_tokens)) + host_s
        return Allocation(
            budget=0,
            threshold=1.0,
            price=anchors / decode_s,
            draft_next=np.zeros(anchors, np.bool_),
            draft_new=False,
            draft_width=self.block_size,
            draft_free=False,
            predicted_step_s=step_s,
            plain_step_s=step_s,
            plain_decode_s=decode_s,
            reason=[Reason.OFF] * anchors,
            plain_reason=[PlainReason.OFF] * anchors,
            plain_reason_new=PlainReason.OFF,
        )

    def observe(self, outcome: StepOutcome) -> None:
        """Learn from one step: costs, calibration, and how each sequence's drafts fared."""
        sequences = len(outcome.sequence_ids)
        surprise = self.cost.observe_verify(
            outcome.rows, outcome.context_tokens, outcome.verify_s, outcome.draft_context_tokens
        )
        if self._plain_step:
            self._plain_step = False
            self._plain_surprise += SURPRISE_RATE * (surprise - self._plain_surprise)
        self.cost.observe_draft(outcome.drafting_sequences * outcome.draft_width, outcome.draft_s)
        self.cost.observe_host(sequences, outcome.host_s)
        self.calibration.observe(
            outcome.confidence, outcome.sampled, outcome.verified, outcome.accepted, outcome.source
        )
        drafted = (outcome.proposed > 0) & ~outcome.free & self._sequences.known(outcome.sequence_ids)
        if drafted.any():
            slots = self._sequences.slots(np.asarray(outcome.sequence_ids)[drafted].tolist())
            survival = outcome.survival[drafted]
            self._sequences.learn(
                slots,
                np.where(self._positions < outcome.proposed[drafted, None], survival, 0.0).sum(axis=1),
                np.where(self._positions < outcome.verified[drafted, None], survival, 0.0).sum(axis=1),
                outcome.accepted[drafted].astype(np.float64),
            )

    def _prices(self, load: StepLoad, slots: NDArray[np.intp]) -> _Prices:
        verify_s = self.cost.verify_curve(load.context_tokens, len(slots), load.draft_context)
        anchors = max(1, len(slots) or load.prefill_ending)
        host_s = self.cost.host_s(anchors)
        drafted = max(1, anchors - int(np.count_nonzero(self._sequences.skip[slots])))
        limit = max(0, min(drafted * self.block_size, self.cost.max_rows - anchors))
        step_s = verify_s[anchors : anchors + limit + 1] + (self.cost.draft_s(drafted * self._width.width) + host_s)
        quality = self._sequences.quality(slots, self._recent.mean_accepted)
        mean_quality = float(quality.mean()) if len(slots) else 1.0
        rates = (anchors + self._recent.expected(drafted, limit, mean_quality)) / step_s
        best = int(rates.argmax())
        plain_s = float(verify_s[anchors]) + host_s
        if rates[best] > anchors / plain_s:
            quiet, best_s = float(rates[best]), float(step_s[best])
        else:
            quiet, best_s = anchors / plain_s, plain_s
        raised = quiet * self._queue_gain(load, verify_s, host_s, anchors, best_s)
        return _Prices(verify_s, host_s, quiet, raised, quality, mean_quality)

    def _queue_gain(
        self, load: StepLoad, verify_s: NDArray[np.float64], host_s: float, anchors: int, step_s: float
    ) -> float:
        """Factor >= 1 by which work in the verifier queue raises the price; grows with that work."""
        backlog = load.prefill_tokens + load.queue_tokens
        fitting = min(backlog, self.cost.max_rows - anchors)
        if fitting <= 0:
            return 1.0
        queue_s = float(verify_s[anchors + fitting] - verify_s[anchors]) * backlog / fitting
        # the sequences behind the backlog once they run: the best plain rate on the way to all of them
        joined = np.arange(anchors, min(anchors + load.waiting_requests, self.cost.max_rows) + 1)
        rates = joined / (verify_s[joined] + host_s)
        return (step_s + queue_s * float(rates.max() / rates[0])) / (step_s + queue_s)

    def _learn_blocks(self, load: StepLoad, slots: NDArray[np.intp], attempted: NDArray[np.bool_], probe: bool) -> None:
        """Take the blocks drafted after the last step into the picture of recent ones."""
        attempted = (attempted | (load.proposed > 0)) & ~load.free
        if not attempted.any():
            return
        blocks = load.survival[attempted]
        self._learn_width(load, attempted)
        if probe:
            # a probe that looks worth drafting for replaces the old picture, which was of times when it was not; if it
            # was luck, the blocks drafted next say so at the price of a step or two
            promising = RecentBlocks(self.block_size)
            promising.replace(blocks)
            anchors = len(slots)
            prices = self._prices(load, slots)
            gain = self._gain(promising, anchors, anchors, 0, anchors * self.block_size, prices.quiet, prices)
            if gain > prices.quiet * self.cost.draft_s(anchors * self._width.width) * (1.0 + self._entry_margin):
                promising.seen += self._recent.seen
                self._recent = promising
                return
        self._recent.add(blocks)

    def _learn_width(self, load: StepLoad, attempted: NDArray[np.bool_]) -> None:
        """Take the drafter's own blocks into the picture of what each slot is worth."""
        drafted = attempted & (load.source == 0) & (load.proposed > 0)
        if drafted.any():
            anchors = len(load.sequence_ids)
            verify_s = self.cost.verify_curve(load.context_tokens, anchors, load.draft_context)
            by_slot = np.minimum(anchors + np.arange(self.block_size + 1) * int(drafted.sum()), self.cost.max_rows)
            row_s = np.diff(verify_s[by_slot]) / drafted.sum()
            self._width.learn(load.survival[drafted], load.proposed[drafted], self._last_price * row_s)

    def _gain(
        self,
        blocks: RecentBlocks,
        anchors: int,
        drafted: int,
        prefill: int,
        room: int,
        price: float,
        prices: _Prices,
        quality: float = 1.0,
    ) -> float:
        """Tokens that verifying the best drafts of `drafted` such blocks is worth beyond their verification's price."""
        base = anchors + prefill
        limit = max(0, min(drafted * self.block_size, room, self.cost.max_rows - base))
        added_s = prices.verify_s[base : base + limit + 1] - prices.verify_s[min(base, self.cost.max_rows)]
        if added_s.size == 0:
            return 0.0
        return float((blocks.expected(drafted, added_s.size - 1, quality) - price * added_s).max())

    def _budget(
        self, load: StepLoad, likeliest: NDArray[np.float32], room: int, prices: _Prices, probe: bool
    ) -> tuple[int, int, bool]:
        """(budget if nothing were queued, budget), in drafts, and whether it is 0 only to see what a plain step takes."""
        anchors = len(load.sequence_ids)
        base = anchors + load.prefill_tokens
        if self.itl_target_s is not None:
            tokens_s = self.itl_target_s - prices.host_s - self.cost.draft_s(anchors * self._width.width)
            room = max(0, min(room, int(np.searchsorted(prices.verify_s[base:], tokens_s, side="right")) - 1))
        accepted = np.zeros(room + 1)
        likeliest[:room].cumsum(dtype=np.float64, out=accepted[1:])
        net = accepted - prices.quiet * prices.verify_s[anchors : anchors + room + 1]
        quiet = budget = int(net.argmax())
        self._steps_since_full += 1
        if load.prefill_tokens or load.queue_tokens:
            # never more than without the backlog, also where its rows have paid for a jump of the cost curve
            raised = accepted[: quiet + 1] - prices.raised * prices.verify_s[base : base + quiet + 1]
            budget = int(raised.argmax())
        elif probe:
            # labels, even where no draft is worth its row: without them a wrong calibration could not be corrected
            budget = max(budget, min(room, self.block_size))
        probed = min(room, budget + self.block_size)
        idle = not load.queue_tokens and not load.prefill_tokens
        if idle and budget < room and self._steps_since_full >= FULL_BLOCK_PERIOD_STEPS:
            lost_s = float(net[budget] - net[probed]) / prices.quiet
            if lost_s <= self._probe_credit_s:
                self._probe_credit_s = 0.0
                self._steps_since_full = 0
                budget = probed
        if budget == room:
            self._steps_since_full = 0
        if idle and budget == quiet and self._plain_step_due(float(net[budget] - net[0]) / prices.quiet, budget):
            return quiet, 0, True
        paid = (load.proposed > 0) & ~load.free
        drafted = int(np.count_nonzero(paid))
        spent_s = float(prices.verify_s[base + budget] - prices.verify_s[base])
        spent_s += self.cost.draft_s(drafted * self._width.width)
        self._regret_tokens = max(0.0, self._regret_tokens + prices.quiet * spent_s - float(accepted[budget]))
        return quiet, budget, False

    def _plain_step_due(self, lost_s: float, budget: int) -> bool:
        """Verify nothing this once, to see what that takes? lost_s: what the `budget` drafts would have gained."""
        self._steps_since_plain = self._steps_since_plain + 1 if budget else 0
        if self._steps_since_plain < PLAIN_STEP_PERIOD_STEPS or lost_s > self._plain_credit_s:
            return False
        self._steps_since_plain, self._plain_credit_s = 0, 0.0
        self._plain_step = True
        return True

    def _choose_drafted(
        self, load: StepLoad, slots: NDArray[np.intp], prices: _Prices
    ) -> tuple[NDArray[np.bool_], bool, bool, int]:
        """([B] draft for it after this step, the same for sequences whose prompt ends, zero-draft mode, slots of a block)."""
        records = self._sequences
        anchors = len(slots) + load.prefill_ending
        if anchors == 0:
            return np.zeros(0, dtype=np.bool_), False, False, self.block_size
        eligible, draft_next = records.eligible(slots)
        drafted = int(np.count_nonzero(eligible)) + load.prefill_ending
        next_prefill = min(load.queue_tokens, load.prefill_tokens + load.draft_room)
        next_room = load.prefill_tokens + load.draft_room - load.prefill_ending - next_prefill
        price = prices.raised if load.queue_tokens else prices.quiet
        quality = prices.mean_quality
        gain = self._gain(self._recent, anchors, max(drafted, 1), next_prefill, next_room, price, prices, quality)
        widths_s = np.array([self.cost.draft_s(max(drafted, 1) * w) for w in range(1, self.block_size + 1)])
        width = self._width.choose(max(drafted, 1), price, widths_s)
        draft_price = price * self.cost.draft_curve(anchors, width)
        if not self._drafting:
            draft_price *= 1.0 + self._entry_margin
        each = gain / max(drafted, 1)
        value = np.where(eligible, each / quality * prices.quality, -np.inf)
        order = np.argsort(-value, kind="stable")[: drafted - load.prefill_ending]
        net = np.full(len(order) + 1, each * load.prefill_ending)
        net[1:] += value[order].cumsum()
        net -= draft_price[load.prefill_ending : load.prefill_ending + len(net)]
        # of equals the most sequences: drafting for nothing lost keeps the picture fresh
        chosen = len(net) - 1 - int(net[::-1].argmax())
        pays = bool(net[chosen] >= 0) and chosen + load.prefill_ending > 0
        self._enter_or_leave(pays or gain >= draft_price[drafted], gain < 0.5 * draft_price[drafted], anchors)
        if not self._drafting:
            probe = self._probe_due(load, prices)
            draft_next[:] = probe
            return draft_next, probe, True, self.block_size
        if pays:
            draft_next[order[:chosen]] = True
        elif gain < draft_price[drafted]:
            draft_next |= eligible
        records.judge(slots[draft_next & eligible], slots[eligible & ~draft_next])
        return draft_next, True, False, width

    def _enter_or_leave(self, pays: bool, hopeless: bool, anchors: int) -> None:
        """Change between drafting and zero-draft mode.

        Leaving takes a loss that was seen, or one that is foreseen to be large. Coming back takes a foreseen gain, and the
        more of one the oftener that promise was broken lately.
        """
        limit = REGRET_TOKENS * anchors**0.5
        if not self._drafting:
            self._entry_margin *= ENTRY_MARGIN_DECAY
            if pays:
                self._drafting = True
                # on trial: a promise that was only luck is found out after a quarter of the usual loss
                self._regret_tokens = 0.75 * limit
        elif self._recent.seen > FIRST_BLOCKS and (self._regret_tokens > limit or (hopeless and not pays)):
            self._drafting = False
            self._entry_margin = min(2.0 * self._entry_margin + 0.1, LARGEST_ENTRY_MARGIN)
            self._regret_tokens = 0.0
        elif self._regret_tokens == 0.0:
            self._entry_margin *= ENTRY_MARGIN_DECAY

    def _probe_due(self, load: StepLoad, prices: _Prices) -> bool:
        """In zero-draft mode: draft once for every sequence, to see? At a bounded share of the time, unless work waits.

        For every sequence, because drafting for one costs nearly as much and one block tells little. Sooner when most of
        the batch is new, for then the picture is of others.
        """
        anchors = len(load.sequence_ids) + load.prefill_ending
        self._steps_since_probe += 1
        if anchors == 0 or load.queue_tokens:
            return False
        with_block = min(anchors + self.block_size, self.cost.max_rows)
        probe_s = self.cost.draft_s(anchors * self.block_size) + float(
            prices.verify_s[with_block] - prices.verify_s[anchors]
        )
        plain_s = float(prices.verify_s[anchors]) + prices.host_s
        period_steps = probe_s / (PROBE_COST_RATIO * plain_s)
        if 2 * load.prefill_ending >= anchors:
            period_steps *= NEW_BATCH_PERIOD_RATIO
        due = self._steps_since_probe >= max(SHORTEST_PROBE_PERIOD_STEPS, period_steps)
        if due:
            self._steps_since_probe = 0
            self._probing = True
        return due

    def _plain_reason(self, load: StepLoad, prices: _Prices) -> PlainReason:
        """Why zero-draft mode: would drafting pay without the queue, or for one sequence alone?"""
        anchors = len(load.sequence_ids) + load.prefill_ending
        room = self.cost.max_rows
        if load.queue_tokens and self._gain(
            self._recent, anchors, anchors, 0, room, prices.quiet, prices
        ) >= prices.quiet * self.cost.draft_s(anchors * self._width.width):
            return PlainReason.QUEUE
        alone = 1.0 / (float(prices.verify_s[1]) + self.cost.host_s(1))
        if self._gain(self._recent, 1, 1, 0, room, alone, prices) >= alone * self.cost.draft_s(self._width.width):
            return PlainReason.LOAD
        return PlainReason.LOW_ACCEPTANCE

    def _reasons(
        self,
        load: StepLoad,
        admissible: NDArray[np.float32],
        likeliest: NDArray[np.float32],
        budget: int,
        quiet_budget: int,
        only_probe: bool,
        prices: _Prices,
    ) -> list[Reason]:
        """[B] why the first draft of each block that the budget cuts is cut, if any is."""
        sequences = len(admissible)
        if only_probe:
            return [Reason.PROBE_OFF] * sequences
        if budget == load.draft_room and load.prefill_tokens:
            return [Reason.QUEUE] * sequences
        if self.mode == "fixed":
            return [Reason.LOAD] * sequences
        if sequences == 1 and budget == quiet_budget:
            return [Reason.CONFIDENCE]
        if budget >= likeliest.size:
            return [Reason.CONFIDENCE] * sequences
        first_cut = np.where(admissible <= likeliest[budget], admissible, np.float32(0.0)).max(axis=1)
        # alone on the machine: its best rate, and what a row costs on average over one block
        most = min(self.block_size, self.cost.max_rows - 1)
        alone_s = prices.verify_s[1 : most + 2] + prices.host_s
        alone_rate = float(
            ((1.0 + self._recent.expected(1, most)) / (alone_s + self.cost.draft_s(self._width.width))).max()
        )
        worth_alone = alone_rate * float(alone_s[-1] - alone_s[0]) / max(most, 1)
        fits_quiet = first_cut >= likeliest[quiet_budget - 1] if quiet_budget > budget else np.zeros(sequences, bool)
        return [
            Reason.QUEUE if quiet else Reason.CONFIDENCE if low else Reason.LOAD
            for quiet, low in zip(fits_quiet.tolist(), (first_cut < worth_alone).tolist(), strict=True)
        ]

    def _note_state(
        self,
        anchors: int,
        available: int,
        budget: int,
        blocks: int,
        drafting: int,
        zero_draft: bool,
        prices: _Prices,
        rows: int,
    ) -> None:
        if zero_draft or (available == 0 and drafting == 0):
            self._state = "plain"
        elif available and budget < available:
            self._state = "minimal" if budget <= blocks else "limited"
        else:
            self._state = "full"
        if anchors:
            largest = self.cost.max_rows
            once, twice = float(prices.verify_s[rows]), float(prices.verify_s[min(2 * rows, largest)])
            growth = (twice - once) / once * rows / max(1, min(2 * rows, largest) - rows)
            self.load_ratio += LOAD_RATE * (min(growth, 1.0) - self.load_ratio)


@dataclass(frozen=True, slots=True)
class _Prices:
    """What the step's decisions share.

    verify_s: [max rows + 1], seconds by rows.  quiet, raised: λ without and with the verifier queue, tokens/s.
    quality: [B], expected accepted drafts of each sequence relative to recent blocks; mean_quality: of the batch.
    """

    verify_s: NDArray[np.float64]
    host_s: float
    quiet: float
    raised: float
    quality: NDArray[np.float64]
    mean_quality: float

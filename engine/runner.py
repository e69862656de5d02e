"""One step's tensor work: target pass, acceptance, the drafter's context, the next drafts. Runs in the worker thread.

The runner keeps what a step needs to know of each sequence (tokens, anchor, drafted block), so the host may plan a step
before it has seen the last one's outcome: a plan gives bounds, and which drafts fill the budget is decided here. So is who goes
on: a sequence that ended in the step before, unknown to the host, gets no row.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from itertools import compress

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.calibration import CalibrationTable
from dspark.engine.config import VerificationMode
from dspark.engine.drafters.drafter import PREDICTION, Drafter, DraftRow
from dspark.engine.errors import GrammarError
from dspark.engine.grammar import GrammarProgress
from dspark.engine.kv_cache import BLOCK_SIZE
from dspark.engine.load_controller import Allocation, fill_budget
from dspark.engine.models.decoder import Decoder, FlatBatch
from dspark.engine.noise import NoiseCache
from dspark.engine.request import TokenLogprob
from dspark.engine.sampling import Sampler, SampleRow, SamplingState, token_logprobs
from dspark.engine.sequence import NO_ROUND, Batch, ExpectedDraft, NextDraft, Round, Sequence, StepResult
from dspark.engine.verification import accept_coupled, accept_rejection, target_probabilities

_NO_TOKENS = np.empty(0, np.int64)


@dataclass(slots=True)
class SequenceState:
    """The runner's record of a sequence. tokens: [capacity], the first `length` are prompt and output, of at most `limit`.

    failure: the grammar broke down, so the sequence has no next token. ended: that was reported, or the length limit or an
    end-of-text token was reached. (A stop string may still end it: that is known to the host.)
    """

    sampling: SamplingState
    tokens: NDArray[np.int64]
    length: int
    limit: int
    block_table: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    drafts: NDArray[np.int64] = field(default_factory=lambda: _NO_TOKENS)
    survival: NDArray[np.float32] | None = None
    draft_probs: torch.Tensor | None = None  # [γ, vocab], rejection mode
    predicted: NDArray[np.int64] = field(default_factory=lambda: _NO_TOKENS)
    grammar: GrammarProgress | None = None
    failure: GrammarError | None = None
    ended: bool = False

    def useful_drafts(self, cap: int) -> int:
        """Drafts of the block that may be verified. cap: at most, by the plan, for which the anchor was not known yet."""
        return min(cap, len(self.drafts), self.limit - self.length - 1)

    def allowed(self, count: int) -> Items[NDArray[np.bool_] | None]:
        """What the grammar allows after each of the first 0..count drafts; None: everything."""
        if self.grammar is not None and self.failure is None:
            try:
                return self.grammar.allowed(self.drafts[:count].tolist())
            except GrammarError as error:
                self.failure = error
        return [None] * (count + 1)

    def forced(self) -> NDArray[np.int64]:
        """What the grammar leaves no choice about."""
        if self.grammar is None or self.failure is not None:
            return _NO_TOKENS
        try:
            return np.array(self.grammar.forced(), np.int64)
        except GrammarError as error:
            self.failure = error
            return _NO_TOKENS

    def legal(self, drafts: NDArray[np.int64]) -> int:
        """How many of the drafts the grammar allows; all of them without one."""
        if self.grammar is None:
            return len(drafts)
        try:
            return self.grammar.legal(drafts.tolist())
        except GrammarError as error:
            self.failure = error
            return 0

    def append(self, tokens: Items[int]) -> None:
        if self.length + len(tokens) > self.tokens.size:
            self.tokens = np.resize(self.tokens, 2 * (self.length + len(tokens)))
        self.tokens[self.length : self.length + len(tokens)] = tokens
        self.length += len(tokens)
        self.sampling.append(tokens)
        if self.grammar is not None:
            try:
                self.grammar.append(tokens)
            except GrammarError as error:
                self.failure = error

    def end_round(self, tokens: Items[int]) -> None:
        """A round gave these tokens, which become text unless the grammar broke down in it; its drafts are used up."""
        if self.failure is None:
            self.append(tokens)
        self.drafts, self.survival, self.draft_probs = _NO_TOKENS, None, None
        stopped = not self.sampling.stop_ids.isdisjoint(tokens)
        self.ended = stopped or self.length >= self.limit or self.failure is not None


@dataclass(frozen=True, slots=True)
class Pending:
    """A launched step. On the CPU it has been computed, but its result is the host's business only when it is collected.

    expected: by id, what is being drafted for each sequence that goes on: all that a plan may know of it until then.
    """

    result: StepResult
    expected: dict[int, ExpectedDraft]


class Runner:
    """Owns the target, the drafter and every sequence's state."""

    def __init__(
        self,
        decoder: Decoder,
        drafter: Drafter,
        noise: NoiseCache,
        stop_token_ids: frozenset[int],
        verification: VerificationMode,
        max_draft_tokens: int,
    ) -> None:
        """stop_token_ids: the model's own ends of text. max_draft_tokens: drafts kept of a block, at most its size."""
        self.decoder = decoder
        self.drafter = drafter
        self._noise = noise
        self._sampler = Sampler(decoder.head_weight, noise)
        self._stop_token_ids = stop_token_ids
        self._verification = verification
        self._max_draft_tokens = max_draft_tokens
        self._states: dict[int, SequenceState] = {}

    def launch(self, batch: Batch, allocation: Allocation, calibration: CalibrationTable) -> Pending:
        """Start a planned step; `calibration` turns the new drafts' confidence into survival."""
        result = self._verify(batch, allocation.budget)
        started_s = time.perf_counter()
        chosen = self._to_draft(batch, allocation)
        free = self._free(batch, allocation, chosen)
        expected = dict.fromkeys((sequence.id for sequence in _sampled_sequences(batch)), ExpectedDraft(0, free=True))
        expected |= {sequence.id: ExpectedDraft(self._longest(sequence), free=False) for sequence in chosen}
        expected |= {sequence.id: ExpectedDraft(self._longest(sequence), free=True) for sequence in free}
        chosen = self._going_on(chosen)
        drafts = self._draft(chosen, self._going_on(free), allocation.draft_width, calibration)
        result.drafts = self._undrafted(batch) | drafts
        result.drafted = [sequence.id for sequence in chosen]
        result.draft_width = max((self._width(sequence, allocation.draft_width) for sequence in chosen), default=0)
        result.draft_s = time.perf_counter() - started_s
        return Pending(result, expected)

    def collect(self, pending: Pending) -> StepResult:
        """What the step brought; waits until it is computed. Each is collected once, in the order of their launch."""
        return pending.result

    def _verify(self, batch: Batch, budget: int) -> StepResult:
        """The target pass over what goes on, acceptance, and the drafter's context."""
        started_s = time.perf_counter()
        self._update_states(batch)
        goes_on = [not self._states[decode.sequence.id].ended for decode in batch.decodes]
        batch = replace(batch, decodes=list(compress(batch.decodes, goes_on)))
        result = StepResult([NO_ROUND] * len(goes_on), [], [], 0, {}, 0, 0.0, 0.0, 0.0, 0.0)
        if not batch.sequences:
            return result
        lengths = self._draft_lengths(batch, budget)
        flat = self._flatten(batch, lengths)
        hidden, features = self.decoder.forward(flat, self.drafter.feature_layers)
        wanted = _sampled_rows(batch, lengths)
        hidden = hidden[torch.from_numpy(wanted)]
        logits = self.decoder.logits(hidden)
        forward_s = time.perf_counter()
        rounds, result.first_rounds = self._judge(batch, lengths, logits, hidden)
        sample_s = time.perf_counter()
        if features is not None:
            self.drafter.observe(features, flat.positions, flat.slots)
        computed = iter(rounds)
        result.rounds = [next(computed) if alive else NO_ROUND for alive in goes_on]
        result.rows = len(flat.token_ids)
        result.forward_s, result.sample_s = forward_s - started_s, sample_s - forward_s
        result.inject_s = time.perf_counter() - sample_s
        return result

    def _update_states(self, batch: Batch) -> None:
        for sequence_id in batch.ended:
            state = self._states.pop(sequence_id, None)
            if state is not None:  # a step that failed may not have come to start it, or have ended it already
                self._noise.forget(state.sampling.noise_key)
            self.drafter.forget(sequence_id)
        if batch.wiped:
            self.decoder.clear_blocks(batch.wiped)
        for sequence in batch.started:
            self._states[sequence.id] = self._new_state(sequence)
        for sequence in batch.sequences:
            state = self._states[sequence.id]
            if len(sequence.blocks) != state.block_table.size:
                state.block_table = np.array(sequence.blocks, np.int32)

    def _new_state(self, sequence: Sequence) -> SequenceState:
        request = sequence.record.request
        params = request.sampling
        model_stops = frozenset() if params.ignore_eos else self._stop_token_ids
        tokens, limit = np.array(sequence.tokens, np.int64), sequence.prompt_len + sequence.max_tokens
        sampling = SamplingState(
            params,
            sequence.noise_key,
            tokens[: sequence.prompt_len],
            model_stops | frozenset(params.stop_token_ids),
            self._noise.vocab_size,
        )
        output = sequence.tokens[sequence.prompt_len :]
        sampling.append(output)
        predicted = np.array(request.predicted_token_ids, np.int64)
        state = SequenceState(sampling, tokens, len(tokens), limit, predicted=predicted)
        if request.make_grammar is not None:
            try:
                state.grammar = GrammarProgress(request.make_grammar, output, sampling.stop_ids, self._noise.vocab_size)
            except GrammarError as error:
                state.failure = error
        return state

    def _draft_lengths(self, batch: Batch, budget: int) -> NDArray[np.int32]:
        """How many drafts of each decode are verified, [decodes]."""
        caps = np.array([self._states[d.sequence.id].useful_drafts(d.cap) for d in batch.decodes], np.int32)
        if not budget or not caps.any():
            return np.zeros(len(caps), np.int32)
        survival = np.zeros((len(caps), self.drafter.block_size), np.float32)
        for row, decode in zip(survival, batch.decodes, strict=True):
            known = self._states[decode.sequence.id].survival
            if known is not None:
                row[:] = known
        return fill_budget(survival, caps, budget)

    def _flatten(self, batch: Batch, lengths: NDArray[np.int32]) -> FlatBatch:
        """Decodes first, then prefill chunks; K/V slots from each sequence's block table."""
        tokens, firsts, tables = [], [], []
        for decode, length in zip(batch.decodes, lengths.tolist(), strict=True):
            state = self._states[decode.sequence.id]
            tokens.append(state.tokens[state.length - 1 : state.length])
            if length:
                tokens[-1] = np.concatenate((tokens[-1], state.drafts[:length]))
            firsts.append(state.length - 1)
            tables.append(state.block_table)
        for prefill in batch.prefills:
            state = self._states[prefill.sequence.id]
            tokens.append(state.tokens[prefill.start : prefill.start + prefill.count])
            firsts.append(prefill.start)
            tables.append(state.block_table)
        counts = np.array([len(one) for one in tokens], np.int32)
        row_starts = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=row_starts[1:])
        first_positions = np.array(firsts, np.int32)
        owners = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(row_starts[-1], dtype=np.int32) + (first_positions - row_starts[:-1])[owners]
        block_tables = np.zeros((len(tables), max(table.size for table in tables)), np.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: table.size] = table
        slots = block_tables[owners, positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + positions % BLOCK_SIZE
        return FlatBatch(np.concatenate(tokens), positions, slots, block_tables, row_starts, first_positions)

    def _judge(
        self, batch: Batch, lengths: NDArray[np.int32], logits: torch.Tensor, hidden: torch.Tensor
    ) -> tuple[list[Round], list[Round]]:
        """Accept drafts and add the target's own token, for every decode and every prefill that ends."""
        states = [self._states[sequence.id] for sequence in _sampled_sequences(batch)]
        counts = [*lengths.tolist(), *([0] * (len(states) - len(lengths)))]
        rows = [
            SampleRow(state.sampling, state.length + j, state.drafts[:j], allowed)
            for state, count in zip(states, counts, strict=True)
            for j, allowed in enumerate(state.allowed(count))
        ]
        coupled = self._sampler.sample(logits, hidden, rows) if self._verification == "coupled" and rows else _NO_TOKENS
        rounds, start = [], 0
        for state, count in zip(states, counts, strict=True):
            block = slice(start, start + count + 1)
            start += count + 1
            if self._verification == "coupled":
                accepted = accept_coupled(state.drafts[:count], coupled[block])
                bonus = int(coupled[block][accepted])
            else:
                accepted, bonus = self._reject(state, count, logits[block], hidden[block], rows[block])
            tokens = [*state.drafts[:accepted].tolist(), bonus]
            logprobs = self._logprobs(state, logits[block], hidden[block], tokens)
            state.end_round(tokens)
            self._noise.drop_before(state.sampling.noise_key, state.length)
            if state.failure is None:
                rounds.append(Round(tokens, count, accepted, logprobs))
            else:
                rounds.append(Round([], count, 0, None, state.failure))
        return rounds[: len(batch.decodes)], rounds[len(batch.decodes) :]

    def _reject(
        self, state: SequenceState, count: int, logits: torch.Tensor, hidden: torch.Tensor, rows: Items[SampleRow]
    ) -> tuple[int, int]:
        params = state.sampling.params
        processed = self._sampler.processed(logits, hidden, rows)
        p = np.stack(
            [
                target_probabilities(row, params.temperature, params.top_k, params.top_p, params.min_p)
                for row in processed
            ]
        )
        q = np.empty((0, p.shape[1])) if state.draft_probs is None else state.draft_probs[:count].double().numpy()
        return accept_rejection(state.drafts[:count], p, q, state.sampling.noise_key, state.length - 1)

    def _logprobs(
        self, state: SequenceState, logits: torch.Tensor, hidden: torch.Tensor, tokens: list[int]
    ) -> list[TokenLogprob] | None:
        count = state.sampling.params.logprobs
        if count is None:
            return None
        raw = self._sampler.raw(logits[: len(tokens)], hidden[: len(tokens)])
        return [token_logprobs(row, token, count) for row, token in zip(raw, tokens, strict=True)]

    def _to_draft(self, batch: Batch, allocation: Allocation) -> list[Sequence]:
        """The sequences that the allocation and their requests want drafted."""
        chosen = [d.sequence for d, wanted in zip(batch.decodes, allocation.draft_next, strict=True) if wanted]
        if allocation.draft_new:
            chosen += [prefill.sequence for prefill in batch.prefills if prefill.ends]
        return [one for one in chosen if one.record.request.speculates]

    def _free(self, batch: Batch, allocation: Allocation, chosen: Items[Sequence]) -> list[Sequence]:
        """The other sequences, where the allocation and the drafter have free drafts for them."""
        if not allocation.draft_free:
            return []
        drafted = {sequence.id for sequence in chosen}
        return [
            sequence
            for sequence in _sampled_sequences(batch)
            if self._has_free_drafts(sequence) and sequence.id not in drafted and sequence.record.request.speculates
        ]

    def _has_free_drafts(self, sequence: Sequence) -> bool:
        request = sequence.record.request
        return self.drafter.proposes_free or bool(request.predicted_token_ids) or request.make_grammar is not None

    def _draft(
        self, chosen: Items[Sequence], free: Items[Sequence], width: int, calibration: CalibrationTable
    ) -> dict[int, NextDraft]:
        """Draft the next block of each, `width` slots; for `free` ones what costs nothing."""
        paid = len(chosen)
        chosen = [*chosen, *free]
        if not chosen:
            return {}
        states = [self._states[sequence.id] for sequence in chosen]
        draft = self.drafter.propose(
            [
                DraftRow(
                    sequence_id=sequence.id,
                    tokens=state.tokens[: state.length],
                    position=state.length - 1,
                    temperature=state.sampling.temperature,
                    noise_key=state.sampling.noise_key,
                    block_table=state.block_table,
                    free_only=i >= paid,
                    prompt_length=sequence.prompt_len,
                    predicted=state.predicted,
                    forced=state.forced(),
                    legal=None if state.grammar is None else state.legal,
                    width=self._width(sequence, width),
                )
                for i, (sequence, state) in enumerate(zip(chosen, states, strict=True))
            ]
        )
        sampled = np.array([state.sampling.temperature > 0 for state in states])
        source = np.zeros(len(chosen), np.int8) if draft.source is None else draft.source
        survival = calibration.survival(draft.confidence, sampled, source)
        lengths = np.minimum(draft.lengths, [self._longest(sequence) for sequence in chosen])
        drafts = {}
        for i, (sequence, state) in enumerate(zip(chosen, states, strict=True)):
            proposed = int(lengths[i])
            if proposed:
                # what cannot be accepted is cut here, so that no row is ever priced or spent for it
                legal = state.legal(draft.tokens[i, :proposed])
                survival[i, legal:] = 0.0
                state.drafts, state.survival = draft.tokens[i, :legal], survival[i]
                state.draft_probs = None if draft.probs is None else draft.probs[i]
                drafts[sequence.id] = NextDraft(
                    proposed,
                    draft.confidence[i],
                    survival[i],
                    int(source[i]),
                    free=i >= paid,
                    predicted=self.drafter.sources[source[i]] == PREDICTION,
                    legal=None if state.grammar is None else legal,
                )
        return drafts

    def _undrafted(self, batch: Batch) -> dict[int, NextDraft]:
        """Empty blocks that cost nothing for requests without speculation: they say nothing about the drafter."""
        nothing = np.zeros(self.drafter.block_size, np.float32)
        return {
            sequence.id: NextDraft(0, nothing, nothing, free=True)
            for sequence in _sampled_sequences(batch)
            if not sequence.record.request.speculates
        }

    def _width(self, sequence: Sequence, width: int) -> int:
        """Slots of the sequence's block that are drafted."""
        return min(width, self._longest(sequence))

    def _longest(self, sequence: Sequence) -> int:
        """Drafts kept of the sequence's block."""
        own = sequence.record.request.max_draft_tokens
        return self._max_draft_tokens if own is None else min(own, self._max_draft_tokens)

    def _going_on(self, sequences: Items[Sequence]) -> list[Sequence]:
        return [sequence for sequence in sequences if not self._states[sequence.id].ended]


def _sampled_sequences(batch: Batch) -> list[Sequence]:
    """All decodes, then each prefill that ends."""
    return [*(decode.sequence for decode in batch.decodes), *(p.sequence for p in batch.prefills if p.ends)]


def _sampled_rows(batch: Batch, lengths: NDArray[np.int32]) -> NDArray[np.int64]:
    """Flat rows that are sampled from: all rows of decodes, the last of each prefill that ends."""
    decode_rows = int(lengths.sum()) + len(lengths)
    ends = np.cumsum([prefill.count for prefill in batch.prefills], dtype=np.int64) + decode_rows - 1
    last = ends[[prefill.ends for prefill in batch.prefills]] if batch.prefills else ends
    return np.concatenate((np.arange(decode_rows, dtype=np.int64), last))

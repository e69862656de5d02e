"""One step's tensor work on a device: enqueued by `launch`, brought back by `collect`. Runs in the worker thread.

The device keeps what a round needs of each sequence (state.py), so the next step can be launched before the last one's
result is known: lengths, drafts and ends are read where they are, and the plan's bounds are cut down to what is true.
A step is one copy to the device, a target round and a draft round (each one CUDA graph where its size was captured), and
one copy back. Nothing between them waits for the device, but for requests that need the host (host_sampling.py).

Tested on a CPU, by this same code with the CPU's kernels in place of Triton's. Never run on CUDA: page-locked copies
and events (transfer.py, `_Marks`), graphs (graphs.py) and the float32 sums of bfloat16 logits (target_round.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from dspark.engine.calibration import CalibrationTable
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.gpu.draft_round import draft_blocks
from dspark.engine.gpu.graphs import Graphs
from dspark.engine.gpu.host_sampling import HostSampling
from dspark.engine.gpu.kernels import StepKernels
from dspark.engine.gpu.ladder import doubling, ladder, padded
from dspark.engine.gpu.results import download_fields
from dspark.engine.gpu.state import DeviceState
from dspark.engine.gpu.step_plan import StepPlans, StepSizes
from dspark.engine.gpu.target_round import Padding, TargetPass, accept, run_target
from dspark.engine.gpu.transfer import Array, PackedBuffer
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.load_controller import Allocation
from dspark.engine.models.decoder import Decoder
from dspark.engine.sequence import Batch, ExpectedDraft, NextDraft, Round, Sequence, StepResult

MOST_IN_FLIGHT = 3
"""Host sides of the transfer buffers: two steps in flight, and one whose failure nobody has looked at."""


class _Marks:
    """Points in the device's work, and the seconds between them; on a CPU the host's own clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times_s: list[float] = []

    def set(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._events.append(event)
        else:
            self._times_s.append(time.perf_counter())

    def wait(self) -> list[float]:
        """Wait for the last mark; seconds from each to the next."""
        if self._cuda:
            self._events[-1].synchronize()
            pairs = zip(self._events[:-1], self._events[1:], strict=True)
            return [begin.elapsed_time(end) / 1e3 for begin, end in pairs]
        return np.diff(self._times_s).tolist()


@dataclass(slots=True, eq=False)
class Pending:
    """A launched step. drafting: who is drafted for next. host_rounds: by sequence id, of those sampled on the host.

    expected: by id, what is being drafted for each sequence that gets a token: all that a plan may know of it for now.
    """

    turn: int
    batch: Batch
    drafting: list[Sequence]
    expected: dict[int, ExpectedDraft]
    host_rounds: dict[int, Round]
    marks: _Marks
    result: StepResult | None = field(default=None)


class GpuRunner:
    """Owns the target, the drafter and every sequence's state on the device."""

    def __init__(
        self,
        decoder: Decoder,
        drafter: DSparkDrafter | None,
        kernels: StepKernels,
        stop_token_ids: frozenset[int],
        *,
        block_size: int,
        max_draft_tokens: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
    ) -> None:
        """stop_token_ids: the model's own ends of text. block_size: γ, also without a drafter. Next: `allocate`."""
        self.decoder = decoder
        self.drafter = drafter
        self.host = HostSampling(stop_token_ids, decoder.spec.vocab_size)
        self._kernels = kernels
        self.block_size = block_size
        self._max_draft_tokens = max_draft_tokens
        self._max_rows = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._spare_block = 0
        self.device = decoder.embedding.device
        self._state = DeviceState.empty(self.device, max_num_seqs, block_size, blocks_for(max_model_len))
        self._plans = StepPlans(self._state, block_size, max_num_batched_tokens, MOST_IN_FLIGHT, stop_token_ids)
        self._results = PackedBuffer(self.device, download_fields(max_num_seqs, block_size), MOST_IN_FLIGHT)
        self._graphs = Graphs(self.device)
        self._row_rungs = ladder(min(max_num_batched_tokens, max_num_seqs * (1 + block_size)))
        self._sequence_rungs = doubling(max_num_seqs)
        self._drafting_rungs = ladder(max_num_seqs)
        self._turn = 0
        self._newest: Pending | None = None
        self._legal: dict[int, int] = {}  # drafts that the grammar allows, of the blocks drafted last

    def launch(self, batch: Batch, allocation: Allocation, calibration: CalibrationTable) -> Pending:
        """Enqueue a planned step; only a step with a request that needs the host waits for the device."""
        for sequence_id in batch.ended:
            self.host.forget(sequence_id)
            self._legal.pop(sequence_id, None)
        for sequence in batch.started:
            self.host.start(sequence)
        if batch.wiped:
            self.decoder.clear_blocks(batch.wiped)
        self._turn += 1
        marks = _Marks(self.device)
        marks.set()
        drafting = self._to_draft(batch, allocation)
        started = [self._longest(sequence) for sequence in batch.started]
        sizes = self._plans.upload(self._turn, batch, allocation, calibration, self._caps(batch), drafting, started)
        marks.set()
        rounds = self._target_round(batch, sizes)
        marks.set()
        if drafting:
            self._draft_round(sizes.drafting)
        marks.set()
        self._results.download(self._turn)
        marks.set()
        self._newest = Pending(self._turn, batch, drafting, self._expected(batch, drafting), rounds, marks)
        return self._newest

    def collect(self, pending: Pending) -> StepResult:
        """Wait for a launched step and read its result. Steps are collected in the order in which they were launched."""
        if pending.result is None:
            pending.result = self._read(pending)
        return pending.result

    @property
    def block_bytes(self) -> int:
        """Bytes of a K/V block, the drafter's context in it included."""
        drafter = 0 if self.drafter is None else self.drafter.bytes_per_block(BLOCK_SIZE)
        return self.decoder.bytes_per_block(BLOCK_SIZE) + drafter

    def allocate(self, num_blocks: int) -> None:
        """Make the K/V pool anew: so many blocks, and one for what padding rows write. Forgets what was captured."""
        self._graphs = Graphs(self.device)
        self.decoder.allocate_kv(num_blocks + 1, BLOCK_SIZE)
        if self.drafter is not None:
            self.drafter.allocate_context(num_blocks + 1, BLOCK_SIZE)
        self._spare_block = num_blocks

    def largest_captured_step(self) -> None:
        """Run the largest step that is captured, of padding."""
        self._target_work(Padding(self._row_rungs[-1], self._row_rungs[-1], self._sequence_rungs[-1]))
        if self.drafter is not None:
            self._draft_work(self._drafting_rungs[-1])

    def largest_step(self) -> None:
        """Run the largest step that there can be, of padding."""
        sequences = self._sequence_rungs[-1]
        self._target_work(Padding(self._max_rows, min(self._row_rungs[-1], self._max_rows), sequences))
        self.largest_captured_step()

    def capture(self, progress: Callable[[int, int], None]) -> None:
        """Before the first step: run and capture every size that a step without long prompts can have."""
        pairs = list(self._captured_sizes())
        total = len(pairs) + len(self._drafting_rungs) * (self.drafter is not None)
        for done, size in enumerate(pairs):
            progress(done, total)
            self._graphs.capture(size, partial(self._target_work, size))
        if self.drafter is not None:
            for done, sequences in enumerate(self._drafting_rungs, len(pairs)):
                progress(done, total)
                self._graphs.capture(sequences, partial(self._draft_work, sequences))
        progress(total, total)

    def target_s(self, rows: int, context_tokens: int, chunk: int) -> float:
        """Seconds of a target round of `rows` rows, at most `chunk` for each sequence, behind so many tokens of context.

        Scribbles over the K/V pool, so only before the first step.
        """
        rows = min(rows, self._sequence_rungs[-1] * self._max_model_len)  # no step has more
        chunk = max(chunk, -(-rows // self._sequence_rungs[-1]))
        sizes = self._plans.chunks(rows, min(context_tokens, self._max_model_len - chunk), chunk)
        padding = self._padding(sizes)
        return self._timed(lambda: self._graphs.run(padding, partial(self._target_work, padding)))

    def draft_s(self, sequences: int) -> float:
        """Seconds of drafting a block for each of `sequences` sequences; 0 without a drafter."""
        if self.drafter is None:
            return 0.0
        return self._timed(lambda: self._draft_round(sequences))

    def _timed(self, work: Callable[[], None]) -> float:
        work()  # what is not captured is compiled by now
        marks = _Marks(self.device)
        marks.set()
        work()
        marks.set()
        return marks.wait()[0]

    def _captured_sizes(self) -> Iterator[Padding]:
        """A row at least and a whole block at most for each sequence."""
        for sequences in self._sequence_rungs:
            most = padded(min(sequences * (1 + self.block_size), self._row_rungs[-1]), self._row_rungs)
            for rows in self._row_rungs:
                if most is not None and sequences <= rows <= most:
                    yield Padding(rows, rows, sequences)

    def _caps(self, batch: Batch) -> list[int]:
        """Drafts of each decode that may be verified; what its grammar forbids is not worth a row."""
        if self._newest is not None and any(self.host.has_grammar(decode.sequence) for decode in batch.decodes):
            self.collect(self._newest)  # before the grammars move on
        return [min(decode.cap, self._legal.pop(decode.sequence.id, decode.cap)) for decode in batch.decodes]

    def _target_round(self, batch: Batch, sizes: StepSizes) -> dict[int, Round]:
        sequences = batch.sequences
        padding = self._padding(sizes)
        host = self.host.among(sequences)
        if not host:
            self._graphs.run(padding, partial(self._target_work, padding))
            return {}
        done = self._target_pass(padding)
        rounds = self.host.sample(done, {place: sequences[place] for place in host})
        for slot, place in zip(self._plans.slots_of([sequences[i] for i in host]), host, strict=True):
            round_ = rounds.get(sequences[place].id)
            if round_ is not None and round_.failure is not None:
                self._state.end(slot)
        self._accept(done)
        return rounds

    def _padding(self, sizes: StepSizes) -> Padding:
        """The sizes that were captured for such a step; beyond them, as with long prompts, its own."""
        sequences = padded(sizes.sequences, self._sequence_rungs)
        assert sequences is not None, "more sequences than max_num_seqs"
        rows = padded(max(sizes.rows, sequences), self._row_rungs)
        if rows is None:
            return Padding(sizes.rows, max(sizes.sampled, 1), sequences)
        return Padding(rows, rows, sequences)

    def _target_work(self, padding: Padding) -> None:
        self._accept(self._target_pass(padding))

    def _target_pass(self, padding: Padding) -> TargetPass:
        layers = () if self.drafter is None else self.drafter.feature_layers
        plan, spare = self._plans.device, self._spare_block
        return run_target(self.decoder, layers, self._kernels, self._state, plan, padding, spare)

    def _accept(self, done: TargetPass) -> None:
        accept(self._kernels, self._state, self._plans.device, done, self._results.device)
        if self.drafter is not None and done.features is not None:
            self.drafter.observe(done.features, done.batch.positions, done.batch.slots)

    def _draft_round(self, drafting: int) -> None:
        sequences = padded(drafting, self._drafting_rungs)
        assert sequences is not None, "more sequences than max_num_seqs"
        self._graphs.run(sequences, partial(self._draft_work, sequences))

    def _draft_work(self, sequences: int) -> None:
        assert self.drafter is not None
        drafted = draft_blocks(self.drafter, self._kernels, self._state, self._plans.device, sequences)
        out = self._results.device
        out["draft_tokens"][:sequences] = drafted.tokens
        out["confidence"][:sequences] = drafted.confidence
        out["survival"][:sequences] = drafted.survival
        out["draft_ended"][:sequences] = drafted.ended

    def _to_draft(self, batch: Batch, allocation: Allocation) -> list[Sequence]:
        """The sequences that the allocation and their requests want drafted; whether they go on, the device knows."""
        if self.drafter is None:
            return []
        chosen = [d.sequence for d, wanted in zip(batch.decodes, allocation.draft_next, strict=True) if wanted]
        if allocation.draft_new:
            chosen += [prefill.sequence for prefill in batch.prefills if prefill.ends]
        return [one for one in chosen if one.record.request.speculates]

    def _expected(self, batch: Batch, drafting: Items[Sequence]) -> dict[int, ExpectedDraft]:
        endings = [prefill.sequence for prefill in batch.prefills if prefill.ends]
        sampled = [*(decode.sequence for decode in batch.decodes), *endings]
        expected = dict.fromkeys((sequence.id for sequence in sampled), ExpectedDraft(0, free=True))
        return expected | {one.id: ExpectedDraft(self._longest(one), free=False) for one in drafting}

    def _longest(self, sequence: Sequence) -> int:
        """Drafts kept of the sequence's block."""
        request = sequence.record.request
        if not request.speculates:
            return 0
        own = request.max_draft_tokens
        return self._max_draft_tokens if own is None else min(own, self._max_draft_tokens)

    def _read(self, pending: Pending) -> StepResult:
        up_s, forward_s, draft_s, down_s = pending.marks.wait()
        batch, host = pending.batch, self._results.host(pending.turn)
        rounds = [
            pending.host_rounds.get(sequence.id) or _round(int(rows), int(given), tokens)
            for sequence, rows, given, tokens in zip(
                batch.sequences, host["sampled"], host["given"], host["tokens"], strict=False
            )
        ]
        ends = [i for i, prefill in enumerate(batch.prefills, len(batch.decodes)) if prefill.ends]
        going = [i for i in range(len(pending.drafting)) if not host["draft_ended"][i]]
        drafts = {pending.drafting[i].id: self._next_draft(pending.drafting[i], host, i) for i in going}
        return StepResult(
            rounds=rounds[: len(batch.decodes)],
            first_rounds=[rounds[i] for i in ends],
            drafted=[pending.drafting[i].id for i in going],
            draft_width=self.block_size,
            drafts=self._undrafted(batch, ends) | drafts,
            rows=int(host["rows"][0]),
            forward_s=forward_s,  # with sampling, acceptance and drafter context: they are one graph
            sample_s=0.0,
            inject_s=0.0,
            draft_s=draft_s,
            transfer_s=up_s + down_s,
            host_sampled_rows=sum(round_.verified + 1 for round_ in pending.host_rounds.values()),
        )

    def _next_draft(self, sequence: Sequence, host: Mapping[str, Array], place: int) -> NextDraft:
        proposed = self._longest(sequence)
        survival, legal = host["survival"][place].copy(), None
        if self.host.has_grammar(sequence):
            legal = self._legal[sequence.id] = self.host.legal(sequence, host["draft_tokens"][place][:proposed])
            survival[legal:] = 0.0
        return NextDraft(proposed, host["confidence"][place].copy(), survival, legal=legal)

    def _undrafted(self, batch: Batch, ends: Items[int]) -> dict[int, NextDraft]:
        """Empty blocks that cost nothing for requests without speculation: they say nothing about the drafter."""
        nothing = np.zeros(self.block_size, np.float32)
        sampled = [*batch.sequences[: len(batch.decodes)], *(batch.sequences[i] for i in ends)]
        return {
            sequence.id: NextDraft(0, nothing, nothing, free=True)
            for sequence in sampled
            if not sequence.record.request.speculates
        }


def _round(rows: int, given: int, tokens: Array) -> Round:
    """rows: sampled; given: tokens that count, 0 where the device knew that the sequence had ended."""
    return Round(tokens[:given].tolist(), max(rows - 1, 0), max(given - 1, 0), None)

"""An engine in virtual time: recorded costs, a fake clock, texts whose drafts are accepted with known probabilities.

Whether a draft is accepted depends on the text alone (its position and its slot in the block), as under coupled
verification, so every policy sees the same texts and the times that they need can be compared without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from dspark.engine.calibration import Calibration
from dspark.engine.config import SpeculationMode
from dspark.engine.cost_model import CostModel
from dspark.engine.load_controller import Allocation, LoadController, StepLoad, StepOutcome, fill_budget

BLOCK = 7
MAX_ROWS = 512


@dataclass(frozen=True)
class CostTable:
    """Recorded seconds. verify: [MAX_ROWS + 1] by rows; draft: [64 · BLOCK + 1] by slots, entry 0 is 0; host: per step."""

    name: str
    verify: np.ndarray
    draft: np.ndarray
    host: float

    rows_per_sequence = 8
    block_size = BLOCK

    def verify_s(self, rows: int, context_tokens: int = 0) -> float:
        return float(self.verify[rows])

    def draft_s(self, slots: int) -> float:
        return float(self.draft[slots])

    def scaled(self, factor: float) -> CostTable:
        name = f"{self.name} x{factor}"
        return replace(self, name=name, verify=self.verify * factor, draft=self.draft * factor, host=self.host * factor)


def _table(name: str, verify_ms: dict[int, float], draft_ms: dict[int, float], host_ms: float) -> CostTable:
    verify = np.interp(np.arange(MAX_ROWS + 1), list(verify_ms), list(verify_ms.values())) / 1e3
    """draft_ms: by sequences, of whole blocks; one slot takes as long as a block."""
    draft = np.interp(np.arange(64 * BLOCK + 1) / BLOCK, list(draft_ms), list(draft_ms.values())) / 1e3
    draft[0] = 0.0
    return CostTable(name, verify, draft, host_ms / 1e3)


def _jagged() -> CostTable:
    rows = np.arange(MAX_ROWS + 1)
    verify = 8.0 + 3.0 * np.ceil(np.maximum(rows, 1) / 16) + 6.0 * (rows > 64) + 10.0 * (rows > 256)
    slots = np.arange(64 * BLOCK + 1)
    draft = np.where(slots > 0, 2.0 + 0.5 * np.ceil(slots / (8 * BLOCK)), 0.0)
    return CostTable("jagged", verify / 1e3, draft / 1e3, 1e-3)


TABLES = [
    _table("memory_bound_gpu", {1: 20, 64: 20.2, 128: 21, 256: 26, 512: 44}, {1: 2.0, 64: 2.6}, 1.0),
    _table("consumer_gpu", {1: 12, 16: 13, 64: 18, 128: 31, 512: 112}, {1: 1.5, 64: 4.0}, 1.0),
    _table("zen4_cpu", {1: 20, 8: 22, 32: 51, 128: 167, 512: 640}, {1: 5, 8: 6.5, 32: 14, 64: 26}, 3.0),
    _table("amx_cpu", {1: 10, 8: 10.1, 32: 12.6, 128: 32, 512: 118}, {1: 5, 8: 5.2, 32: 7, 64: 11}, 3.0),
    _jagged(),
    _table("linear", {1: 3, 512: 514}, {1: 1.3, 64: 20}, 1.0),
]


@dataclass(frozen=True)
class Profile:
    """How a drafter fares: log-odds that slot j is accepted, varied by token and by sequence.

    informative: the confidence tells the true log-odds (miscalibrated: sharpened and shifted); else it is constant.
    """

    name: str
    slot_logits: tuple[float, ...]
    token_spread: float = 0.0
    sequence_logits: tuple[float, ...] = (0.0,)
    informative: bool = True


def _logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


PROFILES = [
    Profile("high", (_logit(0.9),) * BLOCK, 0.5),
    Profile("low", (_logit(0.12),) * BLOCK, 0.5),
    Profile("decaying", tuple(_logit(p) for p in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)), 0.7),
    Profile("mixed", (0.0,) * BLOCK, 0.5, (2.3, -2.0, 0.5)),
    Profile("heterogeneous", (0.6,) * BLOCK, 2.0),
    Profile("headless", tuple(_logit(p) for p in (0.75, 0.65, 0.55, 0.5, 0.45, 0.4, 0.35)), 1.0, (0.5, -0.5), False),
]


class Texts:
    """`count` requests of `length` output tokens on average, the same for every policy."""

    def __init__(self, profile: Profile, count: int, length: int, seed: int = 0, prompt: int = 24) -> None:
        rng = np.random.default_rng(seed)
        self.count, self.prompt = count, prompt
        # different lengths, or requests would come and go in waves
        self.lengths = rng.integers(length // 4, 2 * length - length // 4, count)
        length = int(self.lengths.max())
        self.slot_logits = np.asarray(profile.slot_logits)
        own = np.asarray(profile.sequence_logits)[np.arange(count) % len(profile.sequence_logits)]
        self.token_logits = own[:, None] + profile.token_spread * rng.standard_normal((count, length + BLOCK))
        self.luck = rng.random((count, length + BLOCK))
        self.noise = 0.3 * rng.standard_normal((count, length + BLOCK))
        self.informative = profile.informative
        self.sampled = np.arange(count) % 2 == 1

    def blocks(self, rows: np.ndarray, emitted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(confidence [B, γ] float32, run of matching drafts [B]) of blocks drafted after `emitted` tokens."""
        at = emitted[:, None] + np.arange(BLOCK)
        logits = self.token_logits[rows[:, None], at] + self.slot_logits
        match = self.luck[rows[:, None], at] < 1.0 / (1.0 + np.exp(-logits))
        run = np.cumprod(match, axis=1).sum(axis=1)
        if self.informative:
            confidence = 1.4 * logits + 0.4 + self.noise[rows[:, None], at]
        else:
            confidence = np.zeros_like(logits)
        return confidence.astype(np.float32), run


@dataclass
class Trace:
    """What a run saw, per step."""

    clock_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    budget: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    drafting: list[int] = field(default_factory=list)
    width: list[int] = field(default_factory=list)
    arrived: list[int] = field(default_factory=list)
    latency_s: list[float] = field(default_factory=list)

    def rate(self, table: CostTable) -> float:
        """Tokens per second on `table` from when a quarter of all requests have come to when the last has.

        In that window the batch is full. Without arrival times the steps of a fixed policy do not depend on the table,
        so one run can be priced on all of them.
        """
        arrived = np.asarray(self.arrived)
        first, last = np.searchsorted(arrived, [1 + 0.25 * arrived[-1], arrived[-1]])
        steps = slice(first + 1, last + 1)
        slots = np.multiply(self.drafting[steps], self.width[steps])
        seconds = table.verify[self.rows[steps]] + table.draft[slots] + table.host
        return float(np.sum(self.tokens[steps]) / np.sum(seconds))


Policy = LoadController | int
"""A controller, or the fixed number of drafts to verify each time (0: no drafting)."""


class VirtualEngine:
    """Continuous batching of `texts` in virtual time.

    concurrency: sequences in the batch.  arrivals: [count] seconds, None: the next request comes when one has ended.
    """

    def __init__(
        self,
        table: CostTable,
        texts: Texts,
        policy: Policy,
        concurrency: int,
        arrivals: np.ndarray | None = None,
        on_step: Callable[[VirtualEngine], None] | None = None,
    ) -> None:
        self.table, self.texts, self.policy, self.concurrency = table, texts, policy, concurrency
        self.arrivals = np.zeros(texts.count) if arrivals is None else arrivals
        self.on_step = on_step
        self.clock_s = 0.0
        self.trace = Trace()
        self.emitted = np.zeros(texts.count, dtype=np.int64)
        self.prompt_left = np.full(texts.count, texts.prompt)
        self.block_width = np.zeros(texts.count, dtype=np.int32)
        self.running: list[int] = []
        self.arrived = 0

    def run(self) -> Trace:
        while self.arrived < self.texts.count or self.running:
            self._admit()
            self._step()
            if self.on_step is not None:
                self.on_step(self)
        return self.trace

    def _admit(self) -> None:
        while self.arrived < self.texts.count and len(self.running) < self.concurrency:
            if self.arrivals[self.arrived] > self.clock_s:
                if self.running:
                    break
                self.clock_s = float(self.arrivals[self.arrived])
            self.running.append(self.arrived)
            self.arrived += 1

    def _step(self) -> None:
        running = np.asarray(self.running)
        decoding = running[self.prompt_left[running] == 0]
        in_prompt = running[self.prompt_left[running] > 0]
        anchors = len(decoding)
        prefill, ending = 0, []
        for request in in_prompt:
            chunk = min(int(self.prompt_left[request]), MAX_ROWS - anchors - prefill)
            prefill += chunk
            self.prompt_left[request] -= chunk
            if self.prompt_left[request] == 0:
                ending.append(int(request))
        confidence, run = self.texts.blocks(decoding, self.emitted[decoding])
        remaining = self.texts.lengths[decoding] - self.emitted[decoding]
        proposed = self.block_width[decoding]
        caps = np.minimum(proposed, remaining - 1).astype(np.int32)
        room = MAX_ROWS - anchors - prefill
        if isinstance(self.policy, LoadController):
            sampled = self.texts.sampled[decoding]
            survival = self.policy.calibration.survival(confidence, sampled)
            survival[np.arange(BLOCK) >= proposed[:, None]] = 0.0
            load = StepLoad(
                sequence_ids=decoding.tolist(),
                survival=survival,
                proposed=proposed,
                caps=caps,
                free=np.zeros(len(decoding), np.bool_),
                source=np.zeros(len(decoding), np.int8),
                context_tokens=0,
                draft_room=room,
                prefill_tokens=prefill,
                prefill_ending=len(ending),
                queue_tokens=int(self.prompt_left[in_prompt].sum()),
                waiting_requests=len(in_prompt),
            )
            allocation = self.policy.allocate(load)
            lengths = fill_budget(survival, caps, allocation.budget)
            draft_next, draft_new, width = allocation.draft_next, allocation.draft_new, allocation.draft_width
            self.last_allocation = allocation
        else:
            lengths = np.minimum(caps, self.policy)
            if lengths.sum() > room:
                lengths = fill_budget(np.ones((anchors, BLOCK), np.float32), lengths, room)
            draft_next, draft_new, width = np.full(anchors, self.policy > 0), self.policy > 0, BLOCK
        accepted = np.minimum(run, lengths)
        rows = anchors + prefill + int(lengths.sum())
        drafted = np.concatenate([decoding[draft_next], np.asarray(ending if draft_new else [], dtype=np.int64)])
        verify_s, draft_s = self.table.verify_s(rows), self.table.draft_s(len(drafted) * width)
        self.clock_s += verify_s + draft_s + self.table.host
        self.block_width[running] = 0
        self.block_width[drafted] = width
        self.emitted[decoding] += accepted + 1
        self.emitted[ending] = 1
        if isinstance(self.policy, LoadController):
            self.policy.observe(
                StepOutcome(
                    rows=rows,
                    context_tokens=0,
                    verify_s=verify_s,
                    drafting_sequences=len(drafted),
                    draft_width=width,
                    draft_s=draft_s,
                    host_s=self.table.host,
                    sequence_ids=load.sequence_ids,
                    survival=survival,
                    confidence=confidence,
                    sampled=sampled,
                    source=np.zeros(len(sampled), np.int8),
                    free=np.zeros(len(sampled), np.bool_),
                    proposed=proposed,
                    verified=lengths.astype(np.int32),
                    accepted=accepted.astype(np.int32),
                )
            )
        self._finish(running)
        self.trace.clock_s.append(self.clock_s)
        self.trace.tokens.append(int(accepted.sum()) + anchors + len(ending))
        self.trace.rows.append(rows)
        self.trace.budget.append(int(lengths.sum()))
        self.trace.running.append(anchors)
        self.trace.drafting.append(len(drafted))
        self.trace.width.append(width)
        self.trace.arrived.append(self.arrived)

    def _finish(self, running: np.ndarray) -> None:
        for request in running[self.emitted[running] >= self.texts.lengths[running]].tolist():
            self.running.remove(request)
            self.trace.latency_s.append(self.clock_s - float(self.arrivals[request]))
            if isinstance(self.policy, LoadController):
                self.policy.forget(request)


def controller_profiled_on(table: CostTable, mode: SpeculationMode = "adaptive") -> LoadController:
    """A fresh controller whose cost model was measured on `table`."""
    cost = CostModel.profile(table, MAX_ROWS, 64, budget_s=1e9)
    return LoadController(mode, BLOCK, cost, Calibration(BLOCK))


class SteadyBatch:
    """The same number of sequences at every step, without end, their drafts accepted with one probability each.

    Confidence is the true log-odds. For what must be seen step by step: load and acceptance may change between steps.
    """

    def __init__(self, table: CostTable, controller: LoadController, seed: int = 0) -> None:
        self.table, self.controller = table, controller
        self.rng = np.random.default_rng(seed)
        self.has_block: dict[int, bool] = {}

    def step(
        self, acceptance: dict[int, float], queue_tokens: int = 0, waiting: int = 0
    ) -> tuple[Allocation, np.ndarray]:
        """acceptance: by sequence id. Returns the allocation and the verified lengths [B]."""
        ids = list(acceptance)
        p = np.array(list(acceptance.values()))
        confidence = np.repeat(np.log(p / (1 - p))[:, None], BLOCK, axis=1).astype(np.float32)
        run = np.cumprod(self.rng.random((len(ids), BLOCK)) < p[:, None], axis=1).sum(axis=1)
        sampled = np.zeros(len(ids), bool)
        proposed = np.array([BLOCK if self.has_block.get(i, False) else 0 for i in ids], np.int32)
        survival = self.controller.calibration.survival(confidence, sampled) * (proposed[:, None] > 0)
        allocation = self.controller.allocate(
            StepLoad(
                ids,
                survival,
                proposed,
                proposed,
                np.zeros(len(ids), np.bool_),
                np.zeros(len(ids), np.int8),
                0,
                MAX_ROWS - len(ids),
                0,
                0,
                queue_tokens,
                waiting,
            )
        )
        lengths = fill_budget(survival, proposed, allocation.budget)
        self.has_block = dict(zip(ids, allocation.draft_next.tolist(), strict=True))
        rows, drafting = len(ids) + int(lengths.sum()), int(allocation.draft_next.sum())
        self.controller.observe(
            StepOutcome(
                rows=rows,
                context_tokens=0,
                verify_s=self.table.verify_s(rows),
                drafting_sequences=drafting,
                draft_width=allocation.draft_width,
                draft_s=self.table.draft_s(drafting * allocation.draft_width),
                host_s=self.table.host,
                sequence_ids=ids,
                survival=survival,
                confidence=confidence,
                sampled=sampled,
                source=np.zeros(len(sampled), np.int8),
                free=np.zeros(len(sampled), np.bool_),
                proposed=proposed,
                verified=lengths,
                accepted=np.minimum(run, lengths).astype(np.int32),
            )
        )
        return allocation, lengths

"""Who may wait, who starts next, and that no tenant's flood takes another's share or place."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import pytest
from scheduler_harness import Harness

from dspark.engine import QueueFullError, Request, RequestFacts, waiting_queue
from dspark.engine.admission import LONGEST_RETRY_AFTER_S, Admission
from dspark.engine.sequence import RequestRecord, Sequence
from dspark.engine.waiting_queue import OUTPUT_COST, WaitingQueue

FLOOD, LIGHT, THIRD = b"flood", b"light", b"third"


class Queue(WaitingQueue):
    """Sequences are numbered as they arrive."""

    def __init__(self) -> None:
        super().__init__()
        self._ids = itertools.count()

    def arrive(self, tenant: bytes, priority: int = 0, prompt_tokens: int = 10) -> Sequence:
        record = RequestRecord(Request((1,) * prompt_tokens, priority=priority), RequestFacts(prompt_tokens, 0.0))
        tokens = [1] * prompt_tokens
        sequence = Sequence(next(self._ids), record, 0, 0, 10, None, tokens, prompt_tokens, tenant)
        record.sequences.append(sequence)
        self.add(sequence)
        return sequence

    def start(self, prompt_tokens: int = 10, output_tokens: int = 0) -> Sequence:
        """The next one starts, and has got so much."""
        sequence = self.first
        self.remove(sequence)
        sequence.record.facts.scheduled_s = 0.0
        self.charge(sequence.salt, prompt_tokens, output_tokens)
        return sequence


# the order


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    queue = Queue()
    arrived = [queue.arrive(FLOOD, prompt_tokens=tokens) for tokens in (50, 1, 7)]
    assert list(queue) == arrived
    assert [queue.start() for _ in arrived] == arrived


def test_priorities_go_before_shares_and_shares_before_arrival() -> None:
    queue = Queue()
    first, second = queue.arrive(FLOOD), queue.arrive(FLOOD)
    other, urgent = queue.arrive(LIGHT), queue.arrive(FLOOD, priority=-1)
    assert [queue.start() for _ in range(4)] == [urgent, other, first, second]


def test_a_flood_of_one_tenant_takes_half_of_the_service_when_another_has_work_too() -> None:
    queue = Queue()
    for _ in range(100):
        queue.arrive(FLOOD)
    for _ in range(20):
        queue.arrive(LIGHT)
    started = Counter(queue.start(output_tokens=30).salt for _ in range(40))
    assert started == {FLOOD: 20, LIGHT: 20}


def test_shares_are_of_tokens_not_of_requests() -> None:
    """One tenant's requests are four times as dear, so it gets to start a quarter as many."""
    queue = Queue()
    for _ in range(100):
        queue.arrive(FLOOD)
        queue.arrive(LIGHT)
    started: Counter[bytes] = Counter()
    for _ in range(50):
        dear = queue.first.salt == FLOOD
        started[queue.start(40 if dear else 10, 4 if dear else 1).salt] += 1
    assert started == {FLOOD: 10, LIGHT: 40}


def test_idling_saves_up_nothing() -> None:
    queue = Queue()
    for _ in range(40):
        queue.arrive(FLOOD)
    for _ in range(20):
        queue.start()
    for _ in range(20):
        queue.arrive(LIGHT)
    # were it owed for the time it was away, it would have the next 20 starts for itself
    assert Counter(queue.start().salt for _ in range(10)) == {FLOOD: 5, LIGHT: 5}


def test_what_a_tenant_owes_is_kept_while_it_has_nothing_waiting() -> None:
    queue = Queue()
    for _ in range(10):
        queue.arrive(LIGHT)
    queue.arrive(FLOOD)
    while queue.first.salt != FLOOD:
        queue.start()
    queue.start(prompt_tokens=50)  # and now it has nothing waiting
    queue.arrive(FLOOD)
    assert [queue.start().salt for _ in range(4)] == [LIGHT] * 4


def test_tokens_given_count_for_the_tenant_and_computed_ones_are_not_charged_again_after_a_preemption() -> None:
    harness = Harness(num_blocks=3, max_num_batched_tokens=64)
    charged: Counter[bytes] = Counter()
    charge = harness.scheduler.waiting.charge

    def recorded(tenant: bytes, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        charged[tenant] += prompt_tokens + OUTPUT_COST * output_tokens
        charge(tenant, prompt_tokens, output_tokens)

    harness.scheduler.waiting.charge = recorded  # type: ignore[method-assign]
    harness.add([1] * 14, 18, tenant=FLOOD)
    harness.add([2] * 14, 18, tenant=LIGHT)
    harness.finish()
    assert sum(facts.preemptions for facts in harness.steps) > 0
    assert charged == dict.fromkeys((FLOOD, LIGHT), 14 + OUTPUT_COST * 18)


def test_nothing_is_kept_of_tenants_when_nothing_is_left_to_do() -> None:
    harness = Harness()
    for number in range(20):
        harness.add([1], 2, tenant=b"%d" % number)
    harness.finish()
    assert harness.scheduler.waiting._service == {}


# the door


@pytest.fixture
def queue() -> Queue:
    return Queue()


def test_a_queue_is_full_at_its_requests_or_at_its_tokens(queue: Queue) -> None:
    admission = Admission(queue, max_requests=2, max_prompt_tokens=25)
    assert admission.admit(FLOOD, 10) is None
    queue.arrive(FLOOD, prompt_tokens=10)
    with pytest.raises(
        QueueFullError, match="10 prompt tokens are waiting and the queue holds 25, this request has 16"
    ):
        admission.admit(FLOOD, 16)
    assert admission.admit(FLOOD, 15) is None
    queue.arrive(FLOOD, prompt_tokens=15)
    with pytest.raises(QueueFullError, match="2 requests are waiting and the queue holds 2"):
        admission.check(FLOOD)


def test_one_request_may_always_wait_however_long_it_is(queue: Queue) -> None:
    admission = Admission(queue, max_requests=2, max_prompt_tokens=25)
    admission.check(FLOOD)
    assert admission.admit(FLOOD, 10_000) is None
    queue.arrive(FLOOD, prompt_tokens=10_000)
    with pytest.raises(QueueFullError):
        admission.admit(FLOOD, 1)


def test_what_started_or_ended_makes_room(queue: Queue) -> None:
    admission = Admission(queue, max_requests=1, max_prompt_tokens=25)
    for leave in (queue.start, lambda: queue.remove(queue.first)):
        queue.arrive(FLOOD)
        with pytest.raises(QueueFullError):
            admission.check(FLOOD)
        leave()
        admission.check(FLOOD)
    assert (queue.requests, queue.prompt_tokens, len(queue)) == (0, 0, 0)


def test_a_preempted_request_takes_no_place_in_the_queue(queue: Queue) -> None:
    queue.arrive(FLOOD)
    preempted = queue.start()
    queue.add(preempted)
    assert (queue.requests, queue.prompt_tokens, list(queue)) == (0, 0, [preempted])


def test_in_a_full_queue_the_longest_line_gives_places_up_until_lines_are_as_long(queue: Queue) -> None:
    admission = Admission(queue, max_requests=6, max_prompt_tokens=1000)
    for _ in range(5):
        queue.arrive(FLOOD)
    last = queue.arrive(FLOOD, priority=1)
    displaced = []
    for _ in range(3):
        admission.check(LIGHT)
        record = admission.admit(LIGHT, 10)
        assert record is not None
        displaced.append(record.sequences[0])
        queue.remove(record.sequences[0])
        queue.arrive(LIGHT)
    assert [sequence.id for sequence in displaced] == [last.id, 4, 3]
    for tenant in (LIGHT, FLOOD):  # three each
        with pytest.raises(QueueFullError):
            admission.check(tenant)
    assert admission.admit(THIRD, 10) is not None


def test_nobody_is_displaced_for_a_request_that_does_not_fit_even_so(queue: Queue) -> None:
    admission = Admission(queue, max_requests=10, max_prompt_tokens=40)
    for _ in range(4):
        queue.arrive(FLOOD, prompt_tokens=10)
    assert admission.admit(LIGHT, 10) is not None
    with pytest.raises(QueueFullError, match="prompt tokens"):
        admission.admit(LIGHT, 11)


def test_retry_after_is_what_the_queue_takes_at_the_rate_at_which_it_moved(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(waiting_queue, "time", SimpleNamespace(monotonic=lambda: now_s))
    admission = Admission(queue, max_requests=40, max_prompt_tokens=10**9)
    for _ in range(40):
        queue.arrive(FLOOD)
    assert admission.refusal(1).retry_after_s == 1, "nothing was measured yet"
    for _ in range(10):
        now_s += 0.5
        queue.start()
        queue.arrive(FLOOD)
    # 10 left within 4.5 s, and another half second has gone by without one
    now_s += 0.5
    assert admission.refusal(1).retry_after_s == 20
    now_s += 5.0
    assert admission.refusal(1).retry_after_s == 40, "while nothing leaves, the rate falls"
    now_s += 1e6
    assert admission.refusal(1).retry_after_s == LONGEST_RETRY_AFTER_S
    while queue.requests:
        queue.start()
    assert admission.refusal(1).retry_after_s == 1

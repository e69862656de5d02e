"""Requests that end before they are done, or start out of turn: what they held is free, and nobody's tokens change."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fakes import OpenEngine, RunningEngine, read

from dspark.engine import DeadlineExceededError, QueueFullError, Request, RequestError, RequestStream, SamplingParams

PROMPT = tuple(range(3, 43))
LONG = Request(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True, seed=1))
SOON_S = 0.2


@pytest.fixture
def engine(open_engine: OpenEngine) -> RunningEngine:
    """One request at a time."""
    return open_engine(drafter="lookup", max_num_seqs=1)


@pytest.fixture
def held(engine: RunningEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every step waits in the worker until this is set."""
    gate = threading.Event()
    launch = engine.parts.runner.launch

    def launch_when_let(*args: Any) -> Any:
        gate.wait(60)
        return launch(*args)

    monkeypatch.setattr(engine.parts.runner, "launch", launch_when_let)
    yield gate
    gate.set()


def short(prompt: range = range(50, 90), **fields: Any) -> Request:
    return Request(tuple(prompt), SamplingParams(max_tokens=5, ignore_eos=True, seed=2), **fields)


def due(in_s: float) -> dict[str, float]:
    return {"deadline_s": time.monotonic() + in_s}


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0.001)


# Deadlines


def test_a_waiting_request_whose_deadline_passes_is_never_computed(
    engine: RunningEngine, held: threading.Event
) -> None:
    async def wait_in_vain() -> None:
        running = asyncio.create_task(read(engine.engine.submit(short())))
        await until(lambda: engine.engine.gauges().requests_running)
        with pytest.raises(DeadlineExceededError, match="deadline"):
            await read(engine.engine.submit(short(range(200, 250), **due(SOON_S))))
        assert engine.engine.gauges().requests_waiting == 0
        held.set()
        await running

    engine.run(wait_in_vain())
    assert sum(step.prompt_computed for step in engine.steps) == 40
    engine.check_pool_is_whole()


def test_a_running_request_ends_at_its_deadline_and_is_freed(
    engine: RunningEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = engine.parts.runner.launch

    def launch_slowly(*args: Any) -> Any:
        time.sleep(0.02)  # at 8 tokens a step at most, all 400 would take five times the deadline
        return launch(*args)

    monkeypatch.setattr(engine.parts.runner, "launch", launch_slowly)

    async def run_out() -> RequestStream:
        stream = engine.engine.submit(replace(LONG, **due(SOON_S)))
        with pytest.raises(DeadlineExceededError):
            await read(stream)
        await until(lambda: stream.facts.finished_s is not None)
        return stream

    facts = engine.run(run_out()).facts
    assert facts.generated_tokens < 400
    assert facts.cancelled_s is not None
    assert facts.finished_s is not None
    assert facts.finished_s >= facts.cancelled_s
    assert engine.engine.gauges().blocks_used == 0


def test_a_deadline_strikes_while_a_step_hangs_and_the_blocks_are_freed_with_it(
    engine: RunningEngine, held: threading.Event
) -> None:
    freed: list[float] = []

    async def hang() -> None:
        stream = engine.engine.submit(short(**due(SOON_S)))
        stream.when_freed(lambda: freed.append(time.monotonic()))
        with pytest.raises(DeadlineExceededError):
            await read(stream)
        assert engine.engine.gauges().blocks_used > 0, "the step that writes into them is still running"
        assert freed == []
        held.set()
        await until(lambda: freed)
        assert engine.engine.gauges().blocks_used == 0
        stream.when_freed(lambda: freed.append(0.0))
        assert len(freed) == 2, "at once, when it is freed already"

    engine.run(hang())


def test_a_deadline_that_has_passed_already_costs_nothing(engine: RunningEngine) -> None:
    async def too_late() -> None:
        with pytest.raises(DeadlineExceededError):
            await read(engine.engine.submit(short(**due(-1.0))))

    engine.run(too_late())
    assert engine.steps == []
    engine.check_pool_is_whole()


def test_a_deadline_that_is_met_changes_nothing(engine: RunningEngine) -> None:
    async def in_time() -> list[list[int]]:
        return (await read(engine.engine.submit(short(deadline_s=time.monotonic() + 1000)))).tokens

    assert engine.run(in_time()) == engine.answer(short()).tokens


# Places in the queue


def test_the_urgent_overtake_and_the_tokens_are_those_of_one_at_a_time(open_engine: OpenEngine) -> None:
    """In a pool for two, so that some are preempted while they run."""
    tight = open_engine(drafter="lookup", num_blocks=8, max_num_seqs=4)
    asked = [
        Request(
            tuple(range(10 * i + 5, 10 * i + 30)),
            SamplingParams(max_tokens=40, ignore_eos=True, seed=i),
            priority=(0, 100, -100, 5)[i % 4],
            cache_salt=(b"a", b"b")[i % 3 == 0],
        )
        for i in range(12)
    ]
    alone = tight.answer_one_at_a_time(asked)
    together = tight.answer_together(asked)
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert sum(answer.facts.preemptions for answer in together) > 0
    started = sorted(zip(together, asked, strict=True), key=lambda pair: pair[0].facts.scheduled_s or 0.0)
    assert [request.priority for _, request in started] == [-100] * 3 + [0] * 3 + [5] * 3 + [100] * 3
    tight.check_pool_is_whole()


@pytest.mark.parametrize("priority", [-101, 101])
def test_a_priority_out_of_range_is_refused_by_name(engine: RunningEngine, priority: int) -> None:
    with pytest.raises(RequestError, match=f"at least -100 and at most 100, given {priority}") as refused:
        engine.engine.submit(short(priority=priority))
    assert refused.value.param == "priority"


def test_a_full_queue_takes_anothers_request_in_place_of_the_newest_of_the_longest_line(
    open_engine: OpenEngine,
) -> None:
    small = open_engine(drafter="lookup", max_num_seqs=1, max_queued_requests=3)

    async def crowd() -> None:
        running = asyncio.create_task(read(small.engine.submit(replace(LONG, cache_salt=b"flood"))))
        await until(lambda: small.engine.gauges().requests_running)
        flood = [asyncio.create_task(read(small.engine.submit(short(cache_salt=b"flood")))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(QueueFullError):
            small.engine.check_admission(b"flood")
        small.engine.check_admission(b"other")
        other = asyncio.create_task(read(small.engine.submit(short(cache_salt=b"other"))))
        with pytest.raises(QueueFullError, match="3 requests are waiting") as displaced:
            await flood[-1]
        assert displaced.value.retry_after_s >= 1
        with pytest.raises(QueueFullError):  # two and one: a fourth would turn them round
            small.engine.submit(short(cache_salt=b"other"))
        answers = await asyncio.gather(running, other, *flood[:-1])
        # the flood's first request had been served when the other tenant came
        assert answers[1].facts.scheduled_s < answers[2].facts.scheduled_s

    small.run(crowd())
    small.check_pool_is_whole()


def test_a_queue_full_of_tokens_says_so(open_engine: OpenEngine) -> None:
    small = open_engine(drafter="lookup", max_num_seqs=1, max_queued_tokens=60)

    async def crowd() -> None:
        running = asyncio.create_task(read(small.engine.submit(LONG)))
        await until(lambda: small.engine.gauges().requests_running)
        waiting = asyncio.create_task(read(small.engine.submit(short())))
        await asyncio.sleep(0)
        gauges = small.engine.gauges()
        assert (gauges.prompt_tokens_waiting, gauges.prompt_tokens_waiting_limit) == (40, 60)
        small.engine.check_admission()
        with pytest.raises(QueueFullError, match="40 prompt tokens are waiting and the queue holds 60"):
            small.engine.submit(short())
        await asyncio.gather(running, waiting)

    small.run(crowd())

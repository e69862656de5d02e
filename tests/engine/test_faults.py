"""Steps that raise, run out of memory or hang: they cost the request that is the cause at most, and change no token."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fakes import OpenEngine, RunningEngine, read
from faults import FaultyDecoder, at, with_faults

from dspark.engine import EngineFailedError, Request, SamplingParams, StepFacts
from dspark.engine.loop import MOST_FAILURES
from dspark.engine.sequence import Batch


def requests(count: int, **sampling: Any) -> list[Request]:
    """Prompts share prefixes and repeat themselves, so that blocks are shared and lookup drafts."""
    random = np.random.default_rng(3)
    shared = random.integers(3, 320, 40).tolist()
    return [
        Request(
            (*shared[: 8 * (i % 5)], *random.integers(3, 30, 5).tolist() * (1 + i % 4)),
            SamplingParams(**{"max_tokens": 30, "ignore_eos": True, "seed": i} | sampling),
        )
        for i in range(count)
    ]


async def outcome(engine: RunningEngine, request: Request) -> list[int] | Exception:
    try:
        return (await read(engine.engine.submit(request))).tokens[0]
    except EngineFailedError as error:
        return error


def answers(engine: RunningEngine, asked: Sequence[Request]) -> list[list[int]]:
    return [answer.tokens[0] for answer in engine.answer_together(asked)]


def outcomes(engine: RunningEngine, asked: Sequence[Request]) -> list[list[int] | Exception]:
    async def all_of_them() -> list[list[int] | Exception]:
        return await asyncio.gather(*(outcome(engine, request) for request in asked))

    return engine.run(all_of_them())


@pytest.fixture(scope="module")
def healthy(open_engine: OpenEngine) -> RunningEngine:
    return open_engine(drafter="lookup", speculation="off", lag=0)


DRAFTERS = ["lookup", "draft_checkpoint", "eagle3_checkpoint", "draft_model"]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_steps_that_fail_now_and_then_cost_no_request_and_change_no_answer(
    open_engine: OpenEngine, healthy: RunningEngine, drafter: str, request: pytest.FixtureRequest
) -> None:
    path = drafter if drafter == "lookup" else str(request.getfixturevalue(drafter))
    # few blocks and few places: what failed steps spoilt is used again at once
    engine = open_engine(drafter=path, speculation="fixed", max_num_seqs=4, num_blocks=24, max_num_batched_tokens=48)
    asked = requests(40)
    expected = answers(healthy, asked)
    faulty = with_faults(engine, at(3, 9, 11, 20, 31))
    assert outcomes(engine, asked) == expected
    assert faulty.passes > 31
    assert engine.engine.gauges().failed_steps_total == 5
    engine.check_pool_is_whole()


def test_the_request_that_no_step_survives_ends_with_an_error_and_no_other_does(
    open_engine: OpenEngine, healthy: RunningEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = open_engine(drafter="lookup", speculation="fixed", max_num_seqs=8)
    asked = requests(12)
    expected = answers(healthy, asked)
    poison = 7
    works = engine.parts.runner.launch

    def launch(batch: Batch, *args: Any) -> Any:
        if any(s.record.request is asked[poison] and s.generated > 5 for s in batch.sequences):
            raise ArithmeticError("this one cannot be computed")
        return works(batch, *args)

    monkeypatch.setattr(engine.parts.runner, "launch", launch)
    got = outcomes(engine, asked)
    failed = got.pop(poison)
    assert isinstance(failed, EngineFailedError)
    assert isinstance(failed.__cause__, ArithmeticError)
    assert got == [right for i, right in enumerate(expected) if i != poison]
    assert 3 <= engine.engine.gauges().failed_steps_total <= 6
    assert not engine.engine.failed
    engine.check_pool_is_whole()


PLACES: dict[str, Callable[[RunningEngine], tuple[object, str]]] = {
    "state": lambda engine: (engine.parts.runner, "_update_states"),
    "drafter": lambda engine: (engine.parts.runner.drafter, "propose"),
    "sampler": lambda engine: (engine.parts.runner._sampler, "sample"),
    "controller": lambda engine: (engine.engine.controller, "allocate"),
    "commit": lambda engine: (engine.engine.scheduler, "_publish"),
}

HALF_DONE = ("controller", "commit")
"""Where the loop itself fails, what each request has got is not known: those of the step end."""


@pytest.mark.parametrize("place", PLACES)
def test_wherever_a_step_fails_the_next_ones_are_right(
    open_engine: OpenEngine, healthy: RunningEngine, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    engine = open_engine(drafter="lookup", speculation="fixed", max_num_seqs=3)
    asked = requests(9)
    expected = answers(healthy, asked)
    owner, name = PLACES[place](engine)
    works = getattr(owner, name)
    calls = itertools.count()

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 4:
            raise KeyError("a bug")
        return works(*args, **kwargs)

    monkeypatch.setattr(owner, name, sometimes)
    got = outcomes(engine, asked)
    failed = [one for one in got if isinstance(one, EngineFailedError)]
    assert len(failed) <= (3 if place in HALF_DONE else 0)
    assert engine.engine.gauges().failed_steps_total == 1
    assert all(isinstance(one, EngineFailedError) or one == right for one, right in zip(got, expected, strict=True))
    assert outcomes(engine, asked) == expected
    engine.check_pool_is_whole()


def test_what_listens_to_steps_can_fail_without_costing_a_request(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup")
    asked = requests(4)
    expected = answers(engine, asked)

    def broken(facts: StepFacts) -> None:
        raise KeyError("a metric that is not there")

    engine.engine.on_step.append(broken)
    assert answers(engine, asked) == expected
    assert engine.engine.gauges().failed_steps_total > 0
    assert not engine.engine.failed


def test_a_request_that_fails_ends_with_all_its_choices(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", max_num_seqs=2)
    with_faults(engine, at(3, 4, 5))
    several = Request((5,) * 20, SamplingParams(max_tokens=9, ignore_eos=True, seed=1), n=4)
    with pytest.raises(EngineFailedError):
        engine.answer(several)
    engine.check_pool_is_whole()
    assert len(engine.answer(several).tokens) == 4


def test_an_engine_whose_steps_all_fail_gives_up(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", max_num_seqs=1)
    faulty = with_faults(engine, lambda number, rows: ArithmeticError("every pass is broken"))
    got = outcomes(engine, requests(MOST_FAILURES + 3))
    assert all(isinstance(one, EngineFailedError) for one in got)
    assert faulty.passes == 2 * MOST_FAILURES, "each request is tried twice"
    assert engine.engine.failed
    with pytest.raises(EngineFailedError):
        engine.engine.submit(requests(1)[0])


def test_failures_with_good_steps_between_them_do_not_add_up(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", max_num_seqs=1)
    with_faults(engine, lambda number, rows: ArithmeticError("sometimes") if number % 8 < 2 else None)
    got = outcomes(engine, requests(3 * MOST_FAILURES, max_tokens=20))
    assert sum(isinstance(one, EngineFailedError) for one in got) > MOST_FAILURES
    assert not engine.engine.failed


def test_a_pool_that_is_not_whole_after_a_failure_ends_the_engine(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", max_num_seqs=1)

    def lose_a_block(number: int, rows: int) -> Exception | None:
        if number < 3:
            return None
        engine.engine.scheduler.kv_cache._free.pop()
        return ArithmeticError("and it took a block with it")

    with_faults(engine, lose_a_block)
    assert all(isinstance(one, EngineFailedError) for one in outcomes(engine, requests(3)))
    assert engine.engine.failed


# Memory

OUT_OF_MEMORY: list[Exception] = [
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1 << 40,), np.dtype(np.float32)),  # type: ignore[attr-defined]
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_step_that_runs_out_of_memory_is_run_again_smaller_and_costs_no_request(
    open_engine: OpenEngine, healthy: RunningEngine, error: Exception
) -> None:
    engine = open_engine(drafter="lookup", speculation="fixed", max_num_seqs=8)
    asked = requests(12)
    expected = answers(healthy, asked)
    with_faults(engine, lambda number, rows: error if number in (2, 5, 6) else None)
    assert outcomes(engine, asked) == expected
    gauges = engine.engine.gauges()
    assert (gauges.out_of_memory_retries_total, gauges.failed_steps_total) == (3, 0)
    engine.check_pool_is_whole()


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_steps_stay_as_small_as_memory_needs_them_to_be(
    open_engine: OpenEngine, healthy: RunningEngine, drafter: str, request: pytest.FixtureRequest
) -> None:
    path = drafter if drafter == "lookup" else str(request.getfixturevalue(drafter))
    engine = open_engine(drafter=path, speculation="fixed", max_num_seqs=8)
    asked = requests(12)
    expected = answers(healthy, asked)
    with_faults(engine, lambda number, rows: MemoryError() if rows > 9 else None)
    assert outcomes(engine, asked) == expected
    assert engine.engine.gauges().out_of_memory_retries_total > 0
    assert max(step.batch_tokens for step in engine.steps) <= 9


def test_a_row_that_does_not_fit_alone_fails_its_request(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", max_num_seqs=8)
    with_faults(engine, lambda number, rows: MemoryError() if engine.engine.gauges().failed_steps_total < 2 else None)
    got = outcomes(engine, requests(8))
    failed = [one for one in got if isinstance(one, EngineFailedError)]
    assert len(failed) == 1
    assert isinstance(failed[0].__cause__, MemoryError)
    assert not engine.engine.failed


# Hanging


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


def hanging(engine: RunningEngine, gate: threading.Event, number: int) -> FaultyDecoder:
    """The numbered pass waits until the gate opens."""

    def wait(passes: int, rows: int) -> None:
        if passes == number:
            gate.wait(60)

    return with_faults(engine, wait)


def test_a_step_that_hangs_is_a_stall_until_it_ends(
    open_engine: OpenEngine, healthy: RunningEngine, gate: threading.Event
) -> None:
    engine = open_engine(drafter="lookup", stall_timeout_s=0.2)
    hanging(engine, gate, 4)
    (asked,) = requests(1)

    async def hang() -> list[int]:
        answer = asyncio.create_task(read(engine.engine.submit(asked)))
        while not engine.engine.gauges().stalls_total:
            assert not answer.done()
            await asyncio.sleep(0.01)
        assert engine.engine.stalled
        gate.set()
        tokens = (await answer).tokens[0]
        assert not engine.engine.stalled
        return tokens

    assert engine.run(hang()) == healthy.answer(asked).tokens[0]
    assert engine.engine.gauges().stalls_total == 1
    assert engine.engine.gauges().last_step_unix_s > 1.7e9


def test_an_idle_engine_does_not_stall(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup", stall_timeout_s=0.05)
    assert engine.engine.gauges().last_step_unix_s == 0
    engine.answer(requests(1)[0])

    async def rest() -> None:
        await asyncio.sleep(0.3)

    engine.run(rest())
    assert not engine.engine.stalled
    assert engine.engine.gauges().stalls_total == 0

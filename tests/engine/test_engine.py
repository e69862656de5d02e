"""The engine as its users see it: streams, aborts, bounds, drain, failure, choices, seeds, log-probabilities, options."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from draft_checkpoints import draft_config, random_tensors, write_draft_checkpoint
from fakes import OpenEngine, RunningEngine, read, totals
from transformers import AutoModelForCausalLM

from dspark.engine import (
    ConfigError,
    Engine,
    EngineClosedError,
    EngineConfig,
    FinishReason,
    QueueFullError,
    Request,
    RequestError,
    SamplingParams,
    TokenDelta,
)

PROMPT = tuple(range(3, 43))
LONG = Request(PROMPT, SamplingParams(max_tokens=400, ignore_eos=True, seed=1))


@pytest.fixture(scope="module")
def engine(open_engine: OpenEngine) -> RunningEngine:
    return open_engine(drafter="lookup")


def sampled(prompt: Sequence[int] = PROMPT, n: int = 1, **sampling: Any) -> Request:
    return Request(tuple(prompt), SamplingParams(**{"max_tokens": 12, "ignore_eos": True} | sampling), n)


# Streams


def test_leaving_a_stream_frees_its_blocks_within_one_step(engine: RunningEngine) -> None:
    async def leave() -> int:
        async with engine.engine.submit(LONG) as stream:
            await anext(stream)
            assert engine.engine.gauges().blocks_used > 0
        steps = len(engine.steps)
        while engine.engine.gauges().blocks_used:
            await asyncio.sleep(0)
        return len(engine.steps) - steps

    # the step in flight, and the one before it, whose facts come while that runs
    assert engine.run(leave()) <= 2


def test_a_request_left_before_it_ran_is_never_run(open_engine: OpenEngine) -> None:
    engine = open_engine(drafter="lookup")  # one whose steps are all this test's

    async def leave() -> None:
        async with engine.engine.submit(LONG):
            assert engine.engine.gauges().requests_waiting == 1

    engine.run(leave())
    assert engine.steps == []
    engine.check_pool_is_whole()


def test_a_stream_that_was_left_ends(engine: RunningEngine) -> None:
    async def leave_and_read_on() -> list[TokenDelta]:
        stream = engine.engine.submit(LONG)
        async with stream:
            await anext(stream)
        return [delta async for delta in stream]

    assert all(delta.finish_reason is None for delta in engine.run(leave_and_read_on()))


def test_one_client_leaving_disturbs_no_other(engine: RunningEngine) -> None:
    alone = engine.answer(sampled(seed=3, max_tokens=60))

    async def together() -> list[list[int]]:
        other = engine.engine.submit(LONG)
        mine = asyncio.create_task(read(engine.engine.submit(sampled(seed=3, max_tokens=60))))
        async with other:
            for _ in range(5):
                await anext(other)
        return (await mine).tokens

    assert engine.run(together()) == alone.tokens


def test_a_full_queue_refuses_before_any_work(open_engine: OpenEngine) -> None:
    small = open_engine(max_num_seqs=1, max_queued_requests=2)

    async def fill() -> None:
        first = asyncio.create_task(read(small.engine.submit(sampled(seed=1, max_tokens=50))))
        while not small.engine.gauges().requests_running:
            await asyncio.sleep(0)
        waiting = [asyncio.create_task(read(small.engine.submit(sampled(seed=i)))) for i in range(2)]
        with pytest.raises(QueueFullError, match="2 requests are waiting and the queue holds 2") as refused:
            small.engine.submit(sampled())
        assert (refused.value.waiting, refused.value.limit) == (2, 2)
        await asyncio.gather(first, *waiting)
        await read(small.engine.submit(sampled()))

    small.run(fill())


def test_a_bad_request_is_refused_before_any_work(engine: RunningEngine) -> None:
    steps = len(engine.steps)
    with pytest.raises(RequestError, match="top_p"):
        engine.engine.submit(sampled(top_p=3.0))
    assert len(engine.steps) == steps
    engine.check_pool_is_whole()


# Drain


def test_draining_refuses_new_work_and_finishes_what_is_here(open_engine: OpenEngine) -> None:
    draining = open_engine(drafter="lookup")

    async def drain() -> bool:
        running = asyncio.create_task(read(draining.engine.submit(sampled(seed=1, max_tokens=40))))
        await asyncio.sleep(0)
        finished = asyncio.create_task(draining.engine.drain(timeout_s=60.0))
        await asyncio.sleep(0)
        with pytest.raises(EngineClosedError, match="shutting down"):
            draining.engine.submit(sampled())
        assert len((await running).tokens[0]) == 40
        return await finished

    assert draining.run(drain())


def test_a_drain_that_runs_out_of_time_ends_the_rest(open_engine: OpenEngine) -> None:
    draining = open_engine(drafter="lookup")

    async def drain() -> None:
        running = asyncio.create_task(read(draining.engine.submit(LONG)))
        waiting = asyncio.create_task(read(draining.engine.submit(LONG)))
        await asyncio.sleep(0)
        assert not await draining.engine.drain(timeout_s=0.0)
        for task in (running, waiting):
            with pytest.raises(EngineClosedError):
                await task

    draining.run(drain())
    draining.check_pool_is_whole()


def test_an_idle_engine_is_drained_in_no_time(open_engine: OpenEngine) -> None:
    idle = open_engine()
    idle.answer(sampled())
    assert idle.run(idle.engine.drain(timeout_s=0.0))


# Choices and seeds


def test_choices_share_the_prompts_blocks_and_differ(open_engine: OpenEngine) -> None:
    fresh = open_engine(drafter="lookup")
    answer = fresh.answer(sampled(n=3, seed=5))
    assert len({tuple(tokens) for tokens in answer.tokens}) == 3
    sums = totals(fresh.steps)
    # 40 tokens of prompt: two full blocks are shared, the other 8 tokens are computed by each
    assert (sums["prompt_computed"], sums["prompt_cached"]) == (40 + 2 * 8, 2 * 32)


def test_greedy_choices_are_the_same(engine: RunningEngine) -> None:
    first, second = engine.answer(sampled(n=2, temperature=0.0)).tokens
    assert first == second


def test_a_seed_makes_an_answer_reproducible(engine: RunningEngine) -> None:
    request = sampled(n=2, seed=-7)
    assert engine.answer(request).tokens == engine.answer(request).tokens


def test_other_seeds_and_no_seed_give_other_answers(engine: RunningEngine) -> None:
    answers = [engine.answer(sampled(seed=seed)).tokens[0] for seed in (1, 2, None, None)]
    assert len({tuple(tokens) for tokens in answers}) == 4


def test_another_tenant_shares_no_blocks_and_gets_the_same_answer(engine: RunningEngine) -> None:
    prompt = tuple(range(100, 150))
    own = engine.answer(sampled(prompt, seed=1))
    again = engine.answer(sampled(prompt, seed=1))
    other = engine.answer(Request(prompt, SamplingParams(max_tokens=12, ignore_eos=True, seed=1), cache_salt=b"other"))
    assert [answer.facts.cached_tokens for answer in (own, again, other)] == [0, 48, 0]
    assert own.tokens == again.tokens == other.tokens


def test_a_request_that_needs_the_whole_pool_runs_in_a_crowd(open_engine: OpenEngine) -> None:
    tight = open_engine(num_blocks=6, drafter="lookup")
    whole = sampled(max_tokens=6 * 16 - len(PROMPT), seed=1)
    answers = tight.answer_together([sampled(range(5, 20), seed=2), whole, sampled(range(9, 40), seed=3)])
    assert [len(answer.tokens[0]) for answer in answers] == [12, 56, 12]
    assert answers[1].finish_reasons == [FinishReason.LENGTH]


# Stops


def test_a_stop_token_is_the_last_token(engine: RunningEngine) -> None:
    free = engine.answer(sampled(seed=4)).tokens[0]
    stopped = engine.answer(sampled(seed=4, stop_token_ids=(free[5],)))
    assert stopped.tokens[0] == free[: free.index(free[5]) + 1]
    assert stopped.finish_reasons == [FinishReason.STOP]


def test_no_stop_token_comes_before_min_tokens(engine: RunningEngine) -> None:
    # the only tokens that are not pushed out of sight are stops
    bias = {2: 60.0, 7: 60.0}
    answer = engine.answer(
        Request(PROMPT, SamplingParams(logit_bias=bias, stop_token_ids=(7,), min_tokens=9, max_tokens=30, seed=1))
    )
    assert len(answer.tokens[0]) == 10
    assert answer.tokens[0][-1] in bias
    assert not set(answer.tokens[0][:-1]) & set(bias)


def test_a_stop_check_keeps_what_it_says(engine: RunningEngine) -> None:
    free = engine.answer(sampled(seed=4)).tokens[0]

    def make() -> Any:
        seen: list[int] = []

        def check(token_ids: Sequence[int]) -> int | None:
            before = len(seen)
            seen.extend(token_ids)
            return 5 - before if len(seen) >= 5 else None

        return check

    request = Request(PROMPT, SamplingParams(max_tokens=12, ignore_eos=True, seed=4), make_stop_check=make)
    answer = engine.answer(request)
    assert (answer.tokens[0], answer.finish_reasons) == (free[:5], [FinishReason.STOP])


# Log-probabilities


@pytest.mark.parametrize("top", [0, 1, 5])
def test_logprobs_are_those_of_the_raw_distribution(engine: RunningEngine, tiny_target: Path, top: int) -> None:
    """Whatever processors and temperature made of it for sampling."""
    answer = engine.answer(
        sampled(seed=2, logprobs=top, temperature=0.7, repetition_penalty=1.5, logit_bias={9: 20.0}, top_k=40)
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32)
    ids = torch.tensor([[*PROMPT, *answer.tokens[0]]])
    with torch.no_grad():
        expected = model(ids).logits[0, len(PROMPT) - 1 : -1].log_softmax(dim=-1)
    assert [one.token_id for one in answer.logprobs[0]] == answer.tokens[0]
    for one, row in zip(answer.logprobs[0], expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        values, likeliest = row.topk(top)
        assert [token for token, _ in one.top] == likeliest.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)


# Options

BAD_OPTIONS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("device", {"device": "cuda"}, ["cuda", "cpu"]),
    ("threads", {"threads": 0}, ["0", "1.."]),
    ("threads", {"threads": 4096}, ["4096", "1.."]),
    ("max_num_seqs", {"max_num_seqs": 0}, ["0", "at least 1"]),
    ("max_num_batched_tokens", {"max_num_batched_tokens": 0}, ["0", "at least 1"]),
    ("max_num_batched_tokens", {"max_num_seqs": 9, "max_num_batched_tokens": 8}, ["8", "9"]),
    ("max_queued_requests", {"max_queued_requests": 0}, ["0", "at least 1"]),
    ("max_queued_tokens", {"max_queued_tokens": 0}, ["0", "at least 1"]),
    ("stall_timeout", {"stall_timeout_s": 0.0}, ["0", "above 0"]),
    ("lag", {"lag": 2}, ["2", "0 or 1"]),
    ("max_model_len", {"max_model_len": 0}, ["0", "2..512"]),
    ("max_model_len", {"max_model_len": 513}, ["513", "2..512"]),
    ("kv_cache_memory", {"kv_cache_bytes": 100}, ["100 bytes", "at least 2"]),
    ("num_speculative_tokens", {"num_speculative_tokens": 0}, ["0", "1..16"]),
    ("num_speculative_tokens", {"num_speculative_tokens": 17}, ["17", "1..16"]),
    ("verification", {"verification": "rejection"}, ["fixed"]),
    ("verification", {"verification": "rejection", "speculation": "fixed"}, ["lookup"]),
    ("drafter", {"drafter": "/nowhere/at/all"}, ["/nowhere/at/all", "lookup"]),
    ("model", {"model": "/nowhere/at/all"}, ["/nowhere/at/all"]),
]


@pytest.mark.parametrize(("field", "options", "parts"), BAD_OPTIONS, ids=lambda value: str(value)[:50])
def test_an_option_that_cannot_work_is_refused_by_name(
    tiny_target: Path, engine_cache: Path, field: str, options: dict[str, Any], parts: list[str]
) -> None:
    config = EngineConfig(**{"model": str(tiny_target), "threads": 1, "cache_dir": engine_cache} | options)
    with pytest.raises(ConfigError) as refused:
        Engine.load(config)
    assert refused.value.field == field
    assert str(refused.value).startswith(f"{field}: ")
    assert [part for part in parts if part not in str(refused.value)] == []


def test_a_longer_draft_than_the_drafters_block_is_refused(
    tiny_target: Path, engine_cache: Path, draft_checkpoint: Path
) -> None:
    config = EngineConfig(
        str(tiny_target), str(draft_checkpoint), threads=1, cache_dir=engine_cache, num_speculative_tokens=5
    )
    with pytest.raises(ConfigError, match="5 exceeds the drafter's block of 4") as refused:
        Engine.load(config)
    assert refused.value.field == "num_speculative_tokens"


def test_a_drafter_for_another_target_is_refused(tiny_target: Path, engine_cache: Path, tmp_path: Path) -> None:
    config = draft_config()
    folder = write_draft_checkpoint(tmp_path / "draft", config, random_tensors(config))
    with pytest.raises(ConfigError, match=r"97 .* 320") as refused:
        Engine.load(EngineConfig(str(tiny_target), str(folder), threads=1, cache_dir=engine_cache))
    assert refused.value.field == "drafter"


def test_a_cache_that_cannot_be_written_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="file") as refused:
        Engine.load(EngineConfig(str(tiny_target), threads=1, cache_dir=tmp_path / "file"))
    assert refused.value.field == "cache_dir"


def test_what_was_started_is_described(engine: RunningEngine) -> None:
    info = engine.engine.info
    assert (info.model_name, info.drafter_name, info.device, info.dtype) == ("target", "lookup", "cpu", "float32")
    assert (info.threads, info.block_size, info.max_model_len, info.vocab_size) == (1, 16, 512, 320)
    assert (info.max_draft_tokens, info.eos_token_ids, info.row_invariant) == (7, (2,), True)
    assert set(info.load_seconds) == {"target_weights", "draft_weights", "kv_alloc", "warmup", "profile"}


def test_shorter_drafts_than_the_drafters_block_can_be_asked_for(
    open_engine: OpenEngine, draft_checkpoint: Path
) -> None:
    short = open_engine(drafter=str(draft_checkpoint), speculation="fixed", num_speculative_tokens=2)
    short.answer(sampled(seed=1))
    assert short.engine.info.max_draft_tokens == 2
    assert max(length for step in short.steps for length in step.proposed_lengths) == 2

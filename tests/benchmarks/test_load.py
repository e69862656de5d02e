"""The load generator against a scripted OpenAI server over real sockets."""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import TypeVar

import pytest
from scripted_openai import ScriptedServer, scripted_server

from dspark.benchmarks import load
from dspark.benchmarks.endpoint import Endpoint, EndpointError, RequestRecord, Speculation
from dspark.benchmarks.load import Limits, LoadResult, Workload, poisson_arrivals_s, run_closed, run_open
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.prompts import BUILT_IN, Prompt, mixed, read_prompts

WORKLOAD = Workload([Prompt("test", f"prompt {i}") for i in range(5)], max_tokens=8)
NO_LIMIT_S = 1e6
Result = TypeVar("Result")


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    with scripted_server() as scripted:
        yield scripted


def on_endpoint(server: ScriptedServer, work: Callable[[Endpoint], Awaitable[Result]]) -> Result:
    async def connected() -> Result:
        async with Endpoint(server.url) as endpoint:
            return await work(endpoint)

    return asyncio.run(connected())


def run_bench(server: ScriptedServer, *flags: str) -> int:
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    return load.main(parser.parse_args(["--url", server.url, "--requests", "2", *flags]))


def test_the_built_in_prompts_are_sixty_different_ones_and_every_stretch_is_mixed() -> None:
    assert len({prompt.text for prompt in BUILT_IN}) == 60
    assert sorted(mixed(), key=BUILT_IN.index) == list(BUILT_IN)
    assert {prompt.kind for prompt in mixed()[:10]} == {prompt.kind for prompt in BUILT_IN}


def test_prompt_files_are_read_one_prompt_a_line(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text('first\n\n{"second": 2}\n')
    jsonl.write_text('"first"\n{"prompt": "second", "kind": "code"}\n')
    assert read_prompts(text) == [Prompt("file", "first"), Prompt("file", '{"second": 2}')]
    assert read_prompts(jsonl) == [Prompt("file", "first"), Prompt("code", "second")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '"good"\n{bad', "a.jsonl:2 is not JSON"),
        ("b.jsonl", '{"text": "no prompt"}', 'b.jsonl:1 must be a string or an object with a string "prompt"'),
        ("c.txt", "\n \n", "c.txt holds no prompts"),
    ],
)
def test_a_prompt_file_that_cannot_be_used_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_poisson_arrivals_repeat_with_the_seed_and_keep_the_rate() -> None:
    arrivals_s = list(islice(poisson_arrivals_s(4.0, seed=1), 20_000))
    assert arrivals_s == list(islice(poisson_arrivals_s(4.0, seed=1), 20_000))
    assert arrivals_s[:10] != list(islice(poisson_arrivals_s(4.0, seed=2), 10))
    gaps_s = [later - earlier for earlier, later in pairwise(arrivals_s)]
    mean_s = sum(gaps_s) / len(gaps_s)
    variance = sum((gap - mean_s) ** 2 for gap in gaps_s) / len(gaps_s)
    assert mean_s == pytest.approx(0.25, rel=0.03)
    assert variance == pytest.approx(0.25**2, rel=0.06)  # exponential gaps: deviation = mean


def test_latencies_come_from_the_chunks_and_tokens_from_the_usage() -> None:
    record = RequestRecord(started_s=10.0, finished_s=11.0, chunk_s=[10.2, 10.3, 10.8], completion_tokens=7)
    assert record.ttft_s == pytest.approx(0.2)
    assert record.chunk_gaps_s == pytest.approx([0.1, 0.5])
    assert record.time_per_output_token_s == pytest.approx(0.1)  # 0.6 s for the six tokens after the first


def test_one_token_has_no_time_per_output_token() -> None:
    assert RequestRecord(started_s=0.0, chunk_s=[1.0], completion_tokens=1).time_per_output_token_s is None


def test_throughput_counts_answered_requests_only_over_the_whole_level() -> None:
    good = RequestRecord(started_s=1.0, finished_s=3.0, chunk_s=[2.0], completion_tokens=30)
    bad = RequestRecord(started_s=2.0, finished_s=6.0, chunk_s=[3.0], completion_tokens=10, error="broken")
    result = LoadResult(2, None, [good, bad], None)
    assert (result.output_tokens, result.tokens_per_s) == (30, pytest.approx(30 / 5.0))
    assert result.errors == {"broken": 1}


def test_a_closed_loop_keeps_exactly_the_wanted_number_of_requests_in_flight(server: ScriptedServer) -> None:
    server.gather = 3  # no stream ends before three are open
    result = on_endpoint(server, lambda endpoint: run_closed(endpoint, WORKLOAD, 3, Limits(7, NO_LIMIT_S)))
    assert len(result.answered) == 7
    assert server.most_open_streams == 3
    assert sorted(server.prompts) == sorted(WORKLOAD.prompts[i % 5].text for i in range(7))
    assert (result.output_tokens, result.counted_by) == (35, "usage")


def test_an_open_loop_does_not_wait_for_answers(server: ScriptedServer) -> None:
    server.gather = 6  # a load generator that waited for an answer would never open the second stream
    result = on_endpoint(server, lambda endpoint: run_open(endpoint, WORKLOAD, 500.0, Limits(6, NO_LIMIT_S), seed=0))
    assert len(result.answered) == 6


def test_no_request_starts_after_the_duration(server: ScriptedServer) -> None:
    closed = on_endpoint(server, lambda endpoint: run_closed(endpoint, WORKLOAD, 2, Limits(100, 0.0)))
    opened = on_endpoint(server, lambda endpoint: run_open(endpoint, WORKLOAD, 1.0, Limits(100, 0.0), seed=0))
    assert (closed.records, opened.records) == ([], [])


def test_without_usage_the_chunks_are_counted_and_the_result_says_so(server: ScriptedServer) -> None:
    server.answer_with("a", "b", "c")
    result = on_endpoint(server, lambda endpoint: run_closed(endpoint, WORKLOAD, 1, Limits(2, NO_LIMIT_S)))
    assert (result.output_tokens, result.counted_by) == (6, "chunks")


def test_acceptance_is_summed_over_the_usage_of_all_requests(server: ScriptedServer) -> None:
    told = {"rounds": 4, "drafted": 20, "verified": 10, "accepted": 6, "accepted_length": 2.5}
    server.answer_with("a", usage={"completion_tokens": 10, "speculation": told})
    result = on_endpoint(server, lambda endpoint: run_closed(endpoint, WORKLOAD, 1, Limits(3, NO_LIMIT_S)))
    assert result.speculation == Speculation(rounds=12, drafted=60, verified=30, accepted=18)
    assert (result.speculation.acceptance_ratio, result.speculation.accepted_length) == (0.6, 2.5)


def test_acceptance_comes_from_the_growth_of_the_counters_when_the_usage_does_not_tell(server: ScriptedServer) -> None:
    def metrics() -> str:
        n = len(server.bodies) + 100
        return (
            f'dspark_spec_rounds_total{{drafts="yes"}} {2 * n}\ndspark_spec_rounds_total{{drafts="no"}} {n}\n'
            f"dspark_spec_drafted_tokens_total {8 * n}\ndspark_spec_verified_tokens_total {6 * n}\n"
            f"dspark_spec_accepted_tokens_total {3 * n}\n"
        )

    server.metrics = metrics
    result = on_endpoint(server, lambda endpoint: run_closed(endpoint, WORKLOAD, 1, Limits(2, NO_LIMIT_S)))
    assert result.speculation == Speculation(rounds=6, drafted=16, verified=12, accepted=6)


def test_a_server_without_speculation_tells_no_acceptance(server: ScriptedServer) -> None:
    server.metrics = lambda: "process_cpu_seconds_total 1.0\n"
    result = on_endpoint(server, lambda endpoint: run_closed(endpoint, WORKLOAD, 1, Limits(2, NO_LIMIT_S)))
    assert result.speculation is None
    assert result.as_dict()["speculation"] is None


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (['{"error": {"message": "out of memory", "type": "server_error"}}'], "out of memory"),
        (['{"error": "engine died"}'], "engine died"),
        (['{"choices": [{"index": 0, "delta": {"content": "half"}}]}'], "without a finish_reason"),
        (["{not json"], "not a chat completion chunk"),
        (['["a list"]'], "not a chat completion chunk"),
    ],
)
def test_a_stream_that_breaks_is_an_error_of_its_request(
    server: ScriptedServer, events: list[str], message: str
) -> None:
    server.events = events
    record = on_endpoint(server, lambda endpoint: endpoint.chat("hi", max_tokens=4, temperature=0.0))
    assert record.error is not None
    assert message in record.error


def test_an_http_error_is_reported_with_status_and_message(server: ScriptedServer) -> None:
    server.failure = (429, {"error": {"message": "the queue is full"}})
    record = on_endpoint(server, lambda endpoint: endpoint.chat("hi", max_tokens=4, temperature=0.0))
    assert record.error == "HTTP 429: the queue is full"


def test_a_request_that_outlives_its_time_limit_is_an_error(server: ScriptedServer) -> None:
    server.gather = 2  # never reached: the only stream stays open

    async def hang() -> RequestRecord:
        async with Endpoint(server.url, request_timeout_s=0.05) as endpoint:
            return await endpoint.chat("hi", max_tokens=4, temperature=0.0)

    record = asyncio.run(hang())
    assert record.error is not None
    assert "0.05 s" in record.error


def test_bench_prints_a_table_and_writes_machine_and_levels_as_json(
    server: ScriptedServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert run_bench(server, "--concurrency", "1,2", "--rates", "200", "--json", str(out)) == 0
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:5]] == ["1 clients", "2 clients", "200 req/s"]
    document = json.loads(out.read_text())
    assert document["model"] == "scripted"
    assert document["machine"]["read_bandwidth_gb_per_s"] > 0
    assert [level["output_tokens"] for level in document["levels"]] == [10, 10, 10]
    assert document["levels"][0]["tokens_counted_by"] == "usage"


def test_bench_asks_for_usage_and_for_full_length_where_the_server_takes_it(server: ScriptedServer) -> None:
    assert run_bench(server, "--concurrency", "1", "--ignore-eos", "--max-tokens", "9", "--model", "other") == 0
    last = server.bodies[-1]
    assert (last["model"], last["max_tokens"], last["ignore_eos"]) == ("other", 9, True)
    assert last["stream_options"] == {"include_usage": True}


def test_bench_leaves_out_the_fields_that_the_server_refuses_and_says_so(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refused_fields = frozenset({"ignore_eos"})
    assert run_bench(server, "--concurrency", "1", "--ignore-eos") == 0
    assert "refuses 'ignore_eos'" in capsys.readouterr().err
    assert "ignore_eos" not in server.bodies[-1]
    assert "stream_options" in server.bodies[-1]


def test_bench_sends_warm_up_requests_that_are_not_measured(server: ScriptedServer, tmp_path: Path) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("first\nsecond\nthird\nfourth\n")
    flags = ["--concurrency", "1", "--warmup", "2", "--prompts", str(prompts), "--json", str(out)]
    assert run_bench(server, *flags) == 0
    assert [text for text in server.prompts if text != "Hello"] == ["fourth", "third", "first", "second"]
    assert json.loads(out.read_text())["levels"][0]["requests"] == 2


def test_bench_fails_with_the_address_when_nothing_listens(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        server.url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    assert run_bench(server) == 1
    assert f"cannot reach {server.url}/v1/models" in capsys.readouterr().err


def test_bench_fails_before_the_load_when_the_server_refuses_a_plain_request(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failure = (401, {"error": {"message": "missing API key"}})
    assert run_bench(server) == 1
    assert "HTTP 401: missing API key" in capsys.readouterr().err
    assert len(server.bodies) == 1


def test_bench_fails_when_requests_failed_and_prints_why(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    server.failure, server.healthy_requests = (500, {"error": {"message": "a step failed"}}), 3
    assert run_bench(server, "--concurrency", "2", "--warmup", "0") == 1
    assert "2 clients: 1 failed: HTTP 500: a step failed" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--concurrency", "0"], ["--rates", "1,-2"], ["--requests", "x"]])
def test_flags_out_of_range_are_refused(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    load.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_malformed_url_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(EndpointError, match="not a URL"):
        Endpoint("http://localhost:port")


def test_an_endpoint_is_found_with_and_without_the_version_in_its_url(server: ScriptedServer) -> None:
    server.url += "/v1/"
    record = on_endpoint(server, lambda endpoint: endpoint.chat("hi", max_tokens=4, temperature=0.0))
    assert record.error is None


def test_the_bandwidth_and_the_facts_of_this_machine_are_positive() -> None:
    machine = describe_machine()
    assert machine.cores > 0
    assert machine.memory_bytes > 0
    assert "torch" in machine.versions
    assert f"{machine.read_bandwidth_gb_per_s:.1f} GB/s" in machine.line()

"""The side-by-side comparison against scripted servers: who is asked when, with what, and what is refused."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator

import pytest
from scripted_openai import ScriptedServer, scripted_server

from dspark.benchmarks import peers
from dspark.benchmarks.peers import PeerError, Server, Slice, measure, numbered_prompts, ratio_table


@pytest.fixture
def pair() -> Iterator[tuple[ScriptedServer, ScriptedServer]]:
    with scripted_server() as first, scripted_server() as second:
        yield first, second


def compare(pair: tuple[ScriptedServer, ScriptedServer], concurrencies: list[int], repeats: int) -> list[Slice]:
    servers = [Server("ours", pair[0].url, {"ignore_eos": True}), Server("theirs", pair[1].url)]
    return asyncio.run(measure(servers, concurrencies, repeats, max_tokens=5))


def run_peers(*flags: str) -> int:
    parser = argparse.ArgumentParser()
    peers.add_arguments(parser)
    return peers.main(parser.parse_args(["--start", "", "--concurrency", "1", "--repeats", "1", *flags]))


def test_servers_take_turns_in_slices_that_alternate_their_order(pair: tuple[ScriptedServer, ScriptedServer]) -> None:
    slices = compare(pair, [1], repeats=3)
    assert [s.server for s in slices] == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert [s.repeat for s in slices] == [0, 0, 1, 1, 2, 2]


def test_all_servers_get_the_same_prompts_and_their_own_extra_fields(
    pair: tuple[ScriptedServer, ScriptedServer],
) -> None:
    slices = compare(pair, [1, 3], repeats=2)
    assert sorted(pair[0].prompts) == sorted(pair[1].prompts)
    assert all(body["ignore_eos"] is True for body in pair[0].bodies)
    assert not any("ignore_eos" in body for body in pair[1].bodies)
    assert [s.output_tokens for s in slices if s.concurrency == 3] == [15] * 4


def test_no_two_prompts_of_a_comparison_share_their_beginning() -> None:
    beginnings = [prompt.text.split()[0] for prompt in numbered_prompts(7, 200)]
    assert beginnings == [f"({number})" for number in range(7, 207)]


def test_ratios_are_taken_within_a_repeat_and_shown_with_their_spread() -> None:
    rates = {("a", 0): 10.0, ("b", 0): 5.0, ("a", 1): 30.0, ("b", 1): 10.0, ("a", 2): 12.0, ("b", 2): 8.0}
    slices = [Slice(server, 4, repeat, rate, 5, 2.0) for (server, repeat), rate in rates.items()]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in ratio_table(slices, "a").splitlines()[2:]]
    assert rows[1] == ["4", "b", "8.0", "5.0 to 10.0", "2.0", "2.00", "1.50 to 3.00"]


def test_a_server_that_does_not_count_its_tokens_cannot_be_compared(
    pair: tuple[ScriptedServer, ScriptedServer],
) -> None:
    pair[1].answer_with("a", "b")
    with pytest.raises(PeerError, match="theirs sends no token usage"):
        compare(pair, [1], repeats=1)


def test_a_failed_request_ends_the_comparison_with_the_servers_name(
    pair: tuple[ScriptedServer, ScriptedServer],
) -> None:
    pair[1].failure, pair[1].healthy_requests = (500, {"error": {"message": "out of blocks"}}), 2
    with pytest.raises(PeerError, match="theirs failed at 2 clients: HTTP 500: out of blocks"):
        compare(pair, [2], repeats=1)


def test_servers_that_run_already_are_compared_by_url(
    pair: tuple[ScriptedServer, ScriptedServer], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_peers("--peer", f"x={pair[0].url}", "--peer", f"y={pair[1].url}/v1", "--max-tokens", "5") == 0
    assert "x ÷ it" in capsys.readouterr().out.splitlines()[0]
    assert pair[0].bodies[-1]["ignore_eos"] is True


def test_nothing_to_compare_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_peers() == 1
    assert "nothing to measure" in capsys.readouterr().err

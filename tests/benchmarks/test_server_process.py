"""Servers that the benchmarks start themselves."""

from __future__ import annotations

import pytest

from dspark.benchmarks.server_process import StartError, given_or_started, running


def test_a_server_that_dies_at_start_is_reported_with_its_output() -> None:
    command = ["sh", "-c", "echo no such flag; exit 2"]
    with (
        pytest.raises(StartError, match=r"(?s)broken did not start.*no such flag"),
        running("broken", command, port=1, threads=1),
    ):
        pytest.fail("a server that has ended is not running")


def test_a_server_that_runs_already_is_left_as_it_is() -> None:
    with given_or_started("http://127.0.0.1:1", threads=1) as url:
        assert url == "http://127.0.0.1:1"

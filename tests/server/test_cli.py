"""Flags, their errors, and the life of a real `dspark serve` process as far as it needs no model."""

from __future__ import annotations

import argparse
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import tiny_info

from dspark.engine import EngineConfig
from dspark.server import cli

DSPARK = Path(sys.executable).parent / "dspark"


def options(*arguments: str) -> argparse.Namespace:
    parser = cli.Parser(prog="dspark serve")
    cli.add_serve_arguments(parser)
    return parser.parse_args(arguments)


def dspark(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([DSPARK, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_without_flags_the_configuration_is_the_engines_default() -> None:
    assert cli.engine_config(options()) == EngineConfig()


def test_every_flag_reaches_the_configuration() -> None:
    config = cli.engine_config(
        options(
            *("--model", "/m", "--drafter", "lookup", "--device", "cpu", "--dtype", "float32", "--threads", "3"),
            *("--max-model-len", "100", "--max-num-seqs", "4", "--max-num-batched-tokens", "64"),
            *("--kv-cache-memory", "2G", "--max-queued-requests", "7"),
            *("--max-queued-tokens", "900", "--stall-timeout", "5", "--lag", "1"),
            *("--num-speculative-tokens", "5", "--speculation", "fixed", "--verification", "rejection"),
            *("--cache-dir", "/c"),
        )
    )
    assert config == EngineConfig(
        model="/m", drafter="lookup", device="cpu", dtype="float32", threads=3, max_model_len=100, max_num_seqs=4,
        max_num_batched_tokens=64, kv_cache_bytes=2 << 30, max_queued_requests=7,
        max_queued_tokens=900, stall_timeout_s=5.0, lag=1,
        num_speculative_tokens=5, speculation="fixed", verification="rejection", cache_dir=Path("/c"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("2G", 2 << 30), ("2GiB", 2 << 30), ("2gb", 2 << 30), ("1.5G", 3 << 29), ("4096", 4096)],
)
def test_memory_sizes_count_in_1024s(text: str, size: int) -> None:
    assert options("--kv-cache-memory", text).kv_cache_memory == size


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--port", "70000"], ["--port", "0..65535", "70000"]),
        (["--port", "http"], ["--port", "0..65535", "http"]),
        (["--kv-cache-memory", "2X"], ["--kv-cache-memory", "512M", "2X"]),
        (["--kv-cache-memory", "0"], ["--kv-cache-memory", "512M", "0"]),
        (["--threads", "0"], ["--threads", "at least 1", "0"]),
        (["--max-num-seqs", "-1"], ["--max-num-seqs", "at least 1", "-1"]),
        (["--drain-timeout", "soon"], ["--drain-timeout", "seconds", "soon"]),
        (["--hourly-cost", "-1"], ["--hourly-cost", "at least 0", "-1"]),
        (["--currency", "$"], ["--currency", "USD", "$"]),
        (["--dtype", "int4"], ["--dtype", "bfloat16", "int4"]),
        (["--speculation", "maybe"], ["--speculation", "adaptive", "maybe"]),
        (["--cors-origins", "example.org"], ["--cors-origins", "https://example.org", "'example.org'"]),
        (["--cors-origins", "https://a.example/"], ["--cors-origins", "'https://a.example/'"]),
        (["--cors-origins", "https://*.example"], ["--cors-origins", "'https://*.example'"]),
        (["--metrics-port", "-1"], ["--metrics-port", "0..65535", "-1"]),
        (["--metrics-host", "127.0.0.1"], ["--metrics-host", "--metrics-port"]),
        (["--tool-call-parser", "xml"], ["--tool-call-parser", "hermes", "xml"]),
        (["--reasoning-parser", "maybe"], ["--reasoning-parser", "think", "maybe"]),
        (["--chat-template-kwargs", "mood,messages"], ["--chat-template-kwargs", "template variables", "'messages'"]),
        (["--modle", "x"], ["--modle"]),
    ],
)
def test_a_bad_option_is_one_line_on_stderr_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", *arguments])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_every_help_is_a_sentence_with_its_default() -> None:
    parser = cli.Parser(prog="dspark serve")
    cli.add_serve_arguments(parser)
    for action in parser._actions[1:]:
        assert action.help
        assert action.help.endswith(".")
        assert "default: " in action.help


def test_a_port_in_use_is_found_out_before_torch_is_imported() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        script = (
            "import sys; from dspark.server import cli\n"
            f"try: cli.main(['serve', '--port', '{port}'])\n"
            "except SystemExit as error: print(error.code, 'torch' in sys.modules)"
        )
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == "2 False\n"
    assert result.stderr.count("\n") == 1
    assert f"port {port}" in result.stderr
    assert "in use" in result.stderr


def test_a_metrics_port_in_use_is_told_by_its_own_name() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = dspark("serve", "--port", "0", "--metrics-port", port)
    assert result.returncode == 2
    assert f"port {port}" in result.stderr
    assert "choose another --metrics-port" in result.stderr


def test_a_file_of_keys_that_cannot_be_used_stops_the_start_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # what a process of its own may do to itself
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(cli, "set_threading_environment", lambda _: None)
    file = tmp_path / "keys"
    file.write_text("good-key\nnot a secret\n", encoding="utf-8")
    with pytest.raises(SystemExit) as exit_:
        cli.main(["serve", "--port", "0", "--model", str(tmp_path / "nothing"), "--api-keys-file", str(file)])
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith(f"dspark serve: --api-keys-file: {file} line 2 should be a key")
    assert "secret" not in message


def test_help_does_not_show_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_API_KEY", "environment-secret")
    result = dspark("serve", "--help")
    assert "$DSPARK_API_KEY" in result.stdout
    assert "environment-secret" not in result.stdout + result.stderr


def test_origins_are_separated_by_commas() -> None:
    assert options().cors_origins == ()
    assert options("--cors-origins", "https://a.example, http://localhost:3000").cors_origins == (
        "https://a.example",
        "http://localhost:3000",
    )
    assert options("--cors-origins", "*").cors_origins == ("*",)


def test_a_model_that_is_not_there_is_one_line_and_status_2(tmp_path: Path) -> None:
    result = dspark("serve", "--port", "0", "--model", str(tmp_path / "nothing"))
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--model: " in result.stderr
    assert "nothing" in result.stderr


def test_a_command_is_required_and_the_two_are_told() -> None:
    result = dspark()
    assert result.returncode == 2
    assert "serve" in dspark("--help").stdout
    assert "bench" in dspark("--help").stdout


@pytest.mark.parametrize(
    ("given", "environment", "keys"),
    [
        ([], "", ()),
        ([], "a, b", ("a", "b")),
        (["x,y", "z"], "a", ("x", "y", "z")),
        (["x,"], "", ("x",)),
    ],
)
def test_keys_come_from_flags_else_from_the_environment(
    given: list[str], environment: str, keys: tuple[str, ...]
) -> None:
    assert cli.api_keys(given, environment) == keys


def test_the_ready_message_is_a_line_and_a_request_to_try() -> None:
    line, curl = cli.ready_message(tiny_info(), "my-model", "0.0.0.0", 8000).split("\n")
    for word in ("my-model", "http://127.0.0.1:8000", "scripted", "float32", "1 thread,", "1600 tokens"):
        assert word in line
    assert re.fullmatch(r"  curl http://127\.0\.0\.1:8000/v1/chat/completions -H '.*' -d '\{.*\}'", curl)


SERVE_FAKE = """
import sys, itertools
from pathlib import Path
sys.path.insert(0, {support!r})
from fake_engine import FakeEngine, tiny_info
from dspark.server import cli
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

script = lambda request, index: ((75,) for _ in itertools.count())
engine = FakeEngine(script, tiny_info(max_model_len=10**9))
service = Service(engine, ModelText.load(Path({folder!r})), ServerSettings("tiny-model"))
parser = cli.Parser()
cli.add_serve_arguments(parser)
options = parser.parse_args(["--drain-timeout", "{drain_timeout}"])
sys.exit(cli.run(service, cli.listen("127.0.0.1", 0), options))
"""


@pytest.fixture
def endless_process(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`cli.run` in a process of its own, whose answers end only when a drain ends them; and its URL."""
    support = str(Path(__file__).parent.parent / "support")
    code = SERVE_FAKE.format(support=support, folder=str(folder), drain_timeout=request.param)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = re.search(r"http://[\d.:]+", process.stdout.readline())
    assert url is not None
    yield process, url[0]
    process.kill()
    process.communicate()


CHAT = {"model": "tiny-model", "messages": [{"role": "user", "content": "Hi"}]}


# each is a process that imports torch; test_shutdown.py does the same to one with a real engine
@pytest.mark.parametrize("endless_process", [0.2], indirect=True)
@pytest.mark.parametrize("sig", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_drains_up_to_the_limit_and_the_exit_status_is_0(
    endless_process: tuple[subprocess.Popen[str], str], sig: signal.Signals
) -> None:
    process, url = endless_process
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": True}, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(sig)
        assert "service_unavailable" in [line for line in lines if line][-1]
    assert process.wait(20) == 0


@pytest.mark.slow
@pytest.mark.parametrize("endless_process", [3600], indirect=True)
def test_while_it_drains_the_port_answers_503_and_a_second_signal_aborts(
    endless_process: tuple[subprocess.Popen[str], str],
) -> None:
    process, url = endless_process
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=CHAT | {"stream": True}, timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        while httpx.get(f"{url}/health").status_code == 200:
            pass
        assert httpx.post(f"{url}/v1/chat/completions", json=CHAT).status_code == 503
        assert next(line for line in lines if line)
        process.send_signal(signal.SIGTERM)
        assert "service_unavailable" in [line for line in lines if line][-1]
    assert process.wait(20) == 0

"""`dspark serve | bench | train-drafter | eval`: flags to config objects, and how a server comes up and goes down.

Nothing heavy is imported at the top: the threading environment has to be set before torch is first imported.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from dspark.engine import EngineConfig, EngineInfo
    from dspark.server.service import Service

EXIT_USAGE = 2
EXIT_HUNG = 1
EXIT_INTERRUPTED = 130
SWITCH_INTERVAL_S = 0.0005
"""How soon a thread that wants the interpreter gets it. The default of 5 ms is as long as a step: tensor work in the
worker thread would keep the event loop waiting, and the loop the tensor work."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
LINGER_S = 5
"""After the drain, how long open connections may take to read their last bytes."""

TEMPLATE_OWN = frozenset({"messages", "tools", "add_generation_prompt"})
"""What the server itself gives to chat templates."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?B)?", re.IGNORECASE)
_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line and exits with 2."""

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message} (see {self.prog} --help)")


def fail(message: str) -> NoReturn:
    sys.stderr.write(f"{message}\n")
    raise SystemExit(EXIT_USAGE)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog="dspark", description="An LLM inference server built around DSpark speculative decoding.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    serve_help = "Serve a model over an OpenAI-compatible HTTP API."
    serve_parser = commands.add_parser("serve", help=serve_help, description=serve_help)
    add_serve_arguments(serve_parser)
    bench_help = "Put load on an OpenAI-compatible server and measure it."
    bench_parser = commands.add_parser("bench", help=bench_help, description=bench_help)
    if arguments[:1] == ["bench"]:
        from dspark.benchmarks import load

        load.add_arguments(bench_parser)
        return load.main(parser.parse_args(arguments))
    train_help = "Train a DSpark, DFlash or Eagle3 drafter for a target from files of prompts."
    train_parser = commands.add_parser("train-drafter", help=train_help, description=train_help)
    if arguments[:1] == ["train-drafter"]:
        set_threading_environment(None)
        from dspark.training import train_drafter

        train_drafter.add_arguments(train_parser)
        return run_offline(train_drafter.main, parser.parse_args(arguments))
    eval_help = "Measure drafters on answers that they were not trained on."
    eval_parser = commands.add_parser("eval", help=eval_help, description=eval_help)
    if arguments[:1] == ["eval"]:
        set_threading_environment(None)
        from dspark.training import evaluate

        evaluate.add_arguments(eval_parser)
        return run_offline(evaluate.main, parser.parse_args(arguments))
    return serve(parser.parse_args(arguments))


def run_offline(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """A command that serves nobody: what it cannot do is said in one line, and it may be interrupted."""
    from dspark.engine import ConfigError

    try:
        return command(options)
    except ConfigError as error:
        fail(f"dspark {options.command}: {error}")
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    http = parser.add_argument_group("HTTP")
    http.add_argument("--host", default="127.0.0.1", help="Address to listen on (default: 127.0.0.1).")
    http.add_argument("--port", type=_port, default=8000, help="Port to listen on; 0 takes a free one (default: 8000).")
    http.add_argument(
        "--served-model-name", metavar="NAME", help="Name that clients call the model (default: the model's own)."
    )
    http.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="How long running requests may take to finish after SIGTERM or Ctrl-C (default: 30).",
    )
    http.add_argument(
        "--request-timeout",
        type=_seconds,
        metavar="SECONDS",
        help="Deadline of requests that give none by X-Request-Timeout or 'timeout' (default: none).",
    )
    http.add_argument(
        "--max-request-timeout",
        type=_seconds,
        default=86_400.0,
        metavar="SECONDS",
        help="Longest deadline that a request may give (default: 86400, a day).",
    )
    http.add_argument(
        "--hourly-cost",
        type=_amount,
        default=0.0,
        metavar="AMOUNT",
        help="What this server costs an hour, for the dashboard's cost per million tokens (default: 0, not given).",
    )
    http.add_argument(
        "--currency", type=_currency, default="USD", metavar="CODE", help="Currency of --hourly-cost (default: USD)."
    )
    http.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="What is logged to standard error (default: info).",
    )
    _add_access_arguments(parser.add_argument_group("Access"))
    _add_stream_arguments(parser.add_argument_group("Streams and retries"))
    _add_model_arguments(parser.add_argument_group("Model"))
    _add_chat_arguments(parser.add_argument_group("Chat"))
    _add_batching_arguments(parser.add_argument_group("Batching and memory"))
    _add_speculation_arguments(parser.add_argument_group("Speculation"))


def _add_stream_arguments(group: Any) -> None:
    group.add_argument(
        "--sse-keep-alive",
        type=_some_seconds,
        default=15.0,
        metavar="SECONDS",
        help="A stream that sent nothing for so long sends a comment (default: 15).",
    )
    group.add_argument(
        "--slow-reader-timeout",
        type=_some_seconds,
        default=30.0,
        metavar="SECONDS",
        help="A client that takes nothing of its stream for so long is disconnected (default: 30).",
    )
    group.add_argument(
        "--idempotency-store",
        default=os.environ.get("DSPARK_IDEMPOTENCY_STORE", "memory"),
        metavar="STORE",
        help="Where answers to requests with an Idempotency-Key are kept: memory, sqlite:FILE, which survives restarts, "
        "or redis://HOST:PORT/DB, which replicas share (default: $DSPARK_IDEMPOTENCY_STORE, else memory).",
    )
    group.add_argument(
        "--idempotency-ttl",
        type=_seconds,
        default=86_400.0,
        metavar="SECONDS",
        help="How long they are kept (default: 86400, a day).",
    )
    group.add_argument(
        "--idempotency-max-entries",
        type=_positive,
        default=10_000,
        metavar="N",
        help="Most answers kept (default: 10000).",
    )
    group.add_argument(
        "--idempotency-max-size",
        type=_size,
        default=64 * 2**20,
        metavar="SIZE",
        help="Most bytes of answers kept; with Redis, of one answer (default: 64M).",
    )
    group.add_argument(
        "--idempotency-grace",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="How long a request with a key goes on when its callers have left (default: 60).",
    )


def _add_access_arguments(group: Any) -> None:
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="Key that /v1 requires as a Bearer token; repeat it or separate several by commas. Other users of the "
        "machine can see it in the list of processes: the variable and the file keep it from them "
        "(default: $DSPARK_API_KEY, else none, and everybody may use the server).",
    )
    group.add_argument(
        "--api-keys-file",
        type=Path,
        metavar="FILE",
        help="More keys, one a line, # starts a comment; read again when the file changes (default: none).",
    )
    group.add_argument(
        "--cors-origins",
        type=_origins,
        default=(),
        metavar="ORIGINS",
        help="Origins of web pages whose scripts may use the server, separated by commas, or * for all "
        "(default: none).",
    )
    group.add_argument(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="Port that answers /metrics and nothing else; 0 takes a free one (default: --port answers it too).",
    )
    group.add_argument(
        "--metrics-host", metavar="HOST", help="Address that --metrics-port listens on (default: that of --host)."
    )


def _add_model_arguments(group: Any) -> None:
    group.add_argument(
        "--model", help="Folder, GGUF file or hub id of the target model (default: SmolLM2-135M-Instruct)."
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float32"),
        default="auto",
        help="Arithmetic of both models; auto is bfloat16 where the processor has it (default: auto).",
    )
    group.add_argument("--device", default="auto", help="Device that computes (default: auto).")
    group.add_argument(
        "--threads",
        type=_positive,
        metavar="N",
        help="Threads of tensor work (default: all cores but one, which is left to HTTP).",
    )
    group.add_argument(
        "--cache-dir",
        type=Path,
        metavar="DIR",
        help="Folder for converted weights and measured costs (default: $DSPARK_CACHE_DIR, else ~/.cache/dspark).",
    )


def _add_chat_arguments(group: Any) -> None:
    group.add_argument(
        "--tool-call-parser",
        choices=("auto", "hermes", "llama3_json", "mistral"),
        default="auto",
        help="How the model writes tool calls; auto is what its chat template shows (default: auto).",
    )
    group.add_argument(
        "--reasoning-parser",
        choices=("auto", "think", "none"),
        default="auto",
        help="think puts <think>...</think> into reasoning_content; auto does where the chat template knows the tag "
        "(default: auto).",
    )
    group.add_argument(
        "--chat-template-kwargs",
        type=_names,
        default=("enable_thinking", "thinking"),
        metavar="NAMES",
        help="Variables of the chat template that requests may set in chat_template_kwargs, separated by commas "
        "(default: enable_thinking,thinking).",
    )


def _add_batching_arguments(group: Any) -> None:
    group.add_argument(
        "--max-model-len",
        type=_positive,
        metavar="TOKENS",
        help="Prompt and output tokens of one sequence (default: the model's own limit).",
    )
    group.add_argument(
        "--max-num-seqs", type=_positive, default=64, metavar="N", help="Sequences in one batch (default: 64)."
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=_positive,
        default=512,
        metavar="TOKENS",
        help="Tokens of one target pass: running sequences, then prompts, then drafts (default: 512).",
    )
    group.add_argument(
        "--max-queued-requests",
        type=_positive,
        default=256,
        metavar="N",
        help="Requests that may wait; further ones are refused with 429 (default: 256).",
    )
    group.add_argument(
        "--max-queued-tokens",
        type=_positive,
        default=262_144,
        metavar="TOKENS",
        help="Prompt tokens of the requests that may wait; further ones are refused with 429 (default: 262144).",
    )
    group.add_argument(
        "--stall-timeout",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="With work to do and no step ended for so long, /health/live turns 503 (default: 60).",
    )
    group.add_argument(
        "--lag",
        type=int,
        choices=(0, 1),
        help="Steps that may be unfinished while the next one is planned. 1 keeps a device from waiting for the host; on a "
        "CPU it gains nothing and is for tests (default: 1 on cuda, else 0).",
    )
    group.add_argument(
        "--kv-cache-memory",
        type=_size,
        metavar="SIZE",
        help="Memory for keys and values, e.g. 512M or 2GiB (default: a quarter of the free memory, at most 4G).",
    )


def _add_speculation_arguments(group: Any) -> None:
    group.add_argument(
        "--drafter",
        default="auto",
        help="auto (the one shipped for the model, else lookup), lookup, or a folder: a DSpark, DFlash or Eagle3 "
        "checkpoint, or a small model with the same vocabulary (default: auto).",
    )
    group.add_argument(
        "--no-lookup",
        action="store_true",
        help="Draft with the model drafter alone, never by looking up repeated text (default: both, where that is "
        "lossless).",
    )
    group.add_argument(
        "--speculation",
        choices=("adaptive", "fixed", "off"),
        default="adaptive",
        help="adaptive drafts as much as the load makes worth while, fixed always drafts the whole block "
        "(default: adaptive).",
    )
    group.add_argument(
        "--num-speculative-tokens",
        type=_positive,
        metavar="N",
        help="Longest draft (default: what the drafter was trained for; 7 for lookup).",
    )
    group.add_argument(
        "--verification",
        choices=("coupled", "rejection"),
        default="coupled",
        help="coupled gives the same text with any drafter and any load, rejection samples as in the DSpark paper "
        "(default: coupled).",
    )


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"should be a whole number of at least 1, but is {text!r}")
    return int(text)


def _port(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"should be 0..65535, but is {text!r}")
    return int(text)


def _origins(text: str) -> tuple[str, ...]:
    origins = tuple(origin.strip() for origin in text.split(","))
    for origin in origins:
        if not re.fullmatch(r"\*|https?://[^/\s?#@*]+", origin):
            raise argparse.ArgumentTypeError(f"should be origins such as https://example.org, or *, but has {origin!r}")
    return origins


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"should be seconds of at least 0, but is {text!r}")
    return float(text)


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise argparse.ArgumentTypeError("should be more than 0 seconds")
    return seconds


def _amount(text: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", text):
        raise argparse.ArgumentTypeError(f"should be a number of at least 0, but is {text!r}")
    return float(text)


def _currency(text: str) -> str:
    if not re.fullmatch(r"[A-Z]{3}", text):
        raise argparse.ArgumentTypeError(f"should be three capital letters such as USD, but is {text!r}")
    return text


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    wrong = next((name for name in names if not name.isidentifier() or name in TEMPLATE_OWN), None)
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"should be names of template variables, but one is {wrong!r}")
    return names


def _size(text: str) -> int:
    """Bytes; K, M, G and T count in 1024s, with or without `B` or `iB`."""
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _SIZE_UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"should be a size such as 512M or 2GiB, but is {text!r}")
    return size


def serve(options: argparse.Namespace) -> int:
    """Bind, load, serve, drain. A second server on the port is found out before any weights are read."""
    logging.basicConfig(level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # httpx, which the hub client uses, logs every request at info
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if options.metrics_host and options.metrics_port is None:
        fail("dspark serve: --metrics-host: it is the address of --metrics-port, which is not given")
    keys = api_keys(options.api_key, os.environ.get("DSPARK_API_KEY", ""))
    # until it serves, nothing is to be drained, and as process 1 of a container this one would not even see the signal
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with ExitStack() as sockets:
        listener = sockets.enter_context(listen(options.host, options.port))
        metrics_listener = metrics_port = None
        if options.metrics_port is not None:
            metrics_host = options.metrics_host or options.host
            metrics_listener = sockets.enter_context(listen(metrics_host, options.metrics_port, "--metrics-port"))
            metrics_port = metrics_listener.getsockname()[1]
        set_threading_environment(options.threads)
        from dspark.engine import ConfigError

        try:
            service = load_service(options, keys, metrics_port)
        except ConfigError as error:
            flag = "--" + error.field.replace("_", "-")
            fail(f"dspark serve: {flag}: {str(error).removeprefix(f'{error.field}: ')}")
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED
        return run(service, listener, options, metrics_listener)


def api_keys(given: Sequence[str], from_environment: str) -> tuple[str, ...]:
    keys = [key.strip() for value in (given or [from_environment]) for key in value.split(",")]
    return tuple(key for key in keys if key)


def listen(host: str, port: int, flag: str = "--port") -> socket.socket:
    """A listening socket. Clients that come while the weights load wait; a second server is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        fail(f"dspark serve: cannot listen on {host} port {port}: {error.strerror or error}; choose another {flag}")
    return listener


def set_threading_environment(threads: int | None) -> None:
    """OpenMP reads these once, when torch is imported. Threads that spin while they wait starve the event loop."""
    count = str(threads or max(1, len(os.sched_getaffinity(0)) - 1))
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["OMP_NUM_THREADS"] = count
    os.environ["MKL_NUM_THREADS"] = count
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    sys.setswitchinterval(SWITCH_INTERVAL_S)


def load_service(options: argparse.Namespace, keys: tuple[str, ...], metrics_port: int | None) -> Service:
    """Raises ConfigError."""
    from dspark.engine import Engine, locate_model
    from dspark.server.auth import read_keys
    from dspark.server.deadlines import TimeoutLimits
    from dspark.server.idempotency import IdempotencySettings
    from dspark.server.prompts import ChatSettings
    from dspark.server.reply_store import StoreLimits
    from dspark.server.service import ServerSettings, Service
    from dspark.server.sse import StreamSettings
    from dspark.server.text import ModelText

    config = engine_config(options)
    if options.api_keys_file is not None:
        read_keys(options.api_keys_file)  # what is wrong with it is told before the weights are read
    with ProgressBars() as progress:
        files = locate_model(config.model, config.cache_dir, progress)
        text = ModelText.load(files.folder)
        engine = Engine.load(config, progress)
    settings = ServerSettings(
        options.served_model_name or files.name,
        keys,
        hourly_cost=options.hourly_cost,
        currency=options.currency,
        api_keys_file=options.api_keys_file,
        cors_origins=options.cors_origins,
        metrics_port=metrics_port,
        timeouts=TimeoutLimits(options.request_timeout, options.max_request_timeout),
        streams=StreamSettings(options.sse_keep_alive, options.slow_reader_timeout),
        idempotency=IdempotencySettings(
            options.idempotency_store,
            StoreLimits(options.idempotency_ttl, options.idempotency_max_entries, options.idempotency_max_size),
            options.idempotency_grace,
        ),
        chat=ChatSettings(options.tool_call_parser, options.reasoning_parser, frozenset(options.chat_template_kwargs)),
    )
    return Service(engine, text, settings)


def engine_config(options: argparse.Namespace) -> EngineConfig:
    from dspark.engine import EngineConfig

    return EngineConfig(
        model=options.model,
        drafter=options.drafter,
        lookup=False if options.no_lookup else None,
        device=options.device,
        dtype=options.dtype,
        threads=options.threads,
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        kv_cache_bytes=options.kv_cache_memory,
        max_queued_requests=options.max_queued_requests,
        max_queued_tokens=options.max_queued_tokens,
        stall_timeout_s=options.stall_timeout,
        lag=options.lag,
        num_speculative_tokens=options.num_speculative_tokens,
        speculation=options.speculation,
        verification=options.verification,
        cache_dir=options.cache_dir,
    )


class ProgressBars:
    """One tqdm bar per phase of loading, on a terminal only: called with (phase, done, total)."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._phase = ""

    def __enter__(self) -> Callable[[str, int, int], None]:
        return self.show

    def __exit__(self, *_: object) -> None:
        self._close()

    def show(self, phase: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if phase != self._phase:
            self._close()
            self._phase = phase
            self._bar = tqdm(total=total, desc=phase, unit="", leave=False, file=sys.stderr, disable=None)
        self._bar.update(done - self._bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def run(
    service: Service,
    listener: socket.socket,
    options: argparse.Namespace,
    metrics_listener: socket.socket | None = None,
) -> int:
    """Serve until a signal has drained the server; 0 when it went down in order."""
    import uvicorn

    from dspark.server.app import create_app
    from dspark.server.connection import KEEP_ALIVE_S, MAX_HEADER_BYTES, BoundedConnection
    from dspark.server.draining_server import DrainingServer

    config = uvicorn.Config(
        create_app(service),
        loop="asyncio",
        http=BoundedConnection,
        ws="none",
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        lifespan="on",
        log_config=None,
        log_level=max(logging.WARNING, logging.getLevelName(options.log_level.upper())),
        access_log=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LINGER_S,
    )
    host, port = listener.getsockname()[:2]
    if sys.platform == "linux":
        # the server lets go of a slow reader; what it never took lies in the connection, which the kernel then ends
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(options.slow_reader_timeout * 1000))

    def ready() -> None:
        print(ready_message(service.engine.info, service.settings.served_model_name, host, port), flush=True)
        if metrics_listener is not None:
            print("  metrics on {}, port {}".format(*metrics_listener.getsockname()[:2]), flush=True)

    sockets = [listener] if metrics_listener is None else [listener, metrics_listener]
    DrainingServer(config, service, options.drain_timeout, ready).run(sockets)
    if service.engine.hung:
        logging.getLogger(__name__).critical("A step of the engine never ended; leaving without it")
        os._exit(EXIT_HUNG)  # the interpreter would wait for its thread
    return 0


def ready_message(info: EngineInfo, model_name: str, host: str, port: int) -> str:
    """One line of what was started, and a request to try."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://[{shown}]:{port}" if ":" in shown else f"http://{shown}:{port}"
    tokens = info.num_blocks * info.block_size
    line = (
        f"Serving {model_name} at {url}  drafter {info.drafter_name}, "
        f"{info.dtype} on {info.device} ({info.kernels} kernels), "
        f"{info.threads} thread{'s' if info.threads > 1 else ''}, "
        f"KV {info.kv_cache_bytes / 2**20:.0f} MiB = {tokens} tokens"
    )
    body = json.dumps(
        {"model": model_name, "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    )
    return f"{line}\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'"

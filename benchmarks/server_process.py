"""A server as a child process: started, waited for, stopped."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

START_TIMEOUT_S = 300.0


class StartError(Exception):
    """The server did not become healthy; the message has the end of its output."""


@contextlib.contextmanager
def running(name: str, command: Sequence[str], port: int, threads: int) -> Iterator[str]:
    """Start a server, wait until it is healthy, give its URL; stop it at the end. Raises StartError."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
    }
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            if not _becomes_healthy(process, url):
                output.seek(0)
                raise StartError(f"{name} did not start: {' '.join(command)}\n{output.read()[-3000:]}")
            yield url
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def given_or_started(url: str | None, threads: int) -> Iterator[str]:
    """The URL of the server that is to be measured: the given one, else `dspark serve` with its defaults, started here."""
    if url is not None:
        yield url
        return
    port = free_port()
    command = [str(Path(sys.executable).with_name("dspark")), "serve", "--port", str(port), "--threads", str(threads)]
    with running("dspark", command, port, threads) as started:
        yield started


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _becomes_healthy(process: subprocess.Popen[bytes], url: str) -> bool:
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_s:
        try:
            if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == 200:
                return True
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    return False

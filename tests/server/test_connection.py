"""What a connection may send before there is a request, and how long it may take; on a real socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from http_server import MODEL, run_service, says

from dspark.server.connection import MAX_HEADER_BYTES, BoundedConnection
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText


class Impatient(BoundedConnection):
    header_timeout_s = 0.3
    body_timeout_s = 0.3


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Of a server that waits 0.3 s for headers and for bodies."""
    service = Service(FakeEngine(says(folder, "ok")), ModelText.load(folder), ServerSettings(MODEL))
    with run_service(service, connection=Impatient) as url:
        yield int(url.rpartition(":")[2])


@pytest.fixture
def client(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        yield connection


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def status_and_error(answer: bytes) -> tuple[int, dict[str, str]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"x-request-id: " in head
    return int(head.split()[1]), json.loads(body)["error"]


def request_with_headers_of(size: int) -> bytes:
    """A request for the state of the server, `size` bytes long."""
    start, end = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\npadding: ", b"\r\n\r\n"
    return start + b"p" * (size - len(start) - len(end)) + end


def test_headers_up_to_the_limit_are_read(client: socket.socket) -> None:
    client.sendall(request_with_headers_of(MAX_HEADER_BYTES))
    assert read_to_end(client).startswith(b"HTTP/1.1 200 ")


def test_more_headers_are_a_431_that_says_the_limit(client: socket.socket) -> None:
    client.sendall(request_with_headers_of(2 * MAX_HEADER_BYTES)[:-4])
    status, error = status_and_error(read_to_end(client))
    assert (status, error["code"]) == (431, "headers_too_large")
    assert str(MAX_HEADER_BYTES) in error["message"]


def test_what_is_not_http_is_a_400_in_openais_shape(client: socket.socket) -> None:
    client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
    status, error = status_and_error(read_to_end(client))
    assert (status, error["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nhost: x\r\n"])
def test_headers_that_do_not_end_are_a_408(client: socket.socket, sent: bytes) -> None:
    client.sendall(sent)
    status, error = status_and_error(read_to_end(client))
    assert (status, error["code"]) == (408, "request_timeout")
    assert "0.3 s" in error["message"]


def test_more_bytes_do_not_buy_more_time(client: socket.socket) -> None:
    client.settimeout(0.05)
    client.sendall(b"GET /health HTTP/1.1\r\n")
    answer = b""
    for _ in range(200):
        try:
            answer += client.recv(65536)
            break
        except TimeoutError:
            client.sendall(b"slow: loris\r\n")
    assert answer.startswith(b"HTTP/1.1 408 ")


def test_a_body_that_does_not_end_is_dropped(client: socket.socket) -> None:
    client.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
    assert read_to_end(client) == b""


def test_a_later_request_on_the_connection_has_its_own_limit(client: socket.socket) -> None:
    client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    client.sendall(b"GET /health HTTP/1.1\r\n")
    assert status_and_error(read_to_end(client))[0] == 408


def test_a_request_sent_behind_another_is_limited_too(client: socket.socket) -> None:
    unfinished = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
    client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n" + unfinished)
    answer = read_to_end(client)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_an_answer_may_take_longer_than_a_request(folder: Path) -> None:
    engine = FakeEngine(says(folder, "ok"))
    engine.paused = True
    service = Service(engine, ModelText.load(folder), ServerSettings(MODEL))
    with run_service(service, connection=Impatient) as url:
        body = json.dumps({"model": MODEL, "prompt": "Hi"}).encode()
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=20) as client:
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
            client.sendall(head.encode() + body)
            client.settimeout(3 * Impatient.body_timeout_s)
            with pytest.raises(TimeoutError):
                client.recv(1)
            engine.paused = False
            client.settimeout(20)
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")

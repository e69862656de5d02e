"""Retries after a server was killed, and between replicas: real processes, a tiny model, a real Redis."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import write_tiny_model

from dspark.server.metrics import IdempotencyMetrics
from dspark.server.recording import Reply
from dspark.server.redis_store import LEASE_S, RedisStore
from dspark.server.reply_store import ClaimState, StoreError, StoreLimits

DSPARK = Path(sys.executable).parent / "dspark"
BODY: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "abc"}],
    "max_tokens": 400,
    "ignore_eos": True,
}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def start(model_folder: Path, tmp_path: Path) -> Iterator[Callable[[str], Replica]]:
    """Starts servers with a given store; they are killed at the end."""
    replicas: list[Replica] = []

    def start(store: str) -> Replica:
        flags = f"--model {model_folder} --served-model-name tiny --port 0 --kv-cache-memory 4M --dtype float32"
        more = f"--threads 1 --cache-dir {tmp_path} --log-level warning --idempotency-store {store}"
        more += " --max-num-seqs 8 --max-num-batched-tokens 32"
        process = subprocess.Popen(
            [str(DSPARK), "serve", *flags.split(), *more.split()], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        ready = process.stdout.readline()
        url = re.search(r"http://[\d.]+:\d+", ready)
        assert url is not None, ready
        replicas.append(Replica(process, httpx.Client(base_url=url[0], timeout=60)))
        return replicas[-1]

    yield start
    for replica in replicas:
        replica.kill()


@dataclass
class Replica:
    process: subprocess.Popen[str]
    http: httpx.Client

    def post(self, key: str, **fields: Any) -> httpx.Response:
        return self.http.post("/v1/chat/completions", json=BODY | fields, headers={"Idempotency-Key": key})

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def total(self, name: str) -> float:
        families = text_string_to_metric_families(self.http.get("/metrics").text)
        return sum(s.value for family in families for s in family.samples if s.name == f"dspark_{name}")

    def killed_in_mid_stream(self, key: str) -> list[dict[str, Any]]:
        """The chunks a client has when the server is killed (-9) while it streams."""
        lines: list[str] = []
        request = self.http.build_request(
            "POST", "/v1/chat/completions", json=BODY | {"stream": True}, headers={"Idempotency-Key": key}
        )
        with suppress(httpx.TransportError), closing(self.http.send(request, stream=True)) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 60:
                    self.kill()
        assert "data: [DONE]" not in lines
        return chunks("\n".join(lines))


def chunks(body: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: {")]
    return [json.loads(line) for line in lines if line.endswith("}")]


def text(sent: list[dict[str, Any]]) -> str:
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in sent)


def identities(sent: list[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(chunk["id"], chunk["created"]) for chunk in sent}


def test_after_a_kill_in_mid_stream_a_retry_has_the_same_text_and_ids(
    start: Callable[[str], Replica], tmp_path: Path
) -> None:
    store = f"sqlite:{tmp_path / 'replies.db'}"
    received = start(store).killed_in_mid_stream("k")
    assert len(text(received)) > 10
    server = start(store)
    again = server.post("k", stream=True)
    assert again.status_code == 200
    assert "idempotency-replayed" not in again.headers
    whole = chunks(again.text)
    assert text(whole).startswith(text(received))
    assert len(text(whole)) > len(text(received))
    assert identities(whole) == identities(received)
    assert server.post("k", stream=True).content == again.content
    # temperature 1 without a seed: another key is another text
    assert text(chunks(server.post("other", stream=True).text)) != text(whole)


@pytest.mark.slow
def test_what_was_answered_before_a_kill_is_replayed_after_it(start: Callable[[str], Replica], tmp_path: Path) -> None:
    store = f"sqlite:{tmp_path / 'replies.db'}"
    server = start(store)
    answer = server.post("k", stream=True)
    assert answer.status_code == 200
    server.kill()
    replay = start(store).post("k", stream=True)
    assert (replay.content, replay.headers["idempotency-replayed"]) == (answer.content, "true")


# Redis


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of an empty one that listens on a socket in `folder`."""
    path = folder / "redis.sock"
    process = subprocess.Popen(
        ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
    )
    deadline_s = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline_s:
        time.sleep(0.01)
    try:
        yield f"unix://{path}"
    finally:
        process.kill()
        process.wait()
        path.unlink(missing_ok=True)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[str]:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server (Debian package of that name)")
    with redis_server(tmp_path) as url:
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_hundred_duplicates_on_two_replicas_are_one_generation(
    start: Callable[[str], Replica], redis: str, stream: bool
) -> None:
    replicas = [start(redis), start(redis)]
    with ThreadPoolExecutor(100) as pool:
        asked = [pool.submit(replicas[number % 2].post, "k", stream=stream) for number in range(100)]
        answers = [answer.result() for answer in asked]
    assert sum(replica.total("requests_admitted_total") for replica in replicas) == 1
    done = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len({answer.content for answer in done}) == 1
    assert {answer.status_code for answer in refused} <= {409}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len(done) >= 50
    for replica in replicas:
        replay = replica.post("k", stream=stream)
        assert (replay.content, replay.headers["idempotency-replayed"]) == (done[0].content, "true")
        assert replica.post("k", stream=stream, temperature=0.5).status_code == 422


@pytest.mark.slow
def test_when_a_replica_dies_another_one_gives_the_same_text_and_ids(
    start: Callable[[str], Replica], redis: str
) -> None:
    first, second = start(redis), start(redis)
    received = first.killed_in_mid_stream("k")
    assert second.post("k", stream=True).status_code == 409
    deadline_s = time.monotonic() + 3 * LEASE_S
    while (again := second.post("k", stream=True)).status_code == 409 and time.monotonic() < deadline_s:
        time.sleep(0.5)
    whole = chunks(again.text)
    assert text(whole).startswith(text(received))
    assert identities(whole) == identities(received)


@pytest.mark.slow
def test_without_redis_keyed_requests_are_refused_before_any_work(
    start: Callable[[str], Replica], tmp_path: Path
) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("there is no redis-server (Debian package of that name)")
    server = start(f"unix://{tmp_path / 'redis.sock'}")
    refused = server.post("k")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "idempotency_store_unavailable")
    assert server.total("requests_admitted_total") == 0
    assert server.http.post("/v1/chat/completions", json=BODY | {"max_tokens": 3}).status_code == 200
    with redis_server(tmp_path):
        first = server.post("k")
        assert server.post("k").content == first.content


@pytest.mark.slow
def test_a_lease_is_renewed_while_its_holder_lives_and_runs_out_when_it_does_not(redis: str) -> None:
    async def play() -> None:
        metrics = IdempotencyMetrics(CollectorRegistry())
        one, two = (RedisStore(redis, StoreLimits(), metrics, lease_s=0.6) for _ in range(2))
        claim = await one.claim(b"name", b"body")
        assert claim.state is ClaimState.NEW
        await asyncio.sleep(1.5)
        assert (await two.claim(b"name", b"body")).state is ClaimState.HELD
        assert (await two.claim(b"name", b"other")).fingerprint == b"body"
        await one.close()  # renews no more, as if it were dead
        await asyncio.sleep(1)
        assert (await two.claim(b"name", b"other")).state is ClaimState.HELD
        taken = await two.claim(b"name", b"body")
        assert (taken.state, taken.created_unix_s) == (ClaimState.NEW, claim.created_unix_s)
        # the dead one comes back: its late answer does not replace what the other holds
        late = RedisStore(redis, StoreLimits(), metrics)
        late._tokens[b"name"] = "lost"
        await late.keep(b"name", claim, Reply("late", ["late"]))
        await two.keep(b"name", taken, Reply("run", ["ä", "b"]))
        assert (await late.claim(b"name", b"body")).reply == Reply("run", ["ä", "b"])
        small = RedisStore(redis, StoreLimits(max_bytes=10), metrics)
        assert (await small.claim(b"too large", b"body")).state is ClaimState.NEW
        await small.keep(b"too large", claim, Reply("run", ["a" * 100]))
        assert (await two.claim(b"too large", b"body")).state is ClaimState.NEW
        await two.release(b"too large")
        for store in (two, late, small):
            await store.close()

    asyncio.run(play())


@pytest.mark.slow
def test_a_redis_that_is_full_refuses_the_claim(redis: str) -> None:
    async def play() -> None:
        store = RedisStore(redis, StoreLimits(), IdempotencyMetrics(CollectorRegistry()))
        await store._redis.config_set("maxmemory", 1)
        with pytest.raises(StoreError, match="maxmemory"):
            await store.claim(b"name", b"body")
        await store.close()

    asyncio.run(play())

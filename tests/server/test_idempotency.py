"""Requests with an Idempotency-Key: computed once, joined while they run, replayed when they are done."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engine import Script, tiny_info
from http_server import MODEL, RunningServer, says
from http_server import serve as serve_with
from prometheus_client import CollectorRegistry

from dspark.engine import ConfigError, Request
from dspark.server.idempotency import IdempotencySettings, body_fingerprint
from dspark.server.metrics import IdempotencyMetrics
from dspark.server.recording import Reply
from dspark.server.reply_store import ClaimState, SqliteStore, StoreLimits
from dspark.server.sse import StreamSettings

TEXT = "Hello, wörld 😀!"
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}
ENDLESS = {"info": tiny_info(max_model_len=10**9)}
# a stream is then its events alone, however slow this machine is
serve = partial(serve_with, streams=StreamSettings(keep_alive_s=3600))


def post(
    server: RunningServer, key: str, body: dict[str, Any] = CHAT, path: str = "/v1/chat/completions", **headers: str
) -> httpx.Response:
    return server.http.post(path, json=body, headers={"Idempotency-Key": key} | headers)


def metric(server: RunningServer, name: str, **labels: str) -> float:
    value = server.service.metrics.registry.get_sample_value(f"dspark_{name}", labels)
    assert value is not None, name
    return value


def results(server: RunningServer) -> dict[str, float]:
    """How many keyed requests had which result, zeros left out."""
    names = ("new", "replay", "join", "conflict", "expired", "store_error")
    counts = {name: metric(server, "idempotency_requests_total", result=name) for name in names}
    return {name: count for name, count in counts.items() if count}


def eventually(condition: Callable[[], bool]) -> bool:
    deadline_s = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline_s:
        time.sleep(0.002)
    return condition()


def endless(request: Request, index: int) -> Iterator[tuple[int, ...]]:
    return ((75,) for _ in itertools.count())


def check_every_request_is_counted_once(server: RunningServer) -> None:
    totals: dict[str, float] = {}
    for family in server.service.metrics.registry.collect():
        totals[family.name] = sum(sample.value for sample in family.samples if sample.name.endswith("_total"))
    repeated = sum(
        metric(server, "requests_total", model=MODEL, endpoint=endpoint, outcome=outcome)
        for endpoint in ("chat_completions", "completions")
        for outcome in ("join", "replay")
    )
    expected = totals["dspark_requests_admitted"] + totals["dspark_requests_shed"] + repeated
    assert totals["dspark_requests"] == expected


@pytest.fixture(params=["memory", "sqlite"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return "memory" if request.param == "memory" else f"sqlite:{tmp_path / 'replies.db'}"


@pytest.fixture
def server(folder: Path, store: str) -> Iterator[RunningServer]:
    with serve(folder, says(folder, TEXT, batch=3), idempotency=IdempotencySettings(store)) as running:
        yield running


# replay


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "asked"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": "Hi"})])
def test_a_finished_request_is_replayed_byte_for_byte(
    server: RunningServer, path: str, asked: dict[str, Any], stream: bool
) -> None:
    body = {"model": MODEL, "stream": stream} | asked
    first = post(server, "k", body, path)
    again = post(server, "k", body, path)
    assert first.status_code == again.status_code == 200
    assert again.content == first.content
    assert again.headers["content-type"] == first.headers["content-type"]
    assert "idempotency-replayed" not in first.headers
    assert again.headers["idempotency-replayed"] == "true"
    assert len(server.engine.submitted) == 1
    assert results(server) == {"new": 1, "replay": 1}
    assert metric(server, "idempotency_entries", state="done") == 1
    check_every_request_is_counted_once(server)


def test_without_a_key_every_request_is_computed(server: RunningServer) -> None:
    assert server.chat().json()["id"] != server.chat().json()["id"]
    assert len(server.engine.submitted) == 2
    assert results(server) == {}


def test_a_quoted_key_is_the_same_key(server: RunningServer) -> None:
    first = post(server, 'a"b')
    assert post(server, '"a\\"b"').content == first.content
    assert len(server.engine.submitted) == 1


@pytest.mark.parametrize(
    "key", ["", '""', "k" * 256, '"' + "k" * 256 + '"', '"unclosed', '"a" "b"', '"a";b=1', "tab\tkey", "é"]
)
def test_a_key_that_is_none_is_refused(server: RunningServer, key: str) -> None:
    headers = [("Idempotency-Key", key.encode("latin-1"))]
    response = server.http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "Idempotency-Key"
    assert server.engine.submitted == []


def test_the_longest_key_works_and_two_are_refused(server: RunningServer) -> None:
    assert post(server, "k" * 255).status_code == 200
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "a")]
    assert server.http.post("/v1/chat/completions", json=CHAT, headers=twice).status_code == 400


# which requests are the same


def test_the_order_of_keys_white_space_and_ways_to_write_a_number_do_not_matter(server: RunningServer) -> None:
    ways = [
        f'{{"model":"{MODEL}","temperature":1,"messages":[{{"role":"user","content":"Hi"}}]}}',
        f'{{ "messages": [{{"content": "H\\u0069", "role": "user"}}],\n "temperature": 1.0, "model": "{MODEL}" }}',
        f'{{"temperature":10e-1,"model":"{MODEL}","messages":[{{"role":"user","content":"Hi"}}]}}',
    ]
    headers = {"Idempotency-Key": "k", "content-type": "application/json"}
    answers = [server.http.post("/v1/chat/completions", content=way, headers=headers) for way in ways]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert len({answer.content for answer in answers}) == 1
    assert len(server.engine.submitted) == 1


def test_numbers_that_a_double_cannot_hold_are_told_apart() -> None:
    bodies = [b'{"seed": 9007199254740992}', b'{"seed": 9007199254740993}', b'{"user": %s}' % (b"1" * 6000)]
    assert len({body_fingerprint(body) for body in bodies}) == 3
    assert body_fingerprint(b'{"seed": -0.0}') == body_fingerprint(b'{"seed": 0}')


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"stream": True}, {"user": "somebody"}])
def test_another_body_under_the_same_key_is_a_422(server: RunningServer, change: dict[str, Any]) -> None:
    first = post(server, "k")
    refused = post(server, "k", CHAT | change)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (422, "idempotency_key_reused")
    assert (error["type"], error["param"]) == ("invalid_request_error", "Idempotency-Key")
    assert post(server, "k").content == first.content
    assert results(server) == {"new": 1, "conflict": 1, "replay": 1}


def test_keys_belong_to_an_endpoint(server: RunningServer) -> None:
    post(server, "k")
    assert post(server, "k", {"model": MODEL, "prompt": "Hi"}, "/v1/completions").json()["object"] == "text_completion"
    assert len(server.engine.submitted) == 2


def test_tenants_never_see_each_others_answers(folder: Path, store: str) -> None:
    with serve(folder, says(folder, TEXT), api_keys=("alice", "bob"), idempotency=IdempotencySettings(store)) as server:
        answers = [post(server, "k", authorization=f"Bearer {who}") for who in ("alice", "bob", "alice")]
        assert len({answer.json()["id"] for answer in answers}) == 2
        assert answers[2].content == answers[0].content
        assert len(server.engine.submitted) == 2
        # not even whether the key exists: another body under it is no conflict to the other tenant
        assert post(server, "k2", authorization="Bearer alice").status_code == 200
        assert post(server, "k2", CHAT | {"n": 2}, authorization="Bearer bob").status_code == 200


# identity


def test_ids_and_seed_follow_from_tenant_and_key(folder: Path) -> None:
    seen = []
    for _ in range(2):
        with serve(folder, says(folder, TEXT)) as server:
            answer = post(server, "k").json()
            seen.append((answer["id"], server.engine.submitted[0].sampling.seed))
            assert answer["id"] != post(server, "other").json()["id"]
            post(server, "seeded", CHAT | {"seed": 7})
            assert server.engine.submitted[2].sampling.seed == 7
    assert seen[0] == seen[1]
    assert seen[0][1] is not None


# running requests


@pytest.mark.parametrize("stream", [False, True])
def test_a_hundred_duplicates_at_once_are_one_generation(server: RunningServer, stream: bool) -> None:
    server.engine.paused = True
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(post, server, "k", CHAT | {"stream": stream}) for _ in range(100)]
        assert eventually(lambda: sum(results(server).values()) == 100)
        server.engine.paused = False
        contents = {answer.result().content for answer in answers}
    assert len(contents) == 1
    assert TEXT in joined_text(contents.pop().decode(), stream)
    assert len(server.engine.submitted) == 1
    assert results(server) == {"new": 1, "join": 99}
    check_every_request_is_counted_once(server)


def joined_text(body: str, stream: bool) -> str:
    if not stream:
        return json.loads(body)["choices"][0]["message"]["content"]
    data = [line.removeprefix("data: ") for line in body.split("\n") if line.startswith("data: {")]
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in data)


def test_who_joins_a_stream_has_it_from_its_start_and_then_live(folder: Path) -> None:
    with serve(folder, endless, **ENDLESS) as server:
        body = CHAT | {"stream": True, "max_tokens": 50}
        server.engine.script = pausing(server, says(folder, "a" * 40))
        with stream(server, "k", body) as first, stream(server, "k", body) as second:
            early, late = first.iter_lines(), second.iter_lines()
            assert [next(early) for _ in range(BEGUN)] == [next(late) for _ in range(BEGUN)]
            server.engine.paused = False
            assert list(early) == list(late)
        assert results(server) == {"new": 1, "join": 1}
        assert eventually(lambda: metric(server, "stream_clients", model=MODEL) == 0)


def stream(server: RunningServer, key: str, body: dict[str, Any], **headers: str) -> Any:
    return server.http.stream("POST", "/v1/chat/completions", json=body, headers={"Idempotency-Key": key} | headers)


BEGUN = 3 * 22
"""Lines of a stream that `pausing` has paused: the role and 21 tokens, three lines each."""


def pausing(server: RunningServer, script: Script) -> Script:
    """The script, with the engine paused after 21 tokens."""

    def paused(request: Request, index: int) -> Iterator[tuple[int, ...]]:
        for position, batch in enumerate(script(request, index)):
            server.engine.paused = server.engine.paused or position == 20
            yield batch

    return paused


def test_a_joiner_of_what_fails_gets_the_same_error_and_a_retry_starts_anew(server: RunningServer) -> None:
    server.engine.paused = True
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(post, server, "k") for _ in range(2)]
        assert eventually(lambda: results(server) == {"new": 1, "join": 1})
        server.engine.failure = RuntimeError("boom")
        server.engine.paused = False
        failed = [answer.result() for answer in answers]
    assert [answer.status_code for answer in failed] == [500, 500]
    assert failed[0].content == failed[1].content
    assert metric(server, "idempotency_entries", state="done") == 0
    assert metric(server, "idempotency_entries", state="in_progress") == 0
    assert post(server, "k").status_code == 500
    assert results(server)["new"] == 2


def test_what_is_refused_before_work_is_not_stored(folder: Path, store: str) -> None:
    with serve(folder, says(folder, TEXT), max_queued=1, idempotency=IdempotencySettings(store)) as server:
        assert post(server, "long", CHAT | {"max_tokens": 10_000}).status_code == 400
        assert post(server, "long").status_code == 200  # the key is as good as new, for any body
        server.engine.paused = True
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.chat)
            assert eventually(lambda: server.engine.gauges().requests_waiting == 1)
            assert post(server, "busy").status_code == 429
            server.engine.paused = False
            waiting.result()
        assert post(server, "busy", CHAT | {"n": 2}).status_code == 200
        assert metric(server, "idempotency_entries", state="done") == 2
        check_every_request_is_counted_once(server)


def test_keys_are_looked_at_after_authentication_and_body(folder: Path) -> None:
    with serve(folder, says(folder, TEXT), api_keys=("alice",)) as server:
        assert post(server, "", {}).status_code == 401
        assert post(server, "", {}, authorization="Bearer alice").json()["error"]["param"] == "model"
        assert post(server, "", CHAT | {"model": "none"}, authorization="Bearer alice").status_code == 404
        assert post(server, "", authorization="Bearer alice").json()["error"]["param"] == "Idempotency-Key"
        assert results(server) == {}


# callers that go away


@pytest.mark.parametrize("streams", [False, True])
def test_a_generation_goes_on_without_its_caller(folder: Path, streams: bool) -> None:
    with serve(folder, says(folder, TEXT)) as server:
        server.engine.paused = True
        body = CHAT | {"stream": streams}
        with httpx.Client(base_url=server.url) as client, pytest.raises(httpx.ReadTimeout):
            client.post(
                "/v1/chat/completions",
                json=body,
                headers={"Idempotency-Key": "k"},
                timeout=httpx.Timeout(5, read=0.2),
            )
        server.engine.paused = False
        assert eventually(lambda: metric(server, "idempotency_entries", state="done") == 1)
        again = post(server, "k", body)
        assert again.headers["idempotency-replayed"] == "true"
        assert joined_text(again.text, streams) == TEXT
        assert server.engine.aborted == []
        assert metric(server, "requests_total", model=MODEL, endpoint="chat_completions", outcome="stop") == 1


def test_after_the_grace_period_it_is_cancelled_and_the_key_is_free(folder: Path) -> None:
    with serve(folder, endless, **ENDLESS, idempotency=IdempotencySettings(grace_s=0.1)) as server:
        for rounds in (1, 2):
            with stream(server, "k", CHAT | {"stream": True}) as response:
                lines = response.iter_lines()
                next(lines)
                time.sleep(0.3)
                assert len(server.engine.aborted) == rounds - 1  # a listener holds it for longer
            assert eventually(lambda aborted=rounds: len(server.engine.aborted) == aborted)
            assert eventually(lambda: metric(server, "idempotency_entries", state="in_progress") == 0)
        assert results(server) == {"new": 2}
        assert metric(server, "requests_cancelled_total", model=MODEL, cause="client_disconnect") == 2


# resuming


def test_a_stream_resumes_after_any_of_its_events(server: RunningServer) -> None:
    body = CHAT | {"stream": True}
    whole = post(server, "k", body).text.split("\n\n")[:-1]
    ids = [event.split("\n")[0].removeprefix("id: ") for event in whole]
    assert len(set(ids)) == len(ids) > 5
    response_id = json.loads(whole[0].split("data: ")[1])["id"]
    assert all(event_id.startswith(f"{response_id}:") for event_id in ids)
    for position, event_id in enumerate(ids[:-1]):
        resumed = post(server, "k", body, **{"Last-Event-ID": event_id})
        assert resumed.text.split("\n\n")[:-1] == whole[position + 1 :]
    # what an EventSource takes for the end of its attempts
    assert post(server, "k", body, **{"Last-Event-ID": ids[-1]}).status_code == 204
    assert len(server.engine.submitted) == 1


def test_a_running_stream_resumes_and_follows_live(folder: Path) -> None:
    with serve(folder, endless, **ENDLESS) as server:
        body = CHAT | {"stream": True}
        server.engine.script = pausing(server, says(folder, "a" * 40))
        with stream(server, "k", body) as response:
            lines = response.iter_lines()
            begun = [next(lines) for _ in range(BEGUN)]
        last = [line.removeprefix("id: ") for line in begun if line.startswith("id: ")][-1]
        # a stream begins with its first event
        threading.Timer(0.2, setattr, (server.engine, "paused", False)).start()
        with stream(server, "k", body, **{"Last-Event-ID": last}) as response:
            rest = list(response.iter_lines())
        assert begun + rest == post(server, "k", body).text.split("\n")[: len(begun + rest)]
        assert rest[-2] == "data: [DONE]"
        assert results(server) == {"new": 1, "join": 1, "replay": 1}


def test_an_event_that_is_none_of_the_streams_is_refused_and_starts_nothing(server: RunningServer) -> None:
    body = CHAT | {"stream": True}
    ids = [line.removeprefix("id: ") for line in post(server, "k", body).text.split("\n") if line.startswith("id: ")]
    own, last = ids[0].rpartition(":")[0], len(ids) - 1
    other_run = f"{own[:-8]}00000000:0"
    for event_id in (f"{own}:{last + 1}", f"{own}:-1", f"{own}:x", other_run, "nonsense", "é"):
        response = server.http.post(
            "/v1/chat/completions",
            json=body,
            headers=[("Idempotency-Key", b"k"), ("Last-Event-ID", event_id.encode("latin-1"))],
        )
        assert (response.status_code, response.json()["error"]["param"]) == (400, "Last-Event-ID"), event_id
    assert post(server, "never used", body, **{"Last-Event-ID": ids[0]}).status_code == 400
    assert post(server, "k2", CHAT, **{"Last-Event-ID": ids[0]}).status_code == 400
    assert server.http.post("/v1/chat/completions", json=body, headers={"Last-Event-ID": ids[0]}).status_code == 400
    assert len(server.engine.submitted) == 1
    assert post(server, "never used", body).status_code == 200


# bounds and stores


def test_the_oldest_answers_make_room(folder: Path, store: str) -> None:
    limits = StoreLimits(max_entries=2)
    with serve(folder, says(folder, TEXT), idempotency=IdempotencySettings(store, limits)) as server:
        answers = {key: post(server, key).content for key in ("a", "b", "c")}
        assert post(server, "b").content == answers["b"]
        assert post(server, "c").content == answers["c"]
        assert results(server) == {"new": 3, "replay": 2}
        assert metric(server, "idempotency_evictions_total", reason="size") == 1
        assert metric(server, "idempotency_entries", state="done") == 2
        assert post(server, "a").status_code == 200
        assert results(server)["new"] == 4


def test_an_answer_too_large_is_served_and_not_kept(folder: Path, store: str) -> None:
    limits = StoreLimits(max_bytes=600)
    with serve(folder, says(folder, "a" * 500), idempotency=IdempotencySettings(store, limits)) as server:
        assert post(server, "k").json()["choices"][0]["message"]["content"] == "a" * 500
        assert metric(server, "idempotency_entries", state="done") == 0
        assert metric(server, "idempotency_evictions_total", reason="size") == 1
        assert "idempotency-replayed" not in post(server, "k").headers


def test_an_answer_too_old_is_computed_again(folder: Path, store: str) -> None:
    limits = StoreLimits(ttl_s=0.2)
    with serve(folder, says(folder, TEXT), idempotency=IdempotencySettings(store, limits)) as server:
        first = post(server, "k").json()
        time.sleep(0.3)
        again = post(server, "k")
        assert "idempotency-replayed" not in again.headers
        assert again.json()["id"] == first["id"]
        assert results(server) == {"new": 1, "expired": 1}
        assert metric(server, "idempotency_evictions_total", reason="ttl") == 1


def test_the_file_gives_answers_after_a_restart_and_holds_no_key(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "replies.db"
    settings = IdempotencySettings(f"sqlite:{path}")
    with serve(folder, says(folder, TEXT), api_keys=("alice",), idempotency=settings) as server:
        first = post(server, "my-secret-key", authorization="Bearer alice")
    assert path.stat().st_mode & 0o077 == 0
    assert b"my-secret-key" not in path.read_bytes()
    with serve(folder, says(folder, TEXT), api_keys=("alice",), idempotency=settings) as server:
        again = post(server, "my-secret-key", authorization="Bearer alice")
        assert again.content == first.content
        assert again.headers["idempotency-replayed"] == "true"
        assert server.engine.submitted == []


def test_a_file_belongs_to_one_server(folder: Path, tmp_path: Path) -> None:
    settings = IdempotencySettings(f"sqlite:{tmp_path / 'replies.db'}")
    with (
        serve(folder, says(folder, TEXT), idempotency=settings),
        pytest.raises(ConfigError, match="another server uses it"),
        serve(folder, says(folder, TEXT), idempotency=settings),
    ):
        pass


@pytest.mark.parametrize(
    "store", ["sqlite:", "file.db", "mysql://host", "sqlite:/none/such/replies.db", "redis://:x:y"]
)
def test_a_store_that_cannot_be_is_refused_at_start(folder: Path, store: str) -> None:
    with (
        pytest.raises(ConfigError, match="idempotency_store"),
        serve(folder, says(folder, TEXT), idempotency=IdempotencySettings(store)),
    ):
        pass


def test_a_full_disk_refuses_keyed_requests_before_any_work(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = IdempotencySettings(f"sqlite:{tmp_path / 'replies.db'}")
    with serve(folder, says(folder, "a" * 400), idempotency=settings) as server:
        database = server.service.idempotency._store._db
        pages = database.execute("PRAGMA page_count").fetchone()[0]
        database.execute(f"PRAGMA max_page_count = {pages}")
        with caplog.at_level(logging.ERROR):
            answers = [post(server, f"secret-{number}", CHAT | {"n": 4}) for number in range(60)]
        # the first ones still fit: those that were answered stay answered, the others were never begun
        refused = [answer for answer in answers if answer.status_code == 503]
        assert refused
        assert {answer.json()["error"]["code"] for answer in refused} == {"idempotency_store_unavailable"}
        assert all("retry-after" in answer.headers for answer in refused)
        assert len(server.engine.submitted) == len(answers) - len(refused)
        assert metric(server, "idempotency_requests_total", result="store_error") == len(refused)
        assert server.chat().status_code == 200
        assert "secret" not in caplog.text
        database.execute("PRAGMA max_page_count = 10000")
        assert post(server, "secret-59", CHAT | {"n": 4}).status_code == 200


def test_an_answer_that_cannot_be_stored_reaches_its_caller(folder: Path, tmp_path: Path) -> None:
    settings = IdempotencySettings(f"sqlite:{tmp_path / 'replies.db'}")
    with serve(folder, says(folder, TEXT), idempotency=settings) as server:
        server.engine.paused = True
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, server, "k")
            assert eventually(lambda: len(server.engine.submitted) == 1)
            server.service.idempotency._store._db.execute("PRAGMA query_only = 1")
            server.engine.paused = False
            assert answer.result().status_code == 200
        assert metric(server, "idempotency_evictions_total", reason="store_error") == 1
        server.service.idempotency._store._db.execute("PRAGMA query_only = 0")
        again = post(server, "k")  # computed again, with the same id and the same `created`
        assert again.json() == answer.result().json()
        assert len(server.engine.submitted) == 2


async def in_store(path: Path, now: list[float]) -> SqliteStore:
    return SqliteStore(str(path), StoreLimits(ttl_s=10), IdempotencyMetrics(CollectorRegistry()), lambda: now[0])


def test_a_claim_whose_server_was_killed_is_free_for_the_same_request_only(tmp_path: Path) -> None:
    import asyncio

    async def play() -> None:
        now = [1000.0]
        store = await in_store(tmp_path / "replies.db", now)
        assert (await store.claim(b"name", b"one")).state is ClaimState.NEW
        await store.close()  # a killed server leaves the claim like this
        store = await in_store(tmp_path / "replies.db", now)
        now[0] += 3
        assert (await store.claim(b"name", b"two")).state is ClaimState.HELD
        claim = await store.claim(b"name", b"one")
        assert (claim.state, claim.created_unix_s) == (ClaimState.NEW, 1000)
        await store.keep(b"name", claim, Reply("run", ["a", "b"]))
        assert (await store.claim(b"name", b"two")).reply == Reply("run", ["a", "b"])
        now[0] += 11
        assert (await store.claim(b"name", b"two")).state is ClaimState.EXPIRED
        await store.release(b"name")
        assert (await store.claim(b"name", b"one")).state is ClaimState.NEW
        await store.close()

    asyncio.run(play())


def test_concurrent_duplicates_of_a_stored_answer_are_all_replays(server: RunningServer) -> None:
    first = post(server, "k")
    barrier = threading.Barrier(20)

    def ask(_: int) -> httpx.Response:
        barrier.wait()
        return post(server, "k")

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(ask, range(20)))
    assert {answer.content for answer in answers} == {first.content}
    assert {answer.headers["idempotency-replayed"] for answer in answers} == {"true"}
    assert results(server) == {"new": 1, "replay": 20}

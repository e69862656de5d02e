"""API keys on /v1, and only there; keys in a file that changes while the server runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from fake_engine import FakeEngine
from http_server import MODEL, RunningServer, run_service, says, serve
from openai import OpenAI

from dspark.engine import ConfigError
from dspark.server import auth
from dspark.server.auth import read_keys
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

KEYS = ("first-secret", "second-secret")
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with serve(folder, says(folder, "ok"), api_keys=KEYS) as running:
        yield running


@pytest.mark.parametrize("key", KEYS)
def test_each_key_opens_v1(server: RunningServer, key: str) -> None:
    client = OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
    answer = client.chat.completions.create(model=MODEL, messages=CHAT["messages"])
    assert answer.choices[0].message.content == "ok"


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Basic first-secret", "Bearer third", "first-secret", "Bearer first-secre"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/models", f"/v1/models/{MODEL}"])
def test_anything_else_is_a_401(server: RunningServer, path: str, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header}
    method = "GET" if "models" in path else "POST"
    response = server.http.request(method, path, headers=headers, json=CHAT if method == "POST" else None)
    assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"


def test_a_wrong_key_is_in_no_message_and_no_log(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    response = server.http.get("/v1/models", headers={"authorization": "Bearer wrong-secret"})
    assert "secret" not in response.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("path", ["/health", "/metrics"])
def test_probes_need_no_key(server: RunningServer, path: str) -> None:
    assert server.http.get(path).status_code == 200


def test_each_key_is_a_tenant_of_the_prefix_cache(server: RunningServer) -> None:
    for key in KEYS:
        server.http.post("/v1/chat/completions", json=CHAT, headers={"authorization": f"Bearer {key}"})
    salts = [request.cache_salt for request in server.engine.submitted[-2:]]
    assert salts[0] != salts[1]
    assert not any(key.encode() in salt for key in KEYS for salt in salts)


def test_a_file_of_keys_has_one_a_line_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# web shop\nfirst-secret\n\n  # batch jobs\r\n  second#secret  \n", encoding="utf-8")
    assert read_keys(file) == ("first-secret", "second#secret")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"good\nsome secret\n", "line 2 should be a key of 1 to 512 ASCII characters without spaces"),
        ("good\ngeheim-ä\n".encode(), "line 2"),
        (b"\x00secret", "line 1"),
        (b"s" * 513, "line 1"),
        (b"", "should have at least 1 key, but has none"),
        (b"# nobody yet\n", "at least 1 key"),
        (b"#" * (2**20 + 1), "more than 1048576 bytes"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_by_line_and_never_by_content(
    tmp_path: Path, content: bytes | None, problem: str
) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"^api_keys_file: ") as raised:
        read_keys(file)
    assert problem in str(raised.value)
    assert str(file) in str(raised.value)
    assert "secret" not in str(raised.value)
    assert "geheim" not in str(raised.value)


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    write(file, "old-secret\nlasting-secret\n", age_s=1000)
    return file


@pytest.fixture
def reloading(folder: Path, keys_file: Path) -> Iterator[httpx.Client]:
    """A client of a server that has one key for good and more in the file."""
    settings = ServerSettings(MODEL, ("given-secret",), api_keys_file=keys_file)
    service = Service(FakeEngine(says(folder, "ok")), ModelText.load(folder), settings)
    with run_service(service) as url, httpx.Client(base_url=url) as http:
        yield http


def statuses(http: httpx.Client, *keys: str) -> list[int]:
    return [http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code for key in keys]


def write(file: Path, content: str, age_s: float) -> None:
    """age_s: how long ago the file claims to have been written; no two versions may claim the same."""
    file.write_text(content, encoding="utf-8")
    now_s = file.stat().st_mtime
    os.utime(file, (now_s - age_s, now_s - age_s))


def test_a_changed_file_counts_at_the_next_request(reloading: httpx.Client, keys_file: Path) -> None:
    assert statuses(reloading, "given-secret", "old-secret", "lasting-secret", "new-secret") == [200, 200, 200, 401]
    write(keys_file, "new-secret\nlasting-secret\n", age_s=900)
    assert statuses(reloading, "given-secret", "old-secret", "lasting-secret", "new-secret") == [200, 401, 200, 200]


def test_a_file_put_in_place_of_the_old_one_counts_however_old_it_is(reloading: httpx.Client, keys_file: Path) -> None:
    other = keys_file.with_suffix(".next")
    write(other, "moved-secret\n", age_s=5000)
    other.rename(keys_file)
    assert statuses(reloading, "moved-secret", "old-secret") == [200, 401]


def test_a_key_taken_out_of_the_file_counts_as_revoked(reloading: httpx.Client, keys_file: Path) -> None:
    write(keys_file, "new-secret\n", age_s=900)
    assert statuses(reloading, "old-secret", "never-a-secret") == [401, 401]
    page = reloading.get("/metrics").text
    assert 'dspark_auth_failures_total{reason="revoked"} 1.0' in page
    assert 'dspark_auth_failures_total{reason="invalid"} 1.0' in page
    write(keys_file, "old-secret\n", age_s=800)
    assert statuses(reloading, "old-secret") == [200]


@pytest.mark.parametrize("broken", ["", "new-secret\nsome secret\n", None])
def test_a_broken_file_keeps_the_old_keys_and_is_told_once(
    reloading: httpx.Client, keys_file: Path, broken: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if broken is None:
        keys_file.unlink()
    else:
        write(keys_file, broken, age_s=900)
    assert statuses(reloading, "old-secret", "new-secret", "lasting-secret") == [200, 401, 200]
    complaints = [record.getMessage() for record in caplog.records if record.name == auth.__name__]
    assert len(complaints) == 1
    assert complaints[0].endswith("the API keys read before stay valid")
    assert "secret" not in complaints[0]
    page = reloading.get("/metrics").text
    assert 'dspark_api_key_reloads_total{result="failed"} 1.0' in page
    assert 'dspark_api_key_reloads_total{result="ok"} 0.0' in page
    write(keys_file, "new-secret\n", age_s=700)
    assert statuses(reloading, "old-secret", "new-secret") == [401, 200]


def test_a_file_that_may_still_be_being_written_is_left_alone(
    reloading: httpx.Client, keys_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "SETTLED_S", 3600.0)
    write(keys_file, "old-secr", age_s=0)
    assert statuses(reloading, "old-secr", "old-secret") == [401, 200]
    write(keys_file, "new-secret\n", age_s=7200)
    assert statuses(reloading, "new-secret", "old-secret") == [200, 401]

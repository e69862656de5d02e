"""The main paths once more, with the engine itself on a tiny random model."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from http_server import run_service
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

MODEL = "tiny"
DSPARK = Path(sys.executable).parent / "dspark"
USER = [{"role": "user", "content": "abcabcabcabc"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


@dataclass
class RealServer:
    url: str
    engine: Engine
    openai: OpenAI
    http: httpx.Client

    def sums(self) -> dict[str, float]:
        """Sample name -> sum over its labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.http.get("/metrics").text):
            for sample in family.samples:
                name = sample.name.removeprefix("dspark_")
                sums[name] = sums.get(name, 0) + sample.value
        return sums


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    config = EngineConfig(
        model=str(model_folder),
        cache_dir=tmp_path_factory.mktemp("cache"),
        dtype="float32",
        threads=1,
        max_num_seqs=8,
        max_num_batched_tokens=64,
        kv_cache_bytes=1 << 20,
        max_queued_requests=4,
        num_speculative_tokens=5,
    )
    engine = Engine.load(config)
    service = Service(engine, ModelText.load(model_folder), ServerSettings(MODEL))
    with run_service(service) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=60)
        with httpx.Client(base_url=url, timeout=60) as http:
            yield RealServer(url, engine, client, http)
            assert engine.gauges().blocks_used == 0, "a block leaked"


@pytest.mark.parametrize("fields", [{"temperature": 0}, {"seed": 7}, {"seed": 7, "top_p": 0.9, "presence_penalty": 1}])
def test_a_stream_says_what_the_json_answer_says(server: RealServer, fields: dict[str, float]) -> None:
    request = {"model": MODEL, "messages": USER, "max_tokens": 40} | fields
    whole = server.openai.chat.completions.create(**request)
    streamed = list(
        server.openai.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert text == whole.choices[0].message.content
    assert streamed[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert streamed[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_stop_string_cuts_what_the_model_says_without_it(server: RealServer) -> None:
    request = {"model": MODEL, "prompt": "ab", "temperature": 0, "max_tokens": 40, "extra_body": {"ignore_eos": True}}
    text = server.openai.completions.create(**request).choices[0].text
    stop = text[len(text) // 2 : len(text) // 2 + 2]
    cut = server.openai.completions.create(**request, stop=stop).choices[0]
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"


def test_choices_and_prompts_and_logprobs(server: RealServer) -> None:
    answer = server.openai.completions.create(
        model=MODEL,
        prompt=["ab", "cd"],
        n=3,
        max_tokens=6,
        logprobs=2,
        extra_body={"ignore_eos": True, "min_tokens": 6},
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert all(len(choice.logprobs.tokens) == 6 for choice in answer.choices)
    assert answer.usage.completion_tokens == 36


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"max_completion_tokens": 10_000}, "max_completion_tokens"),
        ({"messages": [{"role": "user", "content": "a b " * 4000}]}, "messages"),
        ({"top_k": 100_000}, "top_k"),
    ],
)
def test_what_the_engine_refuses_is_named_as_the_client_named_it(
    server: RealServer, fields: dict[str, object], param: str
) -> None:
    response = server.http.post("/v1/chat/completions", json={"model": MODEL, "messages": USER} | fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_the_identities_hold_after_load_with_cancels_and_refusals(server: RealServer) -> None:
    def client(seed: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as http:
            for turn in range(4):
                body = {
                    "model": MODEL,
                    "prompt": "abcabc" * (turn + 1),
                    "seed": seed,
                    "max_tokens": 30,
                    "stop": ["zz", "e"],
                }
                http.post("/v1/completions", json=body | {"n": 1 + turn % 2, "stream": turn == 2})
            body = {"model": MODEL, "prompt": "ab", "stream": True, "ignore_eos": True, "max_tokens": 300}
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_raw())

    clients = [threading.Thread(target=client, args=(seed,)) for seed in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    while (sums := server.sums())["requests_running"] or sums["stream_clients"] or sums["requests_waiting"]:
        pass
    assert sums["spec_drafted_tokens_total"] == sums["spec_truncated_tokens_total"] + sums["spec_verified_tokens_total"]
    assert sums["spec_verified_tokens_total"] == sums["spec_accepted_tokens_total"] + sums["spec_rejected_tokens_total"]
    given = sums["spec_accepted_tokens_total"] + sums["spec_bonus_tokens_total"]
    assert sums["generated_tokens_total"] == given + sums["first_tokens_total"] > 0
    assert sums["spec_accepted_length_tokens_sum"] == given
    assert sums["spec_accepted_length_tokens_count"] == sums["spec_rounds_total"]
    for stage in ("drafted", "verified", "accepted"):
        assert sums[f"spec_position_{stage}_tokens_total"] == sums[f"spec_{stage}_tokens_total"]
    assert sums["kv_cache_blocks"] == server.engine.info.num_blocks
    assert server.engine.gauges().blocks_used == 0
    assert sums["requests_total"] == sums["requests_admitted_total"] + sums["requests_shed_total"]


@pytest.mark.slow
def test_dspark_serve_answers_and_goes_down_in_order(model_folder: Path, tmp_path: Path) -> None:
    command = [DSPARK, "serve", "--model", model_folder, "--served-model-name", MODEL, "--port", "0"]
    command += ["--cache-dir", tmp_path, "--threads", "1", "--kv-cache-memory", "1M", "--api-key", "key"]
    command += ["--max-num-seqs", "2", "--max-num-batched-tokens", "32"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = re.search(r"http://[\d.:]+", line)
            assert url is not None, process.stderr and process.stderr.read()
            client = OpenAI(base_url=f"{url[0]}/v1", api_key="key", max_retries=0, timeout=60)
            answer = client.chat.completions.create(model=MODEL, messages=USER, max_tokens=4)
            assert answer.usage.completion_tokens <= 4
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()

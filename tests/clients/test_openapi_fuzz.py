"""5,000 requests made from our own OpenAPI document: none answers 500, and no answer is one that it does not describe.

The engine is real, its model tiny. A third of the bodies is what the document allows, a third holds one or two such
fields beside good ones, so that they get past the checks and into the engine, and a third breaks the document.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import schemathesis
from http_server import run_service
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import APIOperation, Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

# an overflow or a NaN among the logits is then a failed step
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("error::RuntimeWarning")]

MODEL = "tiny"
VOCAB_SIZE = 320
CASES = {
    "POST /v1/chat/completions": 1700,
    "POST /v1/completions": 1500,
    "POST /tokenize": 900,
    "POST /detokenize": 600,
    "GET /v1/models/{model}": 300,
    "GET /v1/models": 1,
    "GET /health": 1,
    "GET /health/ready": 1,
    "GET /health/live": 1,
    "GET /version": 1,
    "GET /metrics": 1,
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 4},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [40, 41]},
}
GENERATING = ("POST /v1/chat/completions", "POST /v1/completions")
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
# a deadline that the request itself set may pass
EXPECTED = {"checks": {"not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", 504]}}}


@dataclass
class Fuzzed:
    service: Service
    schema: Any
    session: requests.Session
    answers: Counter[tuple[str, int]] = field(default_factory=Counter)
    streams: Counter[str] = field(default_factory=Counter)

    def operation(self, label: str) -> APIOperation:
        return self.schema.find_operation_by_label(label)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    folder: Path = write_tiny_model(tmp_path_factory.mktemp("model"))
    config = EngineConfig(
        model=str(folder),
        cache_dir=tmp_path_factory.mktemp("cache"),
        dtype="float32",
        threads=1,
        max_num_seqs=16,
        kv_cache_bytes=4 << 20,
        num_speculative_tokens=5,
    )
    service = Service(Engine.load(config), ModelText.load(folder), ServerSettings(MODEL))
    with run_service(service) as url, requests.Session() as session:
        document = f"{url}/openapi.json"
        schema = schemathesis.openapi.from_url(document, config=SchemathesisConfig.from_dict(EXPECTED))
        yield Fuzzed(service, schema, session)


def cases(operation: APIOperation) -> st.SearchStrategy[Case]:
    allowed = operation.as_strategy(generation_mode=GenerationMode.POSITIVE)
    if operation.path not in GOOD:
        return allowed

    def few_fields(case: Case, chance: random.Random) -> Case:
        kept = chance.sample(sorted(case.body), min(len(case.body), 1 + chance.randrange(2)))
        body = GOOD[operation.path] | {name: with_integers(case.body[name]) for name in kept} | {"model": MODEL}
        if operation.label in GENERATING and chance.randrange(3) == 0:
            body["stream"] = True
        if "tokens" in body:
            body["tokens"] = [token % VOCAB_SIZE for token in body["tokens"]]
        return operation.Case(body=body, media_type="application/json")

    few = st.builds(few_fields, allowed.filter(lambda case: case.body), st.randoms(use_true_random=False))
    return st.one_of(allowed, few, operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))


def with_integers(value: Any) -> Any:
    """4.0, which is an integer by JSON Schema and not to this server, becomes 4."""
    return json.loads(
        json.dumps(value), parse_float=lambda text: int(float(text)) if text.endswith(".0") else float(text)
    )


def test_every_operation_is_fuzzed(server: Fuzzed) -> None:
    assert {result.ok().label for result in server.schema.get_all_operations()} == set(CASES)
    assert sum(CASES.values()) >= 5000


@pytest.mark.parametrize("label", CASES)
def test_every_answer_is_one_that_the_document_describes(server: Fuzzed, label: str) -> None:
    operation = server.operation(label)
    described = {str(status) for status in operation.definition.raw["responses"]}

    @settings(
        max_examples=CASES[label],
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=cases(operation))
    def send(case: Case) -> None:
        response = case.call(session=server.session)
        server.answers[label, response.status_code] += 1
        server.streams[label] += "text/event-stream" in response.headers.get("content-type", [""])[0]
        case.validate_response(response, checks=CHECKS)
        assert str(response.status_code) in described, "by its number, not as any other error"
        assert response.status_code != 504 or "timeout" in case.body

    send()
    sent = sum(count for (of, _), count in server.answers.items() if of == label)
    assert sent >= CASES[label]
    if label.startswith("POST"):
        refused, answered = server.answers[label, 400], server.answers[label, 200]
        assert min(refused, answered) > CASES[label] / 10, "neither the checks nor what is behind them was reached"
    if label in GENERATING:
        assert server.streams[label] > CASES[label] / 50, "too few events were held against the document"


def test_the_server_is_as_well_as_before(server: Fuzzed) -> None:
    assert sum(server.answers.values()) >= 5000
    labels = {"model": MODEL, "type": "internal"}
    assert server.service.metrics.registry.get_sample_value("dspark_request_errors_total", labels) in (None, 0)
    assert server.service.state == "ready"
    assert server.service.engine.gauges().blocks_used == 0, "a block leaked"
    body = GOOD["/v1/chat/completions"] | {"model": MODEL}
    answer = server.operation("POST /v1/chat/completions").Case(body=body, media_type="application/json").call()
    assert answer.status_code == 200

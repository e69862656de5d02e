"""A real Prometheus scrapes a real server under load; every expression of dashboard and rules is put to it."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
from grafana_files import FOLDER, RULE_TESTS, RULES, Expression, dashboard, expressions, rules
from http_server import MODEL, run_service
from prometheus_server import Prometheus, Tools, find_tools, run_prometheus, write_config
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.server.service import ServerSettings, Service
from dspark.server.text import ModelText

pytestmark = pytest.mark.slow

CLIENTS = 12
IDLE_SCRAPES = 3
LOADED_SCRAPES = 30
RATE_INTERVAL, RANGE_S = "15s", 25

Result = list[tuple[dict[str, str], float]]
PROMPTS = [f"tell me about {word} and {word} and {word}" for word in ("rivers", "stones", "winds", "birds")]


@dataclass(frozen=True)
class Scraped:
    """What every expression of the dashboard gave, by its text, and what Prometheus still answers."""

    prometheus: Prometheus
    page: str
    idle: dict[str, Result]
    loaded: dict[str, Result]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    return find_tools(tmp_path_factory.mktemp("prometheus-package"))


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A tiny model with little room, so that requests wait, are refused and are preempted."""
    model = write_tiny_model(tmp_path_factory.mktemp("model"))
    config = EngineConfig(
        model=str(model),
        cache_dir=tmp_path_factory.mktemp("cache"),
        dtype="float32",
        threads=1,
        max_num_seqs=6,
        kv_cache_bytes=1 << 18,
        max_queued_requests=4,
        num_speculative_tokens=5,
    )
    settings = ServerSettings(MODEL, hourly_cost=1.5, currency="EUR")
    with run_service(Service(Engine.load(config), ModelText.load(model), settings)) as url:
        yield url


@pytest.fixture(scope="module")
def scraped(tools: Tools, server_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scraped]:
    folder = tmp_path_factory.mktemp("prometheus")
    config = write_config(folder, server_url, RULES)
    tools.check("check", "config", config)
    with run_prometheus(tools, config, folder) as prometheus:
        prometheus.wait_for_scrapes(IDLE_SCRAPES)
        idle = answers(prometheus)
        with load(server_url):
            prometheus.wait_for_scrapes(LOADED_SCRAPES)
            loaded = answers(prometheus)
        prometheus.wait_for_scrapes(3)
        yield Scraped(prometheus, httpx.get(f"{server_url}/metrics").text, idle, loaded)


def answers(prometheus: Prometheus) -> dict[str, Result]:
    return {
        expression.text: prometheus.query(expression.filled_in(rate_interval=RATE_INTERVAL, range_s=RANGE_S))
        for expression in expressions()
    }


@contextmanager
def load(url: str) -> Iterator[None]:
    """Streams and not, several choices, clients that leave, keyed and repeated requests, mistakes; until left."""
    stop = threading.Event()
    failures: list[BaseException] = []

    def client(number: int) -> None:
        try:
            with httpx.Client(base_url=url, timeout=60) as http:
                turn = 0
                while not stop.is_set():
                    turn += 1
                    one_request(http, number, turn)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failures


def one_request(http: httpx.Client, number: int, turn: int) -> None:
    """Clients 2 and 3 send the same request several times under one key, together and one after the other."""
    headers = {}
    if number in (2, 3):
        number, turn = 2, turn - turn % 4
        headers["Idempotency-Key"] = f"key-{turn}"
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": PROMPTS[(number + turn) % len(PROMPTS)]}],
        "max_tokens": 16 + 8 * (turn % 6),
        "temperature": turn % 2,
        "seed": turn % 3,
        "ignore_eos": True,
        "stream": number % 2 == 0,
    }
    if number % 4 == 1:
        body["n"] = 2
    if turn % 9 == 0:
        body["temperature"] = 9
    with http.stream("POST", "/v1/chat/completions", json=body, headers=headers) as response:
        for _ in response.iter_raw():
            if number % 3 == 0 and turn % 2 == 0:
                return  # leaves in the middle
    if response.status_code == 429:
        time.sleep(0.2)


def test_promtool_is_content_with_rules_page_and_deployment(tools: Tools, scraped: Scraped) -> None:
    tools.check("check", "rules", *RULES)
    tools.check("check", "config", FOLDER.parent / "deploy/prometheus.yml")
    tools.check("check", "metrics", stdin=scraped.page)


def test_the_rules_do_what_their_tests_say(tools: Tools) -> None:
    tools.check("test", "rules", *RULE_TESTS)


@pytest.mark.parametrize("expression", expressions(), ids=lambda one: f"{one.panel['title']}: {one.legend}")
def test_an_expression_of_the_dashboard_gives_numbers_under_load(expression: Expression, scraped: Scraped) -> None:
    result = scraped.loaded[expression.text]
    assert any(math.isfinite(value) for _, value in result), f"{expression.text}\n{result}"
    for label in re.findall(r"\{\{(\w+)\}\}", expression.legend):
        assert all(label in labels for labels, _ in result)


@pytest.mark.parametrize("expression", expressions(), ids=lambda one: f"{one.panel['title']}: {one.legend}")
def test_no_panel_of_an_idle_server_says_no_data(expression: Expression, scraped: Scraped) -> None:
    """A ratio of nothing may be NaN; a panel that can be empty has a word for that."""
    assert scraped.idle[expression.text] or "noValue" in expression.panel["fieldConfig"]["defaults"]


def test_nothing_on_an_idle_server_looks_like_trouble(scraped: Scraped) -> None:
    by_title = {expression.panel["title"]: scraped.idle[expression.text] for expression in expressions()}
    for title in ("Failed requests", "Stall age", "Requests", "Output tokens"):
        assert [value for _, value in by_title[title]] == [0.0], title
    states = {labels["state"]: value for labels, value in by_title["Server state"]}
    assert states == {"starting": 0, "ready": 1, "draining": 0, "degraded": 0}


def test_the_variables_find_the_server(scraped: Scraped) -> None:
    for variable in dashboard()["templating"]["list"][1:]:
        series, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"]).groups()
        values = scraped.prometheus.get(f"label/{label}/values", **{"match[]": series.replace("$model", ".*")})
        assert len(values) == 1


def test_every_rule_is_evaluated_and_every_recording_rule_gives_numbers(scraped: Scraped) -> None:
    groups = scraped.prometheus.get("rules")["groups"]
    evaluated = [rule for group in groups for rule in group["rules"]]
    assert len(evaluated) == len(rules())
    assert [(rule["name"], rule.get("lastError")) for rule in evaluated if rule["health"] != "ok"] == []
    for rule in rules():
        if "record" in rule:
            result = scraped.prometheus.query(rule["record"])
            assert [value for _, value in result if math.isfinite(value)], rule["record"]


def test_no_alert_that_clients_feel_fires_on_a_server_that_works(scraped: Scraped) -> None:
    firing = scraped.prometheus.query('ALERTS{alertstate="firing", severity="critical"}')
    assert firing == []


def test_the_load_was_hard_enough_to_mean_something(scraped: Scraped) -> None:
    value = scraped.prometheus.value
    assert value('sum(dspark_requests_total{outcome="length"})') > 20
    for happened in (
        'dspark_requests_total{outcome="abort"}',
        'dspark_requests_total{outcome="shed"}',
        'dspark_request_errors_total{type="invalid_request"}',
        "dspark_spec_accepted_tokens_total",
        "dspark_spec_rejected_tokens_total",
        "dspark_prefix_cache_hit_tokens_total",
        "dspark_kv_cache_evicted_blocks_total",
        "dspark_request_queue_seconds_count",
        'dspark_idempotency_requests_total{result="new"}',
        'dspark_idempotency_requests_total{result=~"join|replay"}',
    ):
        assert value(f"sum({happened})") > 0, happened


def test_what_prometheus_has_is_what_the_page_says_and_the_identities_hold_there(scraped: Scraped) -> None:
    value = scraped.prometheus.value
    drafted = value("dspark_spec_drafted_tokens_total")
    assert f'dspark_spec_drafted_tokens_total{{model="{MODEL}"}} {drafted}' in scraped.page
    assert drafted == value("dspark_spec_verified_tokens_total") + value("sum(dspark_spec_truncated_tokens_total)")
    assert value("dspark_generated_tokens_total") == (
        value("dspark_spec_accepted_tokens_total")
        + value("dspark_spec_bonus_tokens_total")
        + value("dspark_first_tokens_total")
    )

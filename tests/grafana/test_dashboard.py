"""Dashboard and rules against the server's own /metrics page, and against what Grafana asks of a file it imports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pytest
import yaml
from grafana_files import DASHBOARD, FOLDER, RULE_TESTS, dashboard, expressions, panels, rules
from http_server import plays, serve
from prometheus_client.parser import text_string_to_metric_families
from tiny_models import write_tiny_tokenizer

Series = dict[str, list[dict[str, str]]]
"""Sample name -> the label sets it has."""

SELECTOR = re.compile(r"\b((?:[\w]+:)?(?:dspark_|up\b)[\w:]*)(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)(=~|!=|!~|=)"([^"]*)"')
OF_THE_SCRAPE = {"instance", "job"}


@pytest.fixture(scope="module")
def series(tmp_path_factory: pytest.TempPathFactory) -> Series:
    """What a server shows before any request."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_tokenizer(folder, 320)
    with serve(folder, plays([75, 76])) as server:
        text = server.http.get("/metrics").text
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample.labels)
    return found


def test_the_file_is_as_json_writes_it_with_two_spaces() -> None:
    text = DASHBOARD.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=2, ensure_ascii=False) + "\n"


def test_it_can_be_imported_by_hand_and_by_provisioning() -> None:
    board = dashboard()
    assert board["id"] is None
    assert board["uid"] == "dspark-server"
    assert "__inputs" not in board
    assert "__requires" not in board
    assert [variable["name"] for variable in board["templating"]["list"]] == ["datasource", "model", "instance"]
    assert board["templating"]["list"][0]["type"] == "datasource"
    assert board["templating"]["list"][0]["query"] == "prometheus"


def test_every_data_source_is_the_one_that_was_chosen() -> None:
    def sources(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            if "datasource" in node:
                yield node["datasource"]
            for child in node.values():
                yield from sources(child)
        elif isinstance(node, list):
            for child in node:
                yield from sources(child)

    found = list(sources(dashboard()))
    assert len(found) > len(panels())
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in found)
    provisioned = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    assert all("uid" not in source for source in provisioned["datasources"])


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_every_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) >= 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert [target["refId"] for target in panel["targets"]] == list("ABCDEF")[: len(panel["targets"])]


def test_panels_do_not_overlap_and_their_ids_and_titles_differ() -> None:
    everything = dashboard()["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    for panel in everything:
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24
    for one, other in combinations([panel["gridPos"] for panel in everything], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above


def test_every_row_that_an_operator_looks_for_is_there() -> None:
    rows = [panel["title"] for panel in dashboard()["panels"] if panel["type"] == "row"]
    assert rows == [
        "Health",
        "Latency",
        "Speculation",
        "Calibration",
        "Load controller",
        "K/V and prefix cache",
        "Idempotency",
        "Cost",
    ]


@pytest.mark.parametrize("text", sorted({expression.text for expression in expressions()}))
def test_windows_follow_the_zoom_and_percentiles_are_over_all_servers(text: str) -> None:
    assert set(re.findall(r"\[([^\]]*)\]", text)) <= {"$__rate_interval", "$__range"}
    if "histogram_quantile" in text:
        assert re.search(r"histogram_quantile\([\d.]+, sum by \(le\) \(rate\(", text)
    for name, matchers in SELECTOR.findall(text):
        assert 'instance=~"$instance"' in matchers, f"{name} does not follow the instance variable"


@pytest.mark.parametrize("text", sorted({e.text for e in expressions()} | {rule["expr"] for rule in rules()}))
def test_every_series_that_is_asked_for_is_on_the_page_of_an_idle_server(text: str, series: Series) -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    selectors = SELECTOR.findall(text)
    assert selectors
    for name, matchers in selectors:
        if name == "up" or name in recorded:
            continue
        assert name in series, f"{name} is not on the page"
        given = [
            (label, operator, value)
            for label, operator, value in MATCHER.findall(matchers)
            if label not in OF_THE_SCRAPE and not value.startswith("$")
        ]
        for label, operator, value in given:
            values = {labels.get(label) for labels in series[name]}
            for alternative in value.split("|") if operator in ("=~", "!~") else [value]:
                assert alternative in values, f"{name} has no {label}={alternative}"
        if 'model=~"$model"' in matchers:
            assert all("model" in labels for labels in series[name])


def test_alerts_say_how_bad_it_is_what_happened_and_what_to_do() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert alert["annotations"]["summary"]
        assert len(alert["annotations"]["description"]) >= 80
        assert alert["for"]


def test_every_rule_has_a_test() -> None:
    tested = "\n".join(path.read_text(encoding="utf-8") for path in RULE_TESTS)
    for rule in rules():
        name = rule.get("record") or f'alertname="{rule["alert"]}"'
        assert name in tested


def test_alerts_use_names_that_are_recorded() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    used = {name for rule in rules() for name, _ in SELECTOR.findall(rule["expr"]) if ":" in name}
    assert used
    assert used <= recorded


def test_the_deployment_names_the_job_as_the_alert_does_and_its_scrape_interval_as_the_data_source_does() -> None:
    deployed = yaml.safe_load((FOLDER.parent / "deploy/prometheus.yml").read_text(encoding="utf-8"))
    (job,) = [config["job_name"] for config in deployed["scrape_configs"]]
    assert f'up{{job="{job}"}}' in next(rule["expr"] for rule in rules() if rule.get("alert") == "DSparkDown")
    provisioned = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text(encoding="utf-8"))
    (source,) = provisioned["datasources"]
    assert source["jsonData"]["timeInterval"] == deployed["global"]["scrape_interval"]

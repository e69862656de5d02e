"""What the Dockerfile and the compose file promise without being run, and that they agree with each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dspark.server import cli

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
PROMETHEUS = yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8"))
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+\.\d+(-[\w-]+)?")
SERVICES = pytest.mark.parametrize("service", COMPOSE["services"].values(), ids=list(COMPOSE["services"]))


def test_the_base_image_is_pinned_and_is_all_that_is_fetched() -> None:
    (base,) = re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert PINNED.fullmatch(base)
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", DOCKERFILE, re.MULTILINE)
    made = {name for _, name in stages}
    assert {source for source, _ in stages} - made == {"${PYTHON_IMAGE}"}
    assert stages[-1][0] == "cpu", "what is built when no target is named"


def test_every_copied_path_is_in_the_build_context_and_every_package_is_copied() -> None:
    copied = {
        path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for path in line.split()
    }
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line.removeprefix("!") for line in ignore if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)
    packages = re.findall(
        r'^"dspark\.\w+" = "(\w+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(packages) <= copied


def test_packages_are_installed_at_the_pinned_versions_of_an_index_that_the_builder_names() -> None:
    commands = re.findall(r"(?:RUN|&&) install-packages (.+)", DOCKERFILE)
    assert len(commands) == 4
    assert all("-c constraints.txt" in command or "--no-deps" in command for command in commands)
    assert set(re.findall(r"\w+://([^/:]+)", DOCKERFILE)) == {"127.0.0.1"}


@SERVICES
def test_every_service_is_confined(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert not service.get("privileged")


@SERVICES
def test_every_image_is_pinned_and_published_on_this_machine_only(service: dict[str, Any]) -> None:
    assert PINNED.fullmatch(service["image"])
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


@SERVICES
def test_every_mounted_file_is_there_and_cannot_be_written(service: dict[str, Any]) -> None:
    for volume in service.get("volumes", []):
        source, _, mode = volume.partition(":")[0], *volume.rpartition(":")[1:]
        if source.startswith("."):
            assert (ROOT / "deploy" / source).exists(), source
            assert mode == "ro"
        else:
            assert source in COMPOSE["volumes"]


def test_prometheus_scrapes_the_servers_metrics_port_under_the_name_that_the_rules_expect() -> None:
    parser = cli.Parser(prog="dspark serve")
    cli.add_serve_arguments(parser)
    options = parser.parse_args(COMPOSE["services"]["server"]["command"])
    (job,) = PROMETHEUS["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{options.metrics_port}"]}]
    assert job["job_name"] == "dspark"
    assert not any(str(options.metrics_port) in port for port in COMPOSE["services"]["server"]["ports"])


def test_grafana_finds_its_dashboard_and_prometheus_where_they_are_mounted() -> None:
    provisioning = ROOT / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text(encoding="utf-8"))[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == PROMETHEUS["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "dspark.yaml").read_text(encoding="utf-8"))["providers"]
    grafana = COMPOSE["services"]["grafana"]
    mounted = f"{provider['options']['path']}/dashboard.json"
    assert f"../grafana/dashboard.json:{mounted}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] == mounted


@pytest.mark.slow
def test_promtool_takes_the_configuration_with_the_rules(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    rules = ROOT / "grafana" / "rules"
    text = (ROOT / "deploy" / "prometheus.yml").read_text(encoding="utf-8")
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace("/etc/prometheus/rules", str(rules)), encoding="utf-8")
    checked = subprocess.run([promtool, "check", "config", str(config)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert len(list(rules.glob("*.yaml"))) == checked.stdout.count("rules found")

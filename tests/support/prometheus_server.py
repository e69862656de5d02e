"""A real Prometheus that scrapes one server, and its promtool: Debian's package, unpacked when it is not installed."""

from __future__ import annotations

import math
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

SCRAPE_INTERVAL_S = 1


@dataclass(frozen=True)
class Tools:
    """Paths of the two programs."""

    prometheus: Path
    promtool: Path

    def check(self, *arguments: str | Path, stdin: str | None = None) -> None:
        """Run promtool; AssertionError with what it printed when it is not content."""
        done = subprocess.run([self.promtool, *arguments], input=stdin, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def find_tools(folder: Path) -> Tools:
    """Those on the PATH, else those of Debian's package, unpacked in `folder` so that no service is started."""
    installed = [shutil.which(name) for name in ("prometheus", "promtool")]
    if all(installed):
        return Tools(*map(Path, installed))
    subprocess.run(["apt-get", "download", "prometheus"], cwd=folder, check=True, capture_output=True)
    (package,) = folder.glob("prometheus_*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return Tools(folder / "usr/bin/prometheus", folder / "usr/bin/promtool")


@dataclass(frozen=True)
class Prometheus:
    http: httpx.Client

    def get(self, path: str, **parameters: Any) -> Any:
        """`data` of an API answer. Raises AssertionError with Prometheus's own words for a query it refuses."""
        answer = self.http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def query(self, text: str) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of every series of an instant query."""
        data = self.get("query", query=text)
        if data["resultType"] == "scalar":
            return [({}, float(data["result"][1]))]
        return [(series["metric"], float(series["value"][1])) for series in data["result"]]

    def value(self, text: str) -> float:
        """Of the only series; NaN when there is none."""
        found = self.query(text)
        assert len(found) <= 1
        return found[0][1] if found else math.nan

    def wait_for_scrapes(self, count: int, timeout_s: float = 60) -> None:
        """Until so many scrapes more have succeeded."""
        query = "count_over_time(dspark_requests_running[1h])"
        until_s = time.monotonic() + timeout_s
        before = self.value(query)
        target = (0 if math.isnan(before) else before) + count
        while not self.value(query) >= target:
            assert time.monotonic() < until_s, "the server is not scraped"
            time.sleep(0.2)


def write_config(folder: Path, server_url: str, rules: list[Path]) -> Path:
    config = {
        "global": {"scrape_interval": f"{SCRAPE_INTERVAL_S}s", "evaluation_interval": f"{SCRAPE_INTERVAL_S}s"},
        "rule_files": [str(path) for path in rules],
        "scrape_configs": [{"job_name": "dspark", "static_configs": [{"targets": [urlsplit(server_url).netloc]}]}],
    }
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@contextmanager
def run_prometheus(tools: Tools, config: Path, folder: Path) -> Iterator[Prometheus]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [
        tools.prometheus,
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://{address}", timeout=30) as http:
                _wait_until_ready(http, process, folder / "prometheus.log")
                yield Prometheus(http)
        finally:
            process.terminate()


def _wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        assert process.poll() is None, log.read_text(encoding="utf-8")
        try:
            if http.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError(f"Prometheus did not start: {log.read_text(encoding='utf-8')}")

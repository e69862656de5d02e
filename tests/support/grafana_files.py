"""The dashboard and the rules as data: their expressions, with Grafana's variables filled in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "grafana"
DASHBOARD = FOLDER / "dashboard.json"
RULES = sorted((FOLDER / "rules").glob("*.yaml"))
RULE_TESTS = sorted((FOLDER / "rule_tests").glob("*.yaml"))


@dataclass(frozen=True)
class Expression:
    """One query of a panel. legend: Grafana's legendFormat."""

    panel: dict[str, Any]
    text: str
    legend: str

    def filled_in(self, *, rate_interval: str, range_s: int) -> str:
        """As Grafana sends it, with every model and instance selected."""
        variables = {
            "$__rate_interval": rate_interval,
            "$__range_s": str(range_s),
            "$__range": f"{range_s}s",
            "$model": ".*",
            "$instance": ".*",
        }
        text = self.text
        for name, value in variables.items():
            text = text.replace(name, value)
        assert "$" not in text, f"a variable is not known here: {text}"
        return text


def dashboard() -> dict[str, Any]:
    return json.loads(DASHBOARD.read_text(encoding="utf-8"))


def panels() -> list[dict[str, Any]]:
    """All but the rows."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[Expression]:
    return [
        Expression(panel, target["expr"], target["legendFormat"]) for panel in panels() for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        for rule in group["rules"]
    ]

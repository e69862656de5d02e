"""What all tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest


@pytest.fixture(scope="session", autouse=True)
def _row_plans_are_kept() -> Iterator[None]:
    """Engines are started by the hundred, and each would seek the same row plans by trial, for a second or two."""
    decoder: Any = sys.modules.get("dspark.engine.models.decoder")
    if decoder is None:  # nothing that was collected makes layers
        yield
        return
    find, plans = decoder.find_row_plan, {}

    def find_once(weight: Any, packing: bool) -> Any:
        key = (weight.shape, packing)
        if key not in plans:
            plans[key] = find(weight, packing)
        return plans[key]

    with patch.object(decoder, "find_row_plan", find_once):
        yield

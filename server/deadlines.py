"""How long a client waits: header `X-Request-Timeout` or field `timeout`, within what the operator allows."""

from __future__ import annotations

import math
from dataclasses import dataclass

from starlette.datastructures import Headers

from dspark.server.errors import InvalidRequestError

HEADER = "X-Request-Timeout"
MAX_TIMEOUT_S = 86_400.0


@dataclass(frozen=True, slots=True)
class TimeoutLimits:
    """default_s: of requests that give none; None: they wait without end. max_s: the longest that may be given."""

    default_s: float | None = None
    max_s: float = MAX_TIMEOUT_S


def request_deadline(
    headers: Headers, timeout_s: float | None, limits: TimeoutLimits, arrived_s: float
) -> float | None:
    """When the answer is of no use any more, on the clock of `arrived_s`; None: never.

    timeout_s: the body's. The header goes before it, since gateways set headers. Raises InvalidRequestError.
    """
    given = headers.get(HEADER)
    if given is not None:
        timeout_s = _checked(HEADER, _seconds(given), given, limits)
    elif timeout_s is not None:
        timeout_s = _checked("timeout", timeout_s, timeout_s, limits)
    else:
        timeout_s = limits.default_s
    return None if timeout_s is None else arrived_s + timeout_s


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _checked(name: str, seconds: float, given: object, limits: TimeoutLimits) -> float:
    if not 0 < seconds <= limits.max_s:  # NaN is in no range
        raise InvalidRequestError(
            f"Invalid value for '{name}': it should be seconds above 0 and at most {limits.max_s:g}, "
            f"but {str(given)[:40]!r} was given",
            name,
        )
    return seconds

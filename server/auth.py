"""API keys: compared in constant time, never logged, and one prefix-cache tenant each."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.requests import Request

from dspark.server.errors import AuthenticationError
from dspark.server.metrics import HttpMetrics


class ApiKeys:
    """The keys that may use /v1; none at all means that everybody may."""

    def __init__(self, keys: Sequence[str], metrics: HttpMetrics) -> None:
        # digests have one length, so that comparing them tells nothing of a key's
        self._digests = [_digest(key) for key in keys]
        self._metrics = metrics

    def tenant(self, request: Request) -> bytes:
        """The salt of the caller's prefix-cache blocks. Raises AuthenticationError."""
        if not self._digests:
            return b""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            self._metrics.auth_failures["missing"].inc()
            raise AuthenticationError("No API key: send it as `Authorization: Bearer KEY`")
        given = _digest(key.strip())
        # every key is compared, whichever matches, so that the time does not tell which
        matches = [hmac.compare_digest(given, digest) for digest in self._digests]
        if not any(matches):
            self._metrics.auth_failures["invalid"].inc()
            raise AuthenticationError("Incorrect API key")
        return given


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

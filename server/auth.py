"""API keys: compared in constant time, never logged, read again when their file changes, one tenant each."""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path

from starlette.requests import Request

from dspark.engine import ConfigError
from dspark.server.errors import AuthenticationError
from dspark.server.metrics import HttpMetrics

log = logging.getLogger(__name__)

KEY = re.compile(r"[!-~]{1,512}")
MAX_FILE_BYTES = 2**20
SETTLED_S = 1.0
"""A file that changed more recently may be half written, and half a key is not to become a key."""


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys in a file: one a line of 1 to 512 visible ASCII characters; blank lines and `#` comments between them.

    A file without any key is an error too: with no key at all the server would be open to everybody.
    Raises ConfigError("api_keys_file", ...), which names the line and not what is in it.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError("api_keys_file", f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError("api_keys_file", f"{path} has more than {MAX_FILE_BYTES} bytes")
    keys = []
    for number, line in enumerate(data.decode("ascii", "replace").splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not KEY.fullmatch(key):
            raise ConfigError(
                "api_keys_file",
                f"{path} line {number} should be a key of 1 to 512 ASCII characters without spaces, but is not",
            )
        keys.append(key)
    if not keys:
        raise ConfigError("api_keys_file", f"{path} should have at least 1 key, but has none")
    return tuple(keys)


class ApiKeys:
    """The keys that may use /v1; none at all means that everybody may."""

    def __init__(self, keys: Sequence[str], metrics: HttpMetrics, file: Path | None = None) -> None:
        """keys: of the command line or the environment, for good. file: more keys. Raises ConfigError."""
        # digests have one length, so that comparing them tells nothing of a key's
        self._fixed = frozenset(map(_digest, keys))
        self._metrics = metrics
        self._file = file
        self._seen = file and _version(file)
        self._valid = self._fixed | frozenset(map(_digest, read_keys(file) if file else ()))
        self._revoked: frozenset[bytes] = frozenset()

    def tenant(self, request: Request) -> bytes:
        """The salt of the caller's prefix-cache blocks. Raises AuthenticationError."""
        if self._file is not None:
            self._read_again_if_changed(self._file)
        if not self._valid:
            return b""
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            self._metrics.auth_failures["missing"].inc()
            raise AuthenticationError("No API key: send it as `Authorization: Bearer KEY`")
        given = _digest(key.strip())
        # every key is compared, whichever matches, so that the time does not tell which
        matches = [hmac.compare_digest(given, digest) for digest in self._valid]
        if not any(matches):
            self._metrics.auth_failures["revoked" if given in self._revoked else "invalid"].inc()
            raise AuthenticationError("Incorrect API key")
        return given

    def _read_again_if_changed(self, file: Path) -> None:
        """All of the new keys or none: a file that cannot be used leaves the keys as they are, and is told once."""
        version = _version(file)
        if version == self._seen or (version is not None and abs(time.time() - version[0] / 1e9) < SETTLED_S):
            return
        self._seen = version
        try:
            keys = read_keys(file)
        except ConfigError as error:
            self._metrics.api_key_reloads["failed"].inc()
            log.error("%s; the API keys read before stay valid", error)
            return
        valid = self._fixed | frozenset(map(_digest, keys))
        self._revoked = (self._revoked | self._valid) - valid
        self._valid = valid
        self._metrics.api_key_reloads["ok"].inc()
        log.info("Read %d API keys from %s", len(keys), file)


def _version(file: Path) -> tuple[int, int, int] | None:
    """What differs after a change, the time first, in ns; None while there is no such file."""
    try:
        state = file.stat()
    except OSError:
        return None
    return state.st_mtime_ns, state.st_size, state.st_ino


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

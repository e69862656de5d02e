"""Who an answer is: its id, its tool-call ids, when it was made, and the seed of its text.

An ordinary request gets a random identity. A request with an idempotency key gets one that follows from tenant and key
alone, so that a retry after a crash, or on another replica, gives the same text under the same ids.
"""

from __future__ import annotations

import hmac
import secrets
import time
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Identity:
    """root: what every id is derived from, 32 bytes. seed: of the text where the request names none; None: any."""

    root: bytes
    created_unix_s: int
    seed: int | None = None

    @classmethod
    def random(cls) -> Identity:
        return cls(secrets.token_bytes(32), int(time.time()))

    @classmethod
    def keyed(cls, tenant: bytes, key: str) -> Identity:
        """The same ids and seed for the same tenant and key, always; `created_unix_s` is now."""
        root = hmac.digest(tenant, key.encode(), "sha256")
        seed = int.from_bytes(_derive(root, "seed")[:8]) >> 1
        return cls(root, int(time.time()), seed)

    def response_id(self, prefix: str) -> str:
        """prefix: of the kind of object, e.g. `chatcmpl`."""
        return f"{prefix}-{_derive(self.root, 'response').hex()[:32]}"

    def tool_call_id(self, choice: int, index: int) -> str:
        """Of the call at `index` among those of one choice."""
        return f"call_{_derive(self.root, f'tool call {choice} {index}').hex()[:24]}"


def _derive(root: bytes, purpose: str) -> bytes:
    return hmac.digest(root, purpose.encode(), "sha256")

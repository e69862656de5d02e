"""Which requests may wait: the queue is bounded in requests and in prompt tokens, and no tenant can fill it for the others.

A full queue drops from the longest line (the buffer stealing of McKenney's Stochastic Fairness Queueing, 1990): a request of
a tenant with fewer waiting ones takes the place of the newest, least urgent one of the tenant with the most. So the
share that the order of service gives to each tenant cannot be lost at the door.
"""

from __future__ import annotations

import math

from dspark.engine.errors import QueueFullError
from dspark.engine.sequence import RequestRecord
from dspark.engine.waiting_queue import WaitingQueue

LONGEST_RETRY_AFTER_S = 60


class Admission:
    """The door to one queue."""

    def __init__(self, waiting: WaitingQueue, max_requests: int, max_prompt_tokens: int) -> None:
        self.max_requests = max_requests
        self.max_prompt_tokens = max_prompt_tokens
        self._waiting = waiting

    def check(self, tenant: bytes) -> None:
        """Raise QueueFullError if there is no place for any request of the tenant, however short. Costs next to nothing."""
        if self._full(1) and not self._can_displace(tenant):
            raise self.refusal(1)

    def admit(self, tenant: bytes, prompt_tokens: int) -> RequestRecord | None:
        """Let a request in; returns the one that has to make room for it. Raises QueueFullError: nobody has to."""
        if not self._full(prompt_tokens):
            return None
        if self._can_displace(tenant):
            displaced = self._waiting.last_of(self._waiting.most_waiting()[0])
            if not self._full(prompt_tokens, displaced_tokens=len(displaced.tokens), displaced=1):
                return displaced.record
        raise self.refusal(prompt_tokens)

    def _full(self, prompt_tokens: int, displaced_tokens: int = 0, displaced: int = 0) -> bool:
        requests, tokens = self._waiting.requests - displaced, self._waiting.prompt_tokens - displaced_tokens
        return requests >= self.max_requests or (requests > 0 and tokens + prompt_tokens > self.max_prompt_tokens)

    def _can_displace(self, tenant: bytes) -> bool:
        """One more of the tenant's and one less of the longest line's would still not turn them round."""
        return self._waiting.most_waiting()[1] > self._waiting.count_of(tenant) + 1

    def refusal(self, prompt_tokens: int) -> QueueFullError:
        """What a request that finds no place is told."""
        retry_after_s = min(max(1, math.ceil(self._waiting.retry_after_s())), LONGEST_RETRY_AFTER_S)
        if self._waiting.requests >= self.max_requests:
            return QueueFullError(self._waiting.requests, self.max_requests, "requests", retry_after_s)
        return QueueFullError(
            self._waiting.prompt_tokens, self.max_prompt_tokens, "prompt tokens", retry_after_s, prompt_tokens
        )

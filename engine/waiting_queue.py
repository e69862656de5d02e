"""Who starts next: priorities first, then fair shares between tenants, then the order of arrival.

Requests that have started (preempted, or choices of one whose prompt is computed) go before all others of their priority.
The others are served by the Virtual Token Counter (Sheng et al., "Fairness in Serving Large Language Models",
arXiv 2401.00588, algorithm 2): a counter per tenant grows with the service it gets, and the tenant with the smallest
counter goes first. A tenant that comes back is lifted to the smallest counter of those that wait, so that idling saves
up nothing. While two tenants have work waiting, their services differ by no more than one batch's worth, however many
requests one of them sends.

Priorities are strict: while more urgent work takes every slot, the rest waits; its deadlines bound for how long.
"""

from __future__ import annotations

import time
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator

from dspark.engine.sequence import Sequence

PROMPT_COST = 1
OUTPUT_COST = 2
"""What a token adds to its tenant's counter: the paper's weights. Only prompt tokens that were computed count."""
MEASURED_DEPARTURES = 64

Line = tuple[int, bool, bytes]
"""Sequences in order of arrival: (priority, has not started, tenant)."""


def rank(sequence: Sequence) -> tuple[int, int]:
    """The lowest goes on when memory is short, the highest gives way."""
    return sequence.record.request.priority, sequence.id


class WaitingQueue:
    """One thread. `requests` and `prompt_tokens` count what has not started."""

    def __init__(self) -> None:
        self.requests = 0
        self.prompt_tokens = 0
        self.departures_s: deque[float] = deque(maxlen=MEASURED_DEPARTURES)
        """When the last requests left, to start or to end: `time.monotonic()`."""
        self._lines: dict[Line, list[Sequence]] = {}
        self._service: dict[bytes, int] = {}
        self._last_tenant = b""  # of the request that started last

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        """Line by line, the one whose turn it is first."""
        for line in sorted(self._lines, key=self._turn):
            yield from self._lines[line]

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._lines.get(_line(sequence), ())

    @property
    def first(self) -> Sequence:
        """Whose turn it is; there must be one."""
        return self._lines[min(self._lines, key=self._turn)][0]

    def _turn(self, line: Line) -> tuple[int, bool, int, int]:
        priority, fresh, tenant = line
        return priority, fresh, self._service[tenant] if fresh else 0, self._lines[line][0].id

    def add(self, sequence: Sequence) -> None:
        line = _line(sequence)
        _, fresh, tenant = line
        if fresh:
            self._lift(tenant)
            self.requests += 1
            self.prompt_tokens += len(sequence.tokens)
        insort(self._lines.setdefault(line, []), sequence, key=lambda s: s.id)

    def _lift(self, tenant: bytes) -> None:
        """A tenant without waiting requests starts where the others are, and keeps what it owes."""
        waiting = {other for _, fresh, other in self._lines if fresh}
        if tenant not in waiting:
            others = waiting or {self._last_tenant}
            least = min(self._service.get(other, 0) for other in others)
            self._service[tenant] = max(self._service.get(tenant, 0), least)

    def remove(self, sequence: Sequence) -> None:
        """It starts (call this before it counts as started) or has ended."""
        line = _line(sequence)
        sequences = self._lines[line]
        index = bisect_left(sequences, sequence.id, key=lambda s: s.id)
        assert sequences[index] is sequence
        del sequences[index]
        if not sequences:
            del self._lines[line]
        _, fresh, tenant = line
        if fresh:
            self.requests -= 1
            self.prompt_tokens -= len(sequence.tokens)
            self.departures_s.append(time.monotonic())
            self._last_tenant = tenant

    def charge(self, tenant: bytes, prompt_tokens: int = 0, output_tokens: int = 0) -> None:
        """The tenant was given this much."""
        self._service[tenant] = self._service.get(tenant, 0) + PROMPT_COST * prompt_tokens + OUTPUT_COST * output_tokens

    def forget_service(self) -> None:
        """Nothing runs or waits: nobody was kept from anything by what others got before."""
        self._service.clear()

    def retry_after_s(self) -> float:
        """Seconds that the requests here will take to leave, at the rate at which the last ones left; 0.0: unknown."""
        if len(self.departures_s) < 2:
            return 0.0
        # until now, not until the last departure: while nothing leaves, the rate falls
        since_s = time.monotonic() - self.departures_s[0]
        return self.requests * since_s / len(self.departures_s)

    def most_waiting(self) -> tuple[bytes, int]:
        """The tenant with the most requests that have not started, and how many; there must be one."""
        counts = self._counts()
        tenant = max(counts, key=lambda t: (counts[t], t))
        return tenant, counts[tenant]

    def count_of(self, tenant: bytes) -> int:
        """The tenant's requests that have not started."""
        return self._counts().get(tenant, 0)

    def last_of(self, tenant: bytes) -> Sequence:
        """The tenant's newest request of its least urgent ones that have not started; there must be one."""
        return self._lines[max(line for line in self._lines if line[1] and line[2] == tenant)][-1]

    def _counts(self) -> dict[bytes, int]:
        counts: dict[bytes, int] = {}
        for (_, fresh, tenant), sequences in self._lines.items():
            if fresh:
                counts[tenant] = counts.get(tenant, 0) + len(sequences)
        return counts


def _line(sequence: Sequence) -> Line:
    fresh = sequence.record.facts.scheduled_s is None
    return sequence.record.request.priority, fresh, sequence.salt if fresh else b""

"""Which request makes a step fail: the sequences of a failed step are tried again, in halves once they failed twice.

A fault that was the machine's and has passed costs nobody anything but time. A request that breaks every step it is in is
found after about log2(sequences) more failed steps, and ends alone. Tokens do not depend on which sequences share a step, so
trying again changes no answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from collections.abc import Sequence as Items

from dspark.engine.sequence import Sequence


class Suspects:
    """One thread. The groups are tried one after another: while one is, no sequence of the others runs."""

    def __init__(self) -> None:
        self._groups: deque[list[Sequence]] = deque()

    @property
    def on_trial(self) -> Collection[Sequence] | None:
        """The sequences of which some step must succeed before any other may start; None: nobody is suspected."""
        return self._groups[0] if self._groups else None

    def accuse(self, sequences: Items[Sequence]) -> Sequence | None:
        """A step of exactly these failed. → the one that must be the cause: it failed before, and now it was alone."""
        if len(sequences) == 1 and any(sequences[0] in group for group in self._groups):
            return sequences[0]
        group = self._groups.popleft() if self._groups else []
        tried = [sequence for sequence in group if sequence in sequences]
        untried = [sequence for sequence in group if sequence not in sequences]
        half = (len(tried) + 1) // 2
        self._groups.extendleft(part for part in (untried, tried[half:], tried[:half]) if part)
        cleared = [sequence for sequence in sequences if not any(sequence in group for group in self._groups)]
        if cleared:
            self._groups.append(cleared)
        return None

    def clear(self, sequence: Sequence) -> None:
        """A step with it has succeeded, or it has ended."""
        for group in [group for group in self._groups if sequence in group]:
            group.remove(sequence)
            if not group:
                self._groups.remove(group)

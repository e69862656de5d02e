"""What an answer's text turns out to be, piece by piece: content, reasoning, or tool calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import Protocol


class PartKind(StrEnum):
    CONTENT = "content"
    REASONING = "reasoning"
    CALL = "call"  # a call begins; its text is the tool's name
    ARGUMENTS = "arguments"  # a piece of a call's arguments, as JSON


@dataclass(frozen=True, slots=True)
class Part:
    """call: which of the answer's calls it belongs to, from 0; for CALL and ARGUMENTS."""

    kind: PartKind
    text: str
    call: int = 0


class TextParser(Protocol):
    """Sorts the text of one choice, in pieces of any size: only the text decides what its parts are, joined."""

    @property
    def in_reasoning(self) -> bool:
        """What was fed last belongs to the reasoning."""

    @property
    def calls(self) -> int:
        """Calls begun so far."""

    @property
    def done(self) -> bool:
        """Nothing that follows will be shown."""

    def feed(self, text: str) -> list[Part]:
        """The parts that became certain with this text."""

    def finish(self) -> list[Part]:
        """What was held back, once the text is complete."""


class PlainText:
    """All text is content."""

    in_reasoning = False
    calls = 0
    done = False

    def feed(self, text: str) -> list[Part]:
        return [Part(PartKind.CONTENT, text)] if text else []

    def finish(self) -> list[Part]:
        return []


def joined(parts: Iterable[Part]) -> list[Part]:
    """The same story in as few parts as possible."""
    return [
        Part(kind, "".join(part.text for part in run), call)
        for (kind, call), run in groupby(parts, key=lambda part: (part.kind, part.call))
    ]


def held_back(text: str, marker: str) -> int:
    """Length of the longest proper beginning of `marker` that ends `text`: what cannot be shown yet."""
    for length in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:length]):
            return length
    return 0

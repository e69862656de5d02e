"""Splits `<think>…</think>` at the beginning of an answer from what follows."""

from __future__ import annotations

from dspark.server.parts import Part, PartKind, TextParser, held_back

THINK, END_THINK = "<think>", "</think>"


class ReasoningParser:
    """The reasoning, without its tags and the white space around it, then whatever `then` makes of the rest.

    An answer that does not begin with `<think>` has no reasoning, unless the prompt itself ended with the tag. One that
    ends before `</think>` is all reasoning.
    """

    def __init__(self, then: TextParser, *, begun: bool) -> None:
        """begun: the prompt ends with `<think>`, as some templates make it."""
        self._then = then
        self._feed = self._reasoning if begun else self._beginning
        self._held = ""
        self._strip = True  # the white space that comes next belongs to the tag before it
        self.in_reasoning = begun

    @property
    def calls(self) -> int:
        return self._then.calls

    @property
    def done(self) -> bool:
        return self._then.done

    def feed(self, text: str) -> list[Part]:
        return self._feed(text)

    def _beginning(self, text: str) -> list[Part]:
        self._held += text
        start = self._held.lstrip()
        if len(start) < len(THINK) and THINK.startswith(start):
            return []
        self.in_reasoning = start.startswith(THINK)
        if self.in_reasoning:
            self._feed, self._held = self._reasoning, ""
            return self._reasoning(start.removeprefix(THINK))
        self._feed, self._strip = self._rest, False
        held, self._held = self._held, ""
        return self._rest(held)

    def _reasoning(self, text: str) -> list[Part]:
        text = self._held + text
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        thought, end, rest = text.partition(END_THINK)
        if end:
            self._feed, self._held, self._strip, self.in_reasoning = self._rest, "", True, False
            return [*self._thought(thought.rstrip()), *self._rest(rest)]
        keep = held_back(text, END_THINK)
        shown = text[: len(text) - keep].rstrip()
        self._held = text[len(shown) :]
        return self._thought(shown)

    def _thought(self, text: str) -> list[Part]:
        return [Part(PartKind.REASONING, text)] if text else []

    def _rest(self, text: str) -> list[Part]:
        if self._strip:
            text = text.lstrip()
            self._strip = not text
        return self._then.feed(text)

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        if self.in_reasoning:
            return [*self._thought(held.rstrip()), *self._then.finish()]
        return [*self._then.feed(held), *self._then.finish()]

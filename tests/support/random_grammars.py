"""Grammars over token ids, as random automata: no text, no tokenizer, every rule in view."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Automaton:
    """edges[state]: token -> next state. Texts may end with `end` in the states of `final`."""

    edges: list[dict[int, int]]
    final: frozenset[int]
    end: int
    vocab_size: int

    def state_after(self, tokens: Sequence[int]) -> int:
        """Raises KeyError where a token is not allowed."""
        state = 0
        for token in tokens:
            state = self.edges[state][token]
        return state

    def accepts(self, text: Sequence[int]) -> bool:
        """A whole text, its end included."""
        try:
            return bool(text) and text[-1] == self.end and self.state_after(text[:-1]) in self.final
        except KeyError:
            return False

    def allows(self, text: Sequence[int]) -> bool:
        """A text that may go on."""
        try:
            self.state_after(text)
        except KeyError:
            return False
        return True


def random_automaton(seed: int, vocab_size: int, end: int) -> Automaton:
    """Seven states of 1 to 200 tokens each, one of them final with nothing but the end, reached late."""
    rng = np.random.default_rng(seed)
    ids = np.setdiff1d(np.arange(vocab_size), [end])
    edges: list[dict[int, int]] = []
    for state in range(6):
        tokens = rng.choice(ids, int(rng.choice([1, 2, 5, 40, 200])), replace=False).tolist()
        targets = rng.choice(6, len(tokens)).tolist()
        targets[0] = (state + 1) % 6  # no state is a dead end
        if state == 5 or rng.random() < 0.3:
            targets[-1] = 6
        edges.append(dict(zip(tokens, targets, strict=True)))
    edges.append({})
    return Automaton(edges, frozenset({6, int(rng.integers(0, 6))}), end, vocab_size)


class AutomatonGrammar:
    """The engine's `Grammar` of an automaton; counts how often it was asked to go back."""

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self._states: list[int | None] = [0]  # None: the text has ended

    def mask(self) -> NDArray[np.int32]:
        state = self._states[-1]
        assert state is not None, "asked for what follows an end"
        allowed = np.zeros(-(-self.automaton.vocab_size // 32) * 32, np.uint8)
        allowed[list(self.automaton.edges[state])] = 1
        allowed[self.automaton.end] = state in self.automaton.final
        return np.packbits(allowed, bitorder="little").view(np.int32)

    def advance(self, token_ids: Sequence[int]) -> int:
        for count, token in enumerate(token_ids):
            state = self._states[-1]
            if state is not None and token == self.automaton.end and state in self.automaton.final:
                self._states.append(None)
            elif state is not None and token in self.automaton.edges[state]:
                self._states.append(self.automaton.edges[state][token])
            else:
                return count
        return len(token_ids)

    def forced(self) -> list[int]:
        forced: list[int] = []
        state = self._states[-1]
        while state is not None and len(self.automaton.edges[state]) == 1 and state not in self.automaton.final:
            ((token, state),) = self.automaton.edges[state].items()
            forced.append(token)
            if len(forced) == 64:  # a circle
                break
        return forced

    def rollback(self, count: int) -> None:
        assert 0 <= count < len(self._states)
        del self._states[len(self._states) - count :]

"""A choice's grammar along its text: what each row of a verify block may sample, and which drafts are worth a row.

Row j of a block is masked by the grammar advanced over drafts 1..j; drafts that it forbids are cut when they are proposed,
so the rows of a block are all reachable. After the step the grammar stands where the accepted tokens end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.engine.errors import GrammarError
from dspark.engine.request import Grammar


class GrammarProgress:
    """One sequence's grammar, in the runner. Every method raises GrammarError when the grammar breaks down."""

    def __init__(
        self, make: Callable[[], Grammar], output: Sequence[int], stop_ids: frozenset[int], vocab_size: int
    ) -> None:
        """output: the tokens generated so far, after a preemption. stop_ids: all tokens that end the text."""
        self._grammar = make()
        self._stop_ids = stop_ids
        self._vocab_size = vocab_size
        self.append(output)

    def legal(self, drafts: Sequence[int]) -> int:
        """How many of `drafts` may follow, none of which ends the text: an end needs no draft, the row before it samples it."""
        end = next((i for i, token in enumerate(drafts) if token in self._stop_ids), len(drafts))
        count = self._grammar.advance(drafts[:end])
        self._grammar.rollback(count)
        return count

    def allowed(self, drafts: Sequence[int]) -> list[NDArray[np.bool_]]:
        """What may follow after each of the first 0..len(drafts) drafts, all of them legal: masks [vocab]."""
        masks = [self._allowed_now()]
        for draft in drafts:
            self._advance([draft])
            masks.append(self._allowed_now())
        self._grammar.rollback(len(drafts))
        return masks

    def forced(self) -> Sequence[int]:
        """What is worth drafting because no other text is allowed."""
        return self._grammar.forced()

    def append(self, tokens: Sequence[int]) -> None:
        """These tokens have become text."""
        self._advance(tokens)

    def _advance(self, tokens: Sequence[int]) -> None:
        taken = self._grammar.advance(tokens)
        if taken < len(tokens):
            raise GrammarError(f"the grammar does not take in token {tokens[taken]}, which it had allowed")

    def _allowed_now(self) -> NDArray[np.bool_]:
        words = self._grammar.mask()
        if not words.any():
            raise GrammarError("the grammar allows no token, not even an end of text")
        return np.unpackbits(words.view(np.uint8), count=self._vocab_size, bitorder="little").view(np.bool_)

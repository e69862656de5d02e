"""Drafting without a model: the text after the newest earlier occurrence of its last tokens is proposed again.

Source: prompt lookup decoding (Saxena 2023), with output tokens searched as well as the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dspark.engine.drafters.drafter import ContextFree, Draft, DraftRow

LOG_ODDS_BY_MATCH = (-1.1, 0.0, 0.4, 0.5, 2.3)
"""Log-odds that the first proposed token is accepted, by length of the match in tokens (1 … 5); calibrated online.

Measured on greedy answers of SmolLM2-135M-Instruct. Few matches end at a length of 3 or 4, but telling them from longer ones
matters: those, a repetition as a rule, gave 5 accepted tokens of 7, the shorter ones 2.
"""

_LONGEST_MATCH = len(LOG_ODDS_BY_MATCH)
_TOKEN_BITS = 32  # one n-gram is one integer of n such digits: cheaper than a tuple in time and memory


@dataclass(slots=True)
class NgramIndex:
    """Where each n-gram of one sequence ended last, n = 1..5. Amortised O(1) per token of the sequence."""

    length: int = 0  # n-grams that end before this position are indexed
    newest_end: tuple[dict[int, int], ...] = field(default_factory=lambda: tuple({} for _ in LOG_ODDS_BY_MATCH))

    def extend(self, tokens: NDArray[np.int64], length: int) -> None:
        """Index every n-gram that ends before position `length` of `tokens`."""
        start = max(self.length - (_LONGEST_MATCH - 1), 0)
        window: list[int] = tokens[start:length].tolist()
        for offset in range(self.length - start, len(window)):
            gram = 0
            for n in range(1, min(_LONGEST_MATCH, offset + 1) + 1):
                gram |= window[offset - n + 1] << (_TOKEN_BITS * (n - 1))
                self.newest_end[n - 1][gram] = start + offset
        self.length = length

    def longest_match(self, tokens: NDArray[np.int64]) -> tuple[int, int]:
        """The longest suffix of `tokens`, up to 5, that occurred before.

        Returns its length and the position where its newest earlier occurrence ended; (0, -1) if there is none.
        """
        found = (0, -1)
        gram = 0
        for n, token in enumerate(tokens[: -_LONGEST_MATCH - 1 : -1].tolist(), start=1):
            gram |= token << (_TOKEN_BITS * (n - 1))
            end = self.newest_end[n - 1].get(gram)
            if end is None:  # then no longer suffix occurred either
                break
            found = (n, end)
        return found


class LookupDrafter(ContextFree):
    """Proposes γ = `block_size` tokens for every sequence whose last token occurred before in it.

    A match whose continuation is shorter than γ is taken for a period and repeated.
    """

    name = "lookup"
    sources: tuple[str, ...] = (name,)

    def __init__(self, block_size: int, proposes_free: bool = False) -> None:
        """proposes_free: it stands beside a drafter that costs more, so its drafts count as free."""
        self.block_size = block_size
        self.proposes_free = proposes_free
        self._indexes: dict[int, NgramIndex] = {}

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        tokens = np.zeros((len(rows), self.block_size), np.int64)
        lengths = np.zeros(len(rows), np.int32)
        confidence = np.zeros((len(rows), self.block_size), np.float32)
        for i, row in enumerate(rows):
            matched, end = self._index_before(row).longest_match(row.tokens)
            if matched:
                period = row.position - end
                tokens[i] = row.tokens[end + 1 + np.arange(self.block_size) % period]
                lengths[i] = self.block_size
                confidence[i] = LOG_ODDS_BY_MATCH[matched - 1]
        return Draft(tokens, lengths, confidence)

    def forget(self, sequence_id: int) -> None:
        self._indexes.pop(sequence_id, None)

    def _index_before(self, row: DraftRow) -> NgramIndex:
        """The sequence's n-grams that end before the anchor, so that the anchor cannot match itself."""
        index = self._indexes.get(row.sequence_id)
        if index is None or index.length > row.position:
            # a sequence that was preempted and lost its last tokens comes back shorter than its index
            index = self._indexes[row.sequence_id] = NgramIndex()
        index.extend(row.tokens, row.position)
        return index

"""Drafting from what a request says its output will be: the text that an edit, say, will leave mostly as it was.

The output is followed along the prediction from its start. Where they part, the place at which the output goes on is looked
for by its last tokens. A prediction that misleads is listened to less and less: after each block of which nothing came true
twice as many tokens must agree before the next one, and four times as many as long as nothing of it ever did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark.engine.drafters.drafter import PREDICTION, ContextFree, Draft, DraftRow

TRUST_AT_START = 8
"""Tokens that count as having agreed before the first: the client said that the output begins like this."""
DISTRUST, FIRST_DISTRUST = 2, 4
"""Factors by which the tokens grow that must agree; the second while nothing came true yet. (In any two texts of a language
two tokens agree here and there.)"""
MOST_COMPARED = 64
"""Tokens compared when a place is looked for; no more are ever asked for, so that a prediction can always come back."""


@dataclass(slots=True)
class _Progress:
    """Of one sequence. read: tokens of it that were taken in. place: index in the prediction of what comes next.

    agreed: tokens before `place` that were the output's last ones; 0: the place is lost.  wanted: that must agree.
    proposed: the first token of the last block, -1 if there was none.  distrust: see DISTRUST.
    """

    read: int
    place: int = 0
    agreed: int = TRUST_AT_START
    wanted: int = 1
    proposed: int = -1
    distrust: int = FIRST_DISTRUST


class PredictionDrafter(ContextFree):
    """Proposes γ = `block_size` tokens, fewer at the prediction's end, for rows that have a prediction."""

    name = PREDICTION
    sources: tuple[str, ...] = (name,)
    proposes_free = False

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._sequences: dict[int, _Progress] = {}

    def forget(self, sequence_id: int) -> None:
        self._sequences.pop(sequence_id, None)

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        tokens = np.zeros((len(rows), self.block_size), np.int64)
        lengths = np.zeros(len(rows), np.int32)
        confidence = np.zeros((len(rows), self.block_size), np.float32)
        for i, row in enumerate(rows):
            if not row.predicted.size:
                continue
            progress = self._follow(row)
            block = row.predicted[progress.place : progress.place + self.block_size]
            if block.size and progress.agreed >= progress.wanted:
                tokens[i, : block.size], lengths[i] = block, block.size
                # rule of succession: after n tokens that agreed the next does with odds n + 1 to 1
                confidence[i] = math.log1p(progress.agreed)
                progress.proposed = int(block[0])
        return Draft(tokens, lengths, confidence)

    def _follow(self, row: DraftRow) -> _Progress:
        """Take in the sequence's new tokens."""
        progress = self._sequences.get(row.sequence_id)
        if progress is None or progress.read > len(row.tokens):
            progress = self._sequences[row.sequence_id] = _Progress(read=row.prompt_length)
        new = row.tokens[progress.read :]
        progress.read = len(row.tokens)
        if new.size and progress.proposed >= 0:
            if int(new[0]) == progress.proposed:
                progress.wanted, progress.distrust = 1, DISTRUST
            else:
                progress.wanted = min(progress.distrust * progress.wanted, MOST_COMPARED)
            progress.proposed = -1
        expected = row.predicted[progress.place : progress.place + new.size]
        same = int(np.append(expected == new[: expected.size], False).argmin()) if progress.agreed else 0
        progress.place += same
        progress.agreed += same
        if same < new.size:
            progress.place, progress.agreed = _find(row.tokens[row.prompt_length :], row.predicted, progress.place)
        return progress


def _find(output: NDArray[np.int64], predicted: NDArray[np.int64], lost: int) -> tuple[int, int]:
    """Where in `predicted` the output goes on: (index of the next token, tokens before it that are the output's last).

    Of the places with the most tokens in common the first one at or behind `lost`, else the first; (lost, 0): none.
    """
    ends = np.flatnonzero(predicted == output[-1])
    agreed = 0
    for back in range(1, min(MOST_COMPARED, output.size) + 1):
        longer = ends[(ends >= back - 1) & (predicted[ends - back + 1] == output[-back])]
        if not longer.size:
            break
        ends, agreed = longer, back
    if not agreed:
        return lost, 0
    behind = ends[ends >= lost]
    return int(behind[0] if behind.size else ends[0]) + 1, agreed

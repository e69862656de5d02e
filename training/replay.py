"""A drafter's rounds on answers that are already recorded, many times cheaper than serving them.

Under coupled verification the text does not depend on the drafter: what a round accepts is the longest prefix of the block
that equals the recorded tokens. So the target runs once over every answer, for the features that the drafter wants, and
then only the drafter runs. The rounds are those of an engine that verifies whole blocks (`speculation="fixed"`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dspark.engine.calibration import Calibration
from dspark.engine.drafters.drafter import Draft, Drafter, DraftRow
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.models.decoder import Decoder
from dspark.engine.noise import NoiseCache, sequence_key
from dspark.engine.startup import flat_sequences
from dspark.training.answers import Answer

ROWS = 64
"""Answers in flight: drafting for many at once costs little more than for a few."""
FIRST_CALLS = 8
"""Calls within which a drafter with a context of its own has surely read a prompt, at a few hundred tokens a call."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """N rounds of a drafter of γ tokens, grouped by answer, in order of the text.

    answer: [N] int32, place in the list of answers.  kind: [N] str, its domain.  temperature: [N] float32.
    confidence: [N, γ] float32, raw log-odds.
    survival: [N, γ] float32, calibrated as an engine would have it before the round; 0 at and beyond `proposed`.
    proposed: [N] int32.  verified: [N] int32, drafts that the target checks: all, but near the length limit.
    accepted: [N] int32, drafts that equal the answer.  left: [N] int32, tokens of the answer after the anchor, >= 1.
    source: [N] int8, which of the drafter's `sources` proposed.
    """

    answer: NDArray[np.int32]
    kind: NDArray[np.str_]
    temperature: NDArray[np.float32]
    confidence: NDArray[np.float32]
    survival: NDArray[np.float32]
    proposed: NDArray[np.int32]
    verified: NDArray[np.int32]
    accepted: NDArray[np.int32]
    left: NDArray[np.int32]
    source: NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.answer)

    @property
    def block_size(self) -> int:
        return self.confidence.shape[1]

    @property
    def emitted(self) -> NDArray[np.int32]:
        """[N] tokens given: the accepted drafts and the target's own, unless an accepted draft ended the text."""
        return np.minimum(self.accepted + 1, self.left)

    @property
    def judged(self) -> NDArray[np.int32]:
        """[N] verified drafts that predict a token of the answer; what would follow its end is not known."""
        return np.minimum(self.verified, self.left)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.intp]) -> Rounds:
        """The rounds at which `chosen` [N] is true, or those at the places that it lists."""
        return Rounds(*(getattr(self, field.name)[chosen] for field in fields(self)))

    def save(self, path: Path) -> None:
        np.savez_compressed(path, **{field.name: getattr(self, field.name) for field in fields(self)})


@dataclass(slots=True)
class _Running:
    """An answer in flight. position: of the anchor."""

    index: int
    answer: Answer
    noise_key: int
    block_table: NDArray[np.int32]
    position: int

    @property
    def left(self) -> int:
        return len(self.answer.tokens) - 1 - self.position

    def draft_row(self) -> DraftRow:
        return DraftRow(
            sequence_id=self.index,
            tokens=self.answer.tokens[: self.position + 1],
            position=self.position,
            temperature=self.answer.temperature,
            noise_key=self.noise_key,
            block_table=self.block_table,
        )


def replay(
    decoder: Decoder,
    drafter: Drafter,
    answers: Sequence[Answer],
    *,
    max_tokens: int,
    calibration: Calibration,
    noise: NoiseCache,
    rows: int = ROWS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rounds:
    """Every round of `drafter` on `answers`.

    max_tokens: the limit that the answers were recorded with.  calibration: of the drafter; learns from every round.
    noise: the cache that the drafter draws from.  rows: answers in flight, at most what the drafter was opened for.
    progress: told (tokens done, tokens in all).
    Raises ValueError where an answer stops short of `max_tokens` without an end-of-text token, or exceeds it.
    """
    _check_lengths(answers, max_tokens, frozenset(decoder.spec.eos_token_ids))
    # the first token came with the prompt: an answer of one token has no round
    waiting = [i for i, one in enumerate(answers) if len(one.tokens) - one.prompt_len >= 2][::-1]
    width = blocks_for(max((len(one.tokens) for one in answers), default=0) + drafter.block_size)
    drafter.allocate_context(rows * width, BLOCK_SIZE)
    decoder.allocate_kv(width, BLOCK_SIZE)  # the target's own K/V are wanted for one pass only
    free = list(np.arange(rows * width, dtype=np.int32).reshape(rows, width))
    running: list[_Running] = []
    steps: list[Rounds] = []
    done, total = 0, sum(len(answers[i].tokens) - answers[i].prompt_len - 1 for i in waiting)
    while running or waiting:
        while free and waiting:
            running.append(_start(decoder, drafter, waiting[-1], answers[waiting[-1]], free.pop()))
            waiting.pop()
        draft = drafter.propose([one.draft_row() for one in running])
        steps.append(_judge(running, draft, max_tokens, calibration))
        for one, emitted in zip(running, steps[-1].emitted.tolist(), strict=True):
            one.position += emitted
            noise.drop_before(one.noise_key, one.position + 1)
        for ended in [one for one in running if not one.left]:
            running.remove(ended)
            drafter.forget(ended.index)
            noise.forget(ended.noise_key)
            free.append(ended.block_table)
        done += int(steps[-1].emitted.sum())
        progress(done, total)
    return _joined(steps, drafter.block_size)


def _check_lengths(answers: Sequence[Answer], max_tokens: int, eos_token_ids: frozenset[int]) -> None:
    for one in answers:
        length, ended = len(one.tokens) - one.prompt_len, int(one.tokens[-1]) in eos_token_ids
        if length > max_tokens or (length < max_tokens and not ended):
            how = "ends" if ended else "is cut off"
            raise ValueError(
                f"an answer {how} after {length} tokens, so it was not recorded with a limit of {max_tokens}"
            )


def _start(decoder: Decoder, drafter: Drafter, index: int, answer: Answer, table: NDArray[np.int32]) -> _Running:
    """Give the drafter the target's features of the whole answer; no block sees those at or beyond its anchor.

    A drafter whose context costs a pass of its own proposes nothing before it has read the prompt, a part in each call. How
    soon it has depends on the load and says nothing about its drafts, so it is asked until it proposes.
    """
    if drafter.feature_layers:
        flat = flat_sequences([(answer.tokens, 0, np.arange(len(table), dtype=np.int32))])
        _, features = decoder.forward(flat, drafter.feature_layers)
        assert features is not None
        slots = table[flat.positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE + flat.positions % BLOCK_SIZE
        drafter.observe(features, flat.positions, slots)
    key = sequence_key(answer.seed, 0, answer.tokens[: answer.prompt_len])
    started = _Running(index, answer, key, table, answer.prompt_len)
    for _ in range(FIRST_CALLS):
        if drafter.propose([started.draft_row()]).lengths[0]:
            break
    return started


def _judge(running: Sequence[_Running], draft: Draft, max_tokens: int, calibration: Calibration) -> Rounds:
    """One round of every answer in flight, learned from."""
    temperature = np.array([one.answer.temperature for one in running], np.float32)
    left = np.array([one.left for one in running], np.int32)
    generated = np.array([one.position + 1 - one.answer.prompt_len for one in running], np.int32)
    block = draft.tokens.shape[1]
    equal = np.zeros(draft.tokens.shape, np.bool_)
    for row, one, drafts in zip(equal, running, draft.tokens, strict=True):
        known = one.answer.tokens[one.position + 1 : one.position + 1 + block]
        row[: len(known)] = drafts[: len(known)] == known
    proposed = draft.lengths.astype(np.int32)
    verified = np.minimum(proposed, max_tokens - generated - 1)
    equal &= np.arange(block) < verified[:, None]
    sampled = temperature > 0
    source = np.zeros(len(running), np.int8) if draft.source is None else draft.source
    survival = calibration.survival(draft.confidence, sampled, source)
    survival[np.arange(block) >= proposed[:, None]] = 0.0
    rounds = Rounds(
        answer=np.array([one.index for one in running], np.int32),
        kind=np.array([one.answer.kind for one in running], np.str_),
        temperature=temperature,
        confidence=draft.confidence.astype(np.float32),
        survival=survival,
        proposed=proposed,
        verified=verified,
        accepted=np.cumprod(equal, axis=1).sum(axis=1).astype(np.int32),
        left=left,
        source=source,
    )
    calibration.observe(rounds.confidence, sampled, rounds.judged, rounds.accepted, source)
    return rounds


def _joined(steps: Sequence[Rounds], block: int) -> Rounds:
    """All rounds, each answer's together and in order."""
    if not steps:
        none, reals, blocks = np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros((0, block), np.float32)
        return Rounds(none, np.zeros(0, np.str_), reals, blocks, blocks, none, none, none, none, np.zeros(0, np.int8))
    order = np.argsort(np.concatenate([step.answer for step in steps]), kind="stable")
    return Rounds(*(np.concatenate([getattr(step, f.name) for step in steps])[order] for f in fields(Rounds)))

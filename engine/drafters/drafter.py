"""What every drafter offers: propose a block of tokens per sequence, take in the target's features.

A drafter runs in the worker thread only. Its proposals never affect the text (coupled verification accepts a draft
exactly when it equals the target's own token), only the speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

Noise = Callable[[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]], torch.Tensor]
"""noise(keys [n], positions [n], rounds [n]) -> Gumbel variates [n, V] float32. Rounds are named by their anchor.

Coupled verification: the noise the target uses at these positions, whatever the round. Rejection: independent of the
target's noise, and of that of every other round.
"""


PREDICTION = "prediction"
"""Name of the source that proposes what the request predicts."""
GRAMMAR = "grammar"
"""Name of the source that proposes what the request's grammar forces."""


@dataclass(frozen=True, slots=True)
class Draft:
    """Proposals for a batch of B sequences, at most γ tokens each.

    tokens: [B, γ] int64; entries at and beyond `lengths` are undefined.
    lengths: [B] int32, tokens proposed per sequence, 0..γ (0: nothing to propose).
    confidence: [B, γ] float32, raw log-odds that draft j is accepted if all earlier ones were; calibrated later.
    probs: [B, γ, vocab] float32, the distribution each draft was drawn from; only in rejection mode.
    source: [B] int8, which of the drafter's `sources` proposed the block; None: the first.
    """

    tokens: NDArray[np.int64]
    lengths: NDArray[np.int32]
    confidence: NDArray[np.float32]
    probs: torch.Tensor | None = None
    source: NDArray[np.int8] | None = None


NO_TOKENS = np.empty(0, np.int64)


@dataclass(slots=True)
class DraftRow:
    """One sequence as a drafter sees it: everything up to and including the anchor.

    tokens: [position + 1] int64, prompt and output; the last one is the anchor, at `position`.
    temperature: of the request, 0 when greedy.       noise_key: 64-bit key of the sequence's Gumbel noise.
    prompt_length: tokens of the prompt.              predicted: int64, what the request predicts the output to be.
    forced: int64, the tokens of what the request's grammar leaves no choice about.
    legal: how many of these tokens [n] the grammar allows; None: it has no grammar.
    width: slots that are worth drafting; one that drafts more for nothing may. None: the whole block.
    """

    sequence_id: int
    tokens: NDArray[np.int64]
    position: int
    temperature: float
    noise_key: int
    block_table: NDArray[np.int32]
    free_only: bool = False  # propose what costs nothing, or nothing
    prompt_length: int = 0
    predicted: NDArray[np.int64] = field(default_factory=lambda: NO_TOKENS)
    forced: NDArray[np.int64] = field(default_factory=lambda: NO_TOKENS)
    legal: Callable[[NDArray[np.int64]], int] | None = None
    width: int | None = None


def widest(rows: Sequence[DraftRow], block_size: int) -> int:
    """Slots to draft for rows that share a pass."""
    return max(block_size if row.width is None else min(row.width, block_size) for row in rows)


class Drafter(Protocol):
    name: str
    proposes_free: bool  # there may be something to propose for `free_only` rows that bring no prediction or grammar
    sources: tuple[str, ...]  # names of the drafters it combines, its own alone if it is one
    block_size: int  # γ, tokens of a full proposal
    feature_layers: tuple[int, ...]  # target layers whose output `observe` wants; empty: none

    def bytes_per_block(self, block_size: int) -> int:
        """Context K/V bytes per KV block of `block_size` tokens; 0 for a drafter without context."""

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        """Make the context K/V tensors, addressed by the same block ids as the target's."""

    def observe(self, features: torch.Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        """Inject context K/V for every row of a target pass.

        features: [rows, len(feature_layers) * hidden]; positions: [rows]; slots: [rows], block id * block size + offset.
        Rows of rejected drafts may be among them: they lie beyond the sequence and are overwritten later.
        """

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        """Draft the next block of each sequence."""

    def forget(self, sequence_id: int) -> None:
        """The sequence has ended; drop what was kept for it."""


class ContextFree:
    """The parts of a drafter that looks at the rows alone and needs no features of the target."""

    feature_layers: tuple[int, ...] = ()

    def bytes_per_block(self, block_size: int) -> int:
        return 0

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        """Nothing to make."""

    def observe(self, features: torch.Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        """Nothing to inject."""

    def forget(self, sequence_id: int) -> None:
        """Nothing is kept."""

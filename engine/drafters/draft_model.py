"""A small causal language model of the same vocabulary as drafter: γ passes of it, one per drafted token.

Its K/V are paged under the target's block ids; a few blocks behind them take the drafted positions for which the target
has not allocated a block yet. Only positions before the anchor are context; how they come to be valid is `catch_up`'s.
K/V of drafts that were then accepted stay, those of rejected ones are overwritten.
Source: Leviathan et al. 2023; Chen et al. 2023.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.engine.config import EngineConfig, VerificationMode
from dspark.engine.drafters.catch_up import CatchUp, ContextChunks
from dspark.engine.drafters.checkpoint_config import as_drafter_error, drafter_error
from dspark.engine.drafters.draft_places import drafting_tables, flat_positions, scratch_blocks_per_row, slots_at
from dspark.engine.drafters.drafter import Draft, DraftRow, Noise, widest
from dspark.engine.drafters.token_draws import TokenDraws
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import Decoder, FlatBatch, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights

log = logging.getLogger(__name__)

DRAFT_MODEL_TOKENS = 5
"""γ when none is asked for: each drafted token costs a pass, so a long block must be worth it."""
CATCH_UP_TOKENS = 256
"""Context tokens computed per call."""


class DraftModelDrafter:
    """One small model and its K/V of every sequence."""

    name = "draft_model"
    sources: tuple[str, ...] = (name,)
    proposes_free = False
    feature_layers: tuple[int, ...] = ()

    def __init__(
        self, decoder: Decoder, block_size: int, *, max_num_seqs: int, verification: VerificationMode, noise: Noise
    ) -> None:
        """decoder: the small model, with rotary tables for `block_size` positions past the longest sequence.

        block_size: γ. max_num_seqs: sequences of the largest batch.
        """
        self.block_size = block_size
        self._decoder = decoder
        self._catch_up = CatchUp(CATCH_UP_TOKENS, round_tokens=block_size + 1)
        self._max_num_seqs = max_num_seqs
        self._verification = verification
        self._noise = noise

    def bytes_per_block(self, block_size: int) -> int:
        return self._decoder.bytes_per_block(block_size)

    def allocate_context(self, num_blocks: int, block_size: int) -> None:
        """Make the K/V, plus scratch blocks for a draft block of each sequence of the largest batch."""
        self._kv_block_size = block_size
        spare = scratch_blocks_per_row(self.block_size, block_size)
        scratch = np.arange(num_blocks, num_blocks + self._max_num_seqs * spare, dtype=np.int32)
        self._scratch = scratch.reshape(self._max_num_seqs, spare)
        self._decoder.allocate_kv(num_blocks + self._scratch.size, block_size)
        self._catch_up.allocate(block_size)

    def observe(self, features: Tensor, positions: NDArray[np.int32], slots: NDArray[np.int64]) -> None:
        """Nothing to take in: the tokens are the input."""

    def propose(self, rows: Sequence[DraftRow]) -> Draft:
        """Draft the tokens that are wanted for each of at most `max_num_seqs` rows, none without a computed context."""
        if not rows:
            return TokenDraws([], self._verification, self._noise).draft(self.block_size, np.zeros(0, np.bool_))
        assert len(rows) <= self._max_num_seqs, "each row needs scratch blocks"
        tables = drafting_tables(rows, self.block_size, self._kv_block_size, self._scratch[: len(rows)])
        chunks = self._catch_up.plan(rows)
        hidden = self._context_pass(rows, chunks, tables)
        self._catch_up.computed(rows, chunks)
        ready = [row for row, is_ready in zip(rows, chunks.ready.tolist(), strict=True) if is_ready]
        draws = TokenDraws(ready, self._verification, self._noise)
        if ready:
            fed = self._draft(ready, hidden, tables[chunks.ready], draws)
            for row, tokens in zip(ready, fed, strict=True):
                self._catch_up.drafted(row, tokens)
        return draws.draft(self.block_size, chunks.ready)

    def forget(self, sequence_id: int) -> None:
        self._catch_up.forget(sequence_id)

    def _context_pass(self, rows: Sequence[DraftRow], chunks: ContextChunks, tables: NDArray[np.int32]) -> Tensor:
        """Compute the chunks, and in the same pass the anchors of the rows that are ready; their hidden states [R, d]."""
        ends = chunks.ends + chunks.ready
        owners, positions = flat_positions(chunks.starts, ends.astype(np.int32))
        row_starts = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(ends - chunks.starts, out=row_starts[1:])
        tokens = [row.tokens[s:e] for row, s, e in zip(rows, chunks.starts.tolist(), ends.tolist(), strict=True)]
        slots = slots_at(tables, owners, positions, self._kv_block_size)
        flat = FlatBatch(np.concatenate(tokens), positions, slots, tables, row_starts, chunks.starts)
        hidden, _ = self._decoder.forward(flat)
        return hidden[torch.from_numpy(row_starts[1:][chunks.ready].astype(np.int64) - 1)]

    def _draft(
        self, rows: Sequence[DraftRow], hidden: Tensor, tables: NDArray[np.int32], draws: TokenDraws
    ) -> NDArray[np.int64]:
        """Draw the widest row's w tokens for each; returns what the model has read from the anchor on, [R, w].

        hidden: [R, d], of the anchors. The last token drawn is not read: nothing follows it.
        """
        owners = np.arange(len(rows))
        row_starts = np.arange(len(rows) + 1, dtype=np.int32)
        anchor_positions = np.array([row.position for row in rows], np.int32)
        read = [np.array([row.tokens[row.position] for row in rows], np.int64)]
        for drawn in range(1, widest(rows, self.block_size)):
            tokens = draws.draw(self._decoder.logits(hidden))
            read.append(tokens)
            positions = anchor_positions + np.int32(drawn)
            slots = slots_at(tables, owners, positions, self._kv_block_size)
            hidden, _ = self._decoder.forward(FlatBatch(tokens, positions, slots, tables, row_starts, positions))
        draws.draw(self._decoder.logits(hidden))
        return np.stack(read, axis=1)


def open_draft_model(
    folder: Path, config: EngineConfig, target: Decoder, max_model_len: int, noise: Noise
) -> DraftModelDrafter:
    """Load the causal language model in `folder` as a drafter. Raises ConfigError("drafter")."""
    block_size = config.num_speculative_tokens or DRAFT_MODEL_TOKENS
    try:
        spec = read_spec(folder)
        if spec.vocab_size != target.spec.vocab_size:
            raise drafter_error(
                f"its vocabulary has {spec.vocab_size} ids but the target's has {target.spec.vocab_size}; "
                "a draft model must share the target's tokenizer"
            )
        weights = load_weights(folder, spec, target.dtype)
        decoder = Decoder(spec, weights, max_model_len + block_size, LinearFactory())
    except ConfigError as error:
        raise as_drafter_error(error) from error
    if spec.max_position < max_model_len:
        log.warning(
            "the draft model knows %d positions and sequences may have %d: drafts beyond will seldom be accepted",
            spec.max_position,
            max_model_len,
        )
    return DraftModelDrafter(
        decoder, block_size, max_num_seqs=config.max_num_seqs, verification=config.verification, noise=noise
    )

"""From the head's output to the logits that are sampled from: processors per row, each with the context of its row.

Row j of a verify block is sampled as if the sequence ended with drafts 1..j, so penalties count those drafts and the
minimum length knows its position. Draft logits are never touched: processors act on the target's alone. A grammar's mask
comes first of all: what it forbids can neither be sampled nor decide what else is worth computing in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.noise import NoiseCache
from dspark.engine.request import SamplingParams, TokenLogprob
from dspark.kernels.coupled_sampling import argmax_rows, refine_logits, sample_rows

SMALLEST_PENALTY = 1e-30
"""A smaller one would make logits infinite in fp32, and NaN of what is forbidden; the order of tokens is the same."""


class SamplingState:
    """One sequence's parameters and counts, in the runner."""

    def __init__(
        self,
        params: SamplingParams,
        noise_key: int,
        prompt: NDArray[np.int64],
        stop_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        """stop_ids: all tokens that may end the text; masked while the output is shorter than `min_tokens`."""
        self.params = params
        self.noise_key = noise_key
        self.temperature = 0.0 if params.greedy else params.temperature
        self.stop_ids = stop_ids
        self._prompt_len = len(prompt)
        self._masked = np.array(sorted(stop_ids), np.int64)
        self._bias_ids = np.array(list(params.logit_bias), np.int64)
        self._bias = np.array(list(params.logit_bias.values()), np.float32)
        self._penalised = bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
        self._output_counts = np.zeros(vocab_size, np.float32) if self._penalised else None
        self._seen = np.zeros(vocab_size, np.bool_) if params.repetition_penalty != 1.0 else None
        if self._seen is not None:
            self._seen[prompt] = True

    @property
    def plain_greedy(self) -> bool:
        """The token is the argmax of the raw logits, at every position."""
        return (
            self.temperature == 0.0 and not self._penalised and not self._bias_ids.size and not self.params.min_tokens
        )

    def append(self, tokens: Sequence[int]) -> None:
        """Output tokens have been committed."""
        if self._output_counts is not None:
            np.add.at(self._output_counts, tokens, 1.0)
        if self._seen is not None:
            self._seen[tokens] = True

    def process(self, logits: NDArray[np.float32], position: int, drafts: NDArray[np.int64]) -> None:
        """Apply bias, minimum length and penalties in place to the row that samples the token at `position`.

        logits: [vocab], -inf where a grammar forbids the token; drafts: the drafts before that position in this block, as
        if they were output. Where a grammar lets the text do nothing but end, it ends before its minimum length.
        """
        params = self.params
        if self._bias_ids.size:
            logits[self._bias_ids] += self._bias
        if position - self._prompt_len < params.min_tokens:
            ends = logits[self._masked]
            logits[self._masked] = -np.inf
            if logits.max() == -np.inf:
                logits[self._masked] = ends
        if self._output_counts is None:
            return
        counts = self._output_counts
        if drafts.size:
            counts = counts.copy()
            np.add.at(counts, drafts, 1.0)
        if self._seen is not None:
            seen = np.flatnonzero(self._seen | (counts > 0))
            values = logits[seen]
            rate = np.float32(max(params.repetition_penalty, SMALLEST_PENALTY))
            logits[seen] = np.where(values > 0, values / rate, values * rate)
        logits -= np.float32(params.frequency_penalty) * counts + np.float32(params.presence_penalty) * (counts > 0)


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row of head output: it samples the token at `position`, after `drafts` of the same block.

    allowed: [vocab], the tokens that a grammar allows there; None: all.
    """

    state: SamplingState
    position: int
    drafts: NDArray[np.int64]
    allowed: NDArray[np.bool_] | None = None

    @property
    def plain_greedy(self) -> bool:
        """The token is the argmax of the raw logits."""
        return self.allowed is None and self.state.plain_greedy


class Sampler:
    """Target tokens by coupled sampling. `head_weight`: [vocab, hidden], for what bfloat16 logits leave undecided."""

    def __init__(self, head_weight: torch.Tensor, noise: NoiseCache) -> None:
        self._head_weight = head_weight
        self._noise = noise

    def sample(self, logits: torch.Tensor, hidden: torch.Tensor, rows: Sequence[SampleRow]) -> NDArray[np.int64]:
        """logits: [rows, vocab], hidden: [rows, hidden size], in the model's dtype → the target's tokens [rows]."""
        plain = [i for i, row in enumerate(rows) if row.plain_greedy]
        if len(plain) == len(rows):
            return argmax_rows(logits, hidden, self._head_weight)
        tokens = np.empty(len(rows), np.int64)
        if plain:
            tokens[plain] = argmax_rows(logits[plain], hidden[plain], self._head_weight)
        others = [i for i, row in enumerate(rows) if not row.plain_greedy]
        chosen = [rows[i] for i in others]
        params = [row.state.params for row in chosen]
        tokens[others] = sample_rows(
            self.processed(logits[others], hidden[others], chosen),
            np.array([row.state.temperature for row in chosen], np.float32),
            np.array([p.top_k for p in params], np.int64),
            np.array([p.top_p for p in params], np.float32),
            np.array([p.min_p for p in params], np.float32),
            self._noise_of(chosen),
        )
        return tokens

    def processed(self, logits: torch.Tensor, hidden: torch.Tensor, rows: Sequence[SampleRow]) -> NDArray[np.float32]:
        """fp32 logits after every processor, before the temperature: [rows, vocab]."""
        values = self.raw(logits, hidden, [row.allowed for row in rows])
        for row, one in zip(values, rows, strict=True):
            one.state.process(row, one.position, one.drafts)
        return values

    def raw(
        self, logits: torch.Tensor, hidden: torch.Tensor, allowed: Sequence[NDArray[np.bool_] | None] = ()
    ) -> NDArray[np.float32]:
        """fp32 logits [rows, vocab], those that matter computed in fp32 where the head gives bfloat16.

        allowed: per row, None where all tokens are; the others' logits are -inf.
        """
        values: NDArray[np.float32] = logits.float().numpy()
        if logits.dtype == torch.float32:
            values = values.copy()
        for row, mask in zip(values, allowed, strict=False):
            if mask is not None:
                row[~mask] = -np.inf
        if logits.dtype != torch.float32:
            refine_logits(values, hidden.contiguous(), self._head_weight)
        return values

    def _noise_of(self, rows: Sequence[SampleRow]) -> NDArray[np.float32]:
        """[rows, vocab]; rows of greedy sequences stay 0."""
        sampled = [i for i, row in enumerate(rows) if row.state.temperature > 0]
        if not sampled:
            return np.empty((len(rows), 0), np.float32)
        keys = np.array([rows[i].state.noise_key for i in sampled], np.uint64)
        positions = np.array([rows[i].position for i in sampled], np.int64)
        if len(sampled) == len(rows):
            return self._noise.rows(keys, positions)
        noise = np.zeros((len(rows), self._noise.vocab_size), np.float32)
        noise[sampled] = self._noise.rows(keys, positions)
        return noise


def token_logprobs(raw_logits: NDArray[np.float32], token: int, count: int) -> TokenLogprob:
    """Log-probabilities of the raw target distribution [vocab] at one position: of `token` and of the `count` likeliest."""
    wide = raw_logits.astype(np.float64)
    highest = wide.max()
    normaliser = highest + np.log(np.exp(wide - highest).sum())
    top: list[int] = []
    if count:
        candidates = np.argpartition(-wide, count - 1)[:count]
        top = candidates[np.lexsort((candidates, -wide[candidates]))].tolist()
    return TokenLogprob(token, float(wide[token] - normaliser), tuple((i, float(wide[i] - normaliser)) for i in top))

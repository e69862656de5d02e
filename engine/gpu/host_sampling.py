"""Requests whose tokens are sampled on the host: what their logits go through exists on the CPU only.

Grammars, penalties, logit_bias and min_tokens change logits with a request's own state; logprobs reads all of a row. The
step in which one of them takes part is not captured, waits for the device, copies the rows of these requests (only these)
to the host, samples them by `engine/sampling.py` and writes the tokens back before anything is accepted. The noise is the
same on both sides, to the bit, so the tokens are those that any other way of serving the request gives.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Items

import numpy as np
import torch
from numpy.typing import NDArray

from dspark.engine.errors import GrammarError
from dspark.engine.gpu.target_round import TargetPass
from dspark.engine.grammar import GrammarProgress
from dspark.engine.noise import NoiseCache
from dspark.engine.request import Request
from dspark.engine.runner import SequenceState
from dspark.engine.sampling import Sampler, SampleRow, SamplingState, token_logprobs
from dspark.engine.sequence import Round, Sequence
from dspark.engine.verification import accept_coupled

log = logging.getLogger(__name__)


def needs_host(request: Request) -> bool:
    params = request.sampling
    return (
        request.make_grammar is not None
        or params.logprobs is not None
        or params.min_tokens > 0
        or bool(params.logit_bias)
        or bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)
    )


class HostSampling:
    """Keeps these sequences' state and samples their rows."""

    def __init__(self, stop_token_ids: frozenset[int], vocab_size: int) -> None:
        """stop_token_ids: the model's own ends of text."""
        self._warned = False
        self._stop_token_ids = stop_token_ids
        self._noise = NoiseCache(vocab_size)
        # float32 logits leave nothing undecided, so no hidden states or weights are needed
        self._sampler = Sampler(torch.empty((vocab_size, 0)), self._noise)
        self._states: dict[int, SequenceState] = {}

    def start(self, sequence: Sequence) -> None:
        """The sequence enters the runner, perhaps again."""
        request = sequence.record.request
        if not needs_host(request):
            return
        params = request.sampling
        stop_ids = (frozenset() if params.ignore_eos else self._stop_token_ids) | frozenset(params.stop_token_ids)
        tokens = np.array(sequence.tokens, np.int64)
        vocab_size = self._noise.vocab_size
        sampling = SamplingState(params, sequence.noise_key, tokens[: sequence.prompt_len], stop_ids, vocab_size)
        output = sequence.tokens[sequence.prompt_len :]
        sampling.append(output)
        limit = sequence.prompt_len + sequence.max_tokens
        state = self._states[sequence.id] = SequenceState(sampling, tokens, len(tokens), limit)
        if request.make_grammar is not None:
            try:
                state.grammar = GrammarProgress(request.make_grammar, output, stop_ids, vocab_size)
            except GrammarError as error:
                state.failure = error

    def forget(self, sequence_id: int) -> None:
        state = self._states.pop(sequence_id, None)
        if state is not None:
            self._noise.forget(state.sampling.noise_key)

    def among(self, sequences: Items[Sequence]) -> list[int]:
        """Places of those that are sampled here."""
        return [i for i, sequence in enumerate(sequences) if sequence.id in self._states]

    def has_grammar(self, sequence: Sequence) -> bool:
        return sequence.record.request.make_grammar is not None

    def legal(self, sequence: Sequence, drafts: NDArray[np.int64]) -> int:
        """How many of the drafts the sequence's grammar allows; all of them without one."""
        state = self._states.get(sequence.id)
        return len(drafts) if state is None else state.legal(drafts)

    def sample(self, done: TargetPass, sequences: Mapping[int, Sequence]) -> dict[int, Round]:
        """Sample the rows of `sequences`, by place in the batch, and put the tokens into the pass; waits for the device.

        Returns the rounds by sequence id, of those that have rows.
        """
        if not self._warned:
            self._warned = True
            log.warning(
                "a request has a grammar, penalties, logit_bias, min_tokens or logprobs: tokens of such requests are "
                "sampled on the host, and the steps they take part in wait for the device"
            )
        starts = done.sampled.starts.cpu().numpy()
        places = [place for place in sequences if starts[place + 1] > starts[place]]
        if not places:
            return {}
        at = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
        index = torch.from_numpy(at.astype(np.int64)).to(done.tokens.device)
        fed, logits = done.sampled.fed[index].cpu().numpy(), done.logits[index].cpu()
        tokens = np.empty(len(at), np.int64)
        rounds, begin = {}, 0
        for place in places:
            block = slice(begin, begin + int(starts[place + 1] - starts[place]))
            begin = block.stop
            sequence = sequences[place]
            tokens[block], rounds[sequence.id] = self._round(sequence, fed[block][1:], logits[block])
        done.tokens.index_copy_(0, index, torch.from_numpy(tokens).to(done.tokens.device))
        return rounds

    def _round(
        self, sequence: Sequence, drafts: NDArray[np.int64], logits: torch.Tensor
    ) -> tuple[NDArray[np.int64], Round]:
        """(tokens of all rows [n + 1], the round) of one sequence; drafts: [n]; logits: [n + 1, vocab]."""
        state = self._states[sequence.id]
        state.drafts = drafts
        rows = [
            SampleRow(state.sampling, state.length + j, drafts[:j], allowed)
            for j, allowed in enumerate(state.allowed(len(drafts)))
        ]
        nothing = torch.empty((len(rows), 0))
        tokens = self._sampler.sample(logits, nothing, rows)
        accepted = accept_coupled(drafts, tokens)
        given = tokens[: accepted + 1].tolist()
        if state.failure is None:
            state.append(given)
        self._noise.drop_before(state.sampling.noise_key, state.length)
        if state.failure is not None:
            return tokens, Round([], len(drafts), 0, None, state.failure)
        count = state.sampling.params.logprobs
        logprobs = None
        if count is not None:
            raw = logits[: len(given)].numpy()
            logprobs = [token_logprobs(row, token, count) for row, token in zip(raw, given, strict=True)]
        return tokens, Round(given, len(drafts), accepted, logprobs)

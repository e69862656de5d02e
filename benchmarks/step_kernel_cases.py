"""The kernels of a step around the forward passes: noise, sampling, acceptance, budget, and the drafter's Markov head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dspark.benchmarks.host_device import host_accept_drafts, host_fill_budget
from dspark.benchmarks.kernel_cases import Inputs, KernelCase, Launch, Shape, positions
from dspark.benchmarks.qwen3 import Model
from dspark.kernels import coupled_sampling as cpu_sampling
from dspark.kernels import gumbel_noise as cpu_noise
from dspark.kernels import markov_step as cpu_markov
from dspark.kernels.gpu import budget_fill, coupled_sampling, gumbel_noise, markov_step

LOGIT = 4
"""Bytes of a float32 logit."""


def _noise(keys: Tensor, at: Tensor, vocab: int) -> np.ndarray:
    """[rows, vocab], the CPU's."""
    places = at.cpu().numpy()
    return cpu_noise.gumbel_noise(keys.cpu().numpy().view(np.uint64), places, np.zeros_like(places), vocab)


def _gumbel_noise(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    vocab = model.target.vocab_size
    keys, at = inputs.integers(1 << 62, shape.total), positions(shape, inputs).long()

    def run() -> Tensor:
        return gumbel_noise.gumbel_noise(keys, at, torch.zeros_like(at), vocab)

    def check() -> None:
        assert np.array_equal(run().cpu().numpy(), _noise(keys, at, vocab))

    return Launch(run, check)


def _sampling(top_p: float) -> Callable[[Model, Shape, Inputs], Launch]:
    """At temperature 1. What top_p keeps is the CPU's but within 1e-7 of a threshold, which no row here is."""

    def prepare(model: Model, shape: Shape, inputs: Inputs) -> Launch:
        rows, vocab = shape.total, model.target.vocab_size
        logits = inputs.normal(rows, vocab, dtype=torch.float32)
        keys, at = inputs.integers(1 << 62, rows), positions(shape, inputs).long()
        temperature, kept, min_p = (inputs.full(value, rows, torch.float32) for value in (1.0, top_p, 0.0))
        params = temperature, inputs.full(0, rows, torch.int64), kept, min_p

        def run() -> Tensor:
            return coupled_sampling.sample_rows(logits, *params, keys, at)

        def check() -> None:
            t, k, p, m = (one.cpu().numpy() for one in params)
            noise = _noise(keys, at, vocab)
            expected = cpu_sampling.sample_rows_reference(logits.cpu().numpy(), t, k, p, m, noise)
            assert np.array_equal(run().cpu().numpy(), expected)

        return Launch(run, check)

    return prepare


def _accept_drafts(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    fed, tokens = inputs.integers(2, shape.total), inputs.integers(2, shape.total)
    starts = torch.arange(shape.sequences + 1, dtype=torch.int32, device=inputs.device) * shape.rows

    def check() -> None:
        got = coupled_sampling.accept_drafts(fed, tokens, starts)
        expected = host_accept_drafts(fed.cpu(), tokens.cpu(), starts.cpu())
        assert all(torch.equal(one.cpu(), other) for one, other in zip(got, expected, strict=True))

    return Launch(lambda: coupled_sampling.accept_drafts(fed, tokens, starts), check)


def _fill_budget(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    sequences, block = shape.sequences, model.draft.block_size
    conditional = torch.sigmoid(inputs.normal(sequences, block, dtype=torch.float32))
    survival = conditional.cumprod(1).contiguous()
    caps = inputs.full(block, sequences, torch.int32)
    budget = inputs.full(sequences * block // 2, 1, torch.int32)

    def check() -> None:
        got = budget_fill.fill_budget(survival, caps, budget)
        assert torch.equal(got.cpu(), host_fill_budget(survival.cpu(), caps.cpu(), budget.cpu()))

    return Launch(lambda: budget_fill.fill_budget(survival, caps, budget), check)


def _markov_step(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    sequences, draft = shape.sequences, model.draft
    logits = inputs.normal(sequences, draft.block_size, draft.vocab_size)
    w1, w2 = (inputs.normal(draft.vocab_size, draft.markov_rank) * draft.markov_rank**-0.25 for _ in range(2))
    anchors, keys = inputs.integers(draft.vocab_size, sequences), inputs.integers(1 << 62, sequences)
    temperature = inputs.full(1.0, sequences, torch.float32)
    at = shape.context + torch.arange(1, draft.block_size + 1, device=inputs.device).repeat(sequences, 1)

    def run() -> Tensor:
        return markov_step.markov_block(logits, anchors, w1, w2, temperature, keys, at)

    def check() -> None:
        got = run().cpu()
        expected = cpu_markov.markov_block_reference(
            logits.cpu(), anchors.cpu(), w1.cpu(), w2.cpu(), temperature.cpu(), keys.cpu(), at.cpu()
        )
        # sums are added in another order: of nearly equal scores either may win, once in a hundred blocks at most
        different = (got != expected).any(dim=1).float().mean()
        assert different <= 0.01, f"{different:.0%} of the blocks differ"

    return Launch(run, check)


def _draft_markov_bytes(model: Model, shape: Shape, element: int) -> int:
    draft = model.draft
    return markov_step.bytes_moved(shape.sequences, draft.block_size, draft.vocab_size, draft.markov_rank, element)


STEP_KERNELS: Sequence[KernelCase] = (
    KernelCase(
        "sample_rows",
        lambda m, s, e: coupled_sampling.bytes_moved(s.total, m.target.vocab_size, LOGIT),
        _sampling(top_p=1.0),
        prompts=False,
    ),
    KernelCase(
        "sample_rows, top_p",
        lambda m, s, e: coupled_sampling.bytes_moved(s.total, m.target.vocab_size, LOGIT, truncating_rows=s.total),
        _sampling(top_p=0.95),
        prompts=False,
    ),
    KernelCase(
        "gumbel_noise",
        lambda m, s, e: gumbel_noise.bytes_moved(s.total, m.target.vocab_size),
        _gumbel_noise,
        prompts=False,
    ),
    KernelCase("accept_drafts", None, _accept_drafts, prompts=False),
    KernelCase(
        "fill_budget",
        lambda m, s, e: budget_fill.bytes_moved(s.sequences, m.draft.block_size),
        _fill_budget,
        drafting=True,
        prompts=False,
    ),
    KernelCase("markov_block", _draft_markov_bytes, _markov_step, drafting=True, prompts=False),
)

"""The kernels of a forward pass, target's and drafter's, at a model's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.benchmarks.byte_floor import attention_bytes, draft_attention_bytes
from dspark.benchmarks.kernel_cases import Inputs, KernelCase, Launch, Shape, positions
from dspark.benchmarks.qwen3 import Model
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.models.rope import rope_tables
from dspark.kernels import draft_attention as cpu_draft_attention
from dspark.kernels import paged_attention as cpu_attention
from dspark.kernels import rms_norm as cpu_norm
from dspark.kernels import rope_kv_write as cpu_rope
from dspark.kernels import silu_mul as cpu_silu
from dspark.kernels.gpu import draft_attention, paged_attention, rms_norm, rope_kv_write, silu_mul


def _rms_norm(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    hidden, eps = model.target.hidden_size, model.target.rms_norm_eps
    x, weight = inputs.normal(shape.total, hidden), inputs.normal(hidden)

    def check() -> None:
        inputs.close(rms_norm.rms_norm(x, weight, eps), cpu_norm.rms_norm_reference(x, weight, eps))

    return Launch(lambda: rms_norm.rms_norm(x, weight, eps), check)


def _add_rms_norm(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    hidden, eps = model.target.hidden_size, model.target.rms_norm_eps
    x, weight = inputs.normal(shape.total, hidden), inputs.normal(hidden)
    residual = inputs.normal(shape.total, hidden, dtype=torch.float32)

    def check() -> None:
        own, other = residual.clone(), residual.clone()
        got = rms_norm.add_rms_norm(x, own, weight, eps)
        inputs.close(got, cpu_norm.add_rms_norm_reference(x, other, weight, eps))
        assert torch.equal(own, other)

    return Launch(lambda: rms_norm.add_rms_norm(x, residual, weight, eps), check)


def _silu_mul(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    gate_up = inputs.normal(shape.total, 2 * model.target.intermediate_size)

    def check() -> None:
        inputs.close(silu_mul.silu_mul(gate_up), cpu_silu.silu_mul_reference(gate_up))

    return Launch(lambda: silu_mul.silu_mul(gate_up), check)


@dataclass(frozen=True, slots=True)
class _Cache:
    """A paged cache of one layer in which every sequence of a shape has blocks of its own, in no order."""

    k: Tensor
    v: Tensor
    tables: Tensor

    @classmethod
    def of(cls, model: Model, sequences: int, tokens: int, inputs: Inputs) -> _Cache:
        heads, dim, width = model.target.num_kv_heads, model.target.head_dim, blocks_for(tokens)
        blocks = sequences * width
        order = torch.from_numpy(np.random.default_rng(0).permutation(blocks).astype(np.int32))
        return cls(
            inputs.normal(blocks, heads, dim, BLOCK_SIZE),
            inputs.normal(blocks, heads, BLOCK_SIZE, dim),
            order.view(sequences, width).to(inputs.device),
        )


def _rope_kv_write(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    spec, tokens = model.target, shape.context + shape.rows
    heads, dim = spec.num_heads, spec.head_dim
    cache, at = _Cache.of(model, shape.sequences, tokens, inputs), positions(shape, inputs)
    owners = torch.arange(shape.total, device=inputs.device) // shape.rows
    blocks = cache.tables[owners, (at // BLOCK_SIZE).long()].long()
    slots = blocks * BLOCK_SIZE + at % BLOCK_SIZE
    cos, sin = (table.to(inputs.device) for table in rope_tables(spec.rope, dim, tokens))
    qkv = inputs.normal(shape.total, (heads + 2 * spec.num_kv_heads) * dim)
    norms = inputs.normal(dim), inputs.normal(dim)

    def run(k: Tensor = cache.k, v: Tensor = cache.v) -> Tensor:
        return rope_kv_write.rope_kv_write(qkv, at, slots, cos, sin, k, v, *norms, spec.rms_norm_eps)

    def check() -> None:
        own, other = (cache.k.clone(), cache.v.clone()), (cache.k.clone(), cache.v.clone())
        given = qkv, at, slots, cos, sin
        inputs.close(run(*own), cpu_rope.rope_kv_write_reference(*given, *other, *norms, spec.rms_norm_eps))
        inputs.close(own[0], other[0])
        assert torch.equal(own[1], other[1])

    return Launch(run, check)


def _paged_attention(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    spec = model.target
    cache = _Cache.of(model, shape.sequences, shape.context + shape.rows, inputs)
    q = inputs.normal(shape.total, spec.num_heads, spec.head_dim)
    starts = torch.arange(shape.sequences + 1, dtype=torch.int32, device=inputs.device) * shape.rows
    firsts = inputs.full(shape.context, shape.sequences, torch.int32)
    scale = spec.head_dim**-0.5

    def run() -> Tensor:
        return paged_attention.paged_attention(q, cache.k, cache.v, cache.tables, starts, firsts, scale)

    def check() -> None:
        expected = cpu_attention.paged_attention_reference(
            q.cpu(),
            cache.k.cpu(),
            cache.v.cpu(),
            cache.tables.cpu().numpy(),
            starts.cpu().numpy(),
            firsts.cpu().numpy(),
            scale,
        )
        inputs.close(run().cpu(), expected)

    return Launch(run, check)


def _draft_attention(model: Model, shape: Shape, inputs: Inputs) -> Launch:
    spec, width = model.target, model.draft.block_size
    # the last block of each sequence is where its draft block goes
    cache = _Cache.of(model, shape.sequences, shape.context + BLOCK_SIZE, inputs)
    tables, scratch = cache.tables[:, :-1].contiguous(), cache.tables[:, -1].contiguous()
    q = inputs.normal(shape.sequences * width, spec.num_heads, spec.head_dim)
    lengths = inputs.full(shape.context, shape.sequences, torch.int32)
    scale = spec.head_dim**-0.5

    def run() -> Tensor:
        return draft_attention.draft_attention(q, cache.k, cache.v, tables, lengths, scratch, width, scale)

    def check() -> None:
        expected = cpu_draft_attention.draft_attention_reference(
            q.cpu(),
            cache.k.cpu(),
            cache.v.cpu(),
            tables.cpu().numpy(),
            lengths.cpu().numpy(),
            scratch.cpu().numpy(),
            width,
            scale,
        )
        inputs.close(run().cpu(), expected)

    return Launch(run, check)


def _rope_bytes(model: Model, shape: Shape, element: int) -> int:
    spec = model.target
    return rope_kv_write.bytes_moved(shape.total, spec.num_heads, spec.num_kv_heads, spec.head_dim, element)


MODEL_KERNELS: Sequence[KernelCase] = (
    KernelCase(
        "rms_norm", lambda m, s, e: rms_norm.bytes_moved(s.total, m.target.hidden_size, e, add=False), _rms_norm
    ),
    KernelCase("add_rms_norm", lambda m, s, e: rms_norm.bytes_moved(s.total, m.target.hidden_size, e), _add_rms_norm),
    KernelCase("rope_kv_write", _rope_bytes, _rope_kv_write),
    KernelCase(
        "paged_attention", lambda m, s, e: attention_bytes(m, s.sequences, s.rows, s.context, e), _paged_attention
    ),
    KernelCase("silu_mul", lambda m, s, e: silu_mul.bytes_moved(s.total, m.target.intermediate_size, e), _silu_mul),
    KernelCase(
        "draft_attention",
        lambda m, s, e: draft_attention_bytes(m, s.sequences, s.context, e),
        _draft_attention,
        drafting=True,
        prompts=False,
    ),
)

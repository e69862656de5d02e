"""Stand-ins for the Triton kernels on the meta device: they check what they are given and return tensors without values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark.engine.gpu.kernels import StepKernels
from dspark.kernels.dispatch import Kernels

META = torch.device("meta")


def shape_of_heads(
    qkv: Tensor, positions: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, k: Tensor, *rest: Any
) -> Tensor:
    assert {one.device for one in (qkv, positions, slots, cos, sin, k)} == {META}
    assert (positions.dtype, slots.dtype) == (torch.int32, torch.int64)
    return qkv.new_empty(len(qkv), qkv.shape[1] // k.shape[2] - 2 * k.shape[1], k.shape[2])


def shape_of_attention(q: Tensor, k: Tensor, v: Tensor, *metadata: Any) -> Tensor:
    assert all(one.device == META and one.dtype == torch.int32 for one in metadata if isinstance(one, Tensor))
    return torch.empty_like(q)


MODEL_KERNELS = Kernels(
    "triton",
    rms_norm=lambda x, weight, eps: torch.empty_like(x, dtype=weight.dtype),
    add_rms_norm=lambda x, residual, weight, eps: torch.empty_like(x),
    silu_mul=lambda gate_up: gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2),
    rope_kv_write=shape_of_heads,
    paged_attention=shape_of_attention,
    draft_attention=shape_of_attention,
)


def shape_of_block(logits: Tensor, anchors: Tensor, w1: Tensor, w2: Tensor, *rest: Any) -> Tensor:
    """Calls a gated or rnn head's transition as the kernel does."""
    temperature, keys, positions, _, transition = rest
    assert w1.dtype == w2.dtype
    assert (temperature.dtype, keys.dtype, positions.dtype) == (torch.float32, torch.int64, torch.int64)
    for slot in range(logits.shape[1] if transition is not None else 0):
        assert transition(slot, w1[anchors]).shape == (len(anchors), w2.shape[1])
    return torch.empty_like(positions)


def sampled(logits: Tensor, *params: Tensor) -> Tensor:
    dtypes = [one.dtype for one in params]
    assert logits.dtype == torch.float32
    assert dtypes == [torch.float32, torch.int64, torch.float32, torch.float32, torch.int64, torch.int64]
    return torch.empty_like(params[-1])


STEP_KERNELS = StepKernels(
    fill_budget=lambda survival, caps, budget: torch.empty_like(caps),
    sample_rows=sampled,
    accept_drafts=lambda fed, tokens, starts: (
        torch.empty_like(starts[1:]),
        torch.empty_like(starts[1:], dtype=torch.int64),
    ),
    markov_block=shape_of_block,
)

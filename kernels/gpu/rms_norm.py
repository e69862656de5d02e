"""RMSNorm, alone and with the residual add before it, on the device. What `kernels/rms_norm.py` computes.

    x: [rows, hidden] float32, bfloat16 or float16; weight: [hidden]; residual: [rows, hidden] float32
    rms_norm → normed, in the weight's dtype;    add_rms_norm: residual += x in place → normed residual, in x's dtype

A program normalises one row, which it holds in registers: everything is read once and written once. So a row never sees
another, and its sum is added in an order that only `hidden` decides. Moves `bytes_moved`: memory bound.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.language import jit, tl

_WARPS = {1024: 4, 4096: 8, 8192: 16}
"""By the elements of a row that a program holds; others are masked up to the next."""


@jit
def _rms_norm(x, residual, weight, out, hidden, eps, HIDDEN: tl.constexpr):
    """residual: None, or what x is added to first."""
    i = tl.arange(0, HIDDEN)
    inside = i < hidden
    at = tl.program_id(0).to(tl.int64) * hidden + i
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + at, mask=inside, other=0.0)
        tl.store(residual + at, values, mask=inside)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(values * values, axis=0), hidden.to(tl.float32)) + eps))
    normed = values * scale * tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)


def _tile(hidden: int) -> int:
    assert hidden <= max(_WARPS), f"rows of {hidden} elements; the longest are {max(_WARPS)}"
    return next(tile for tile in _WARPS if tile >= hidden)


def _options(tile: int) -> dict[str, Any]:
    return {"num_warps": _WARPS[tile], "enable_fp_fusion": False}


def configurations() -> list[Configuration]:
    others = {"weight": "*bf16", "out": "*bf16", "hidden": "i32", "eps": "fp32"}
    signatures = [{"x": "*fp32"}, {"x": "*bf16"}, {"x": "*bf16", "residual": "*fp32"}]
    return [
        Configuration(_rms_norm, signature | others, {"HIDDEN": tile}, **_options(tile))
        for signature in signatures
        for tile in _WARPS
    ]


def bytes_moved(rows: int, hidden: int, element: int, add: bool = True) -> int:
    """element: bytes of x's and the result's elements; add: of add_rms_norm, which also reads and writes the residual."""
    return hidden * (rows * (2 * element + 8 * add) + element)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    rows, hidden = x.shape
    out = torch.empty_like(x, dtype=weight.dtype)
    if rows:
        tile = _tile(hidden)
        _rms_norm[(rows,)](x, residual, weight, out, hidden, eps, HIDDEN=tile, **_options(tile))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, residual, weight, eps)

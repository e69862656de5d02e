"""RMSNorm, alone and with the residual add before it.

    x: [rows, hidden] float32 or bfloat16; weight: [hidden] of the same dtype; residual: [rows, hidden] float32
    rms_norm → normed;    add_rms_norm: residual += x in place → normed residual, in x's dtype

Moves 2·rows·hidden elements, with the add also twice the residual: memory bound. The residual stream stays in fp32
also in a bf16 model: rounding it in every layer is where most of a bf16 decoder's error comes from, and it is small
next to the weights. `hidden` is a multiple of 16. A row never sees another row.
Source: Zhang & Sennrich 2019, eq. 4.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from dspark.kernels.cpu import cpu_kernel, inner, like, view
from dspark.kernels.simd import store_as, sum_of, to_float


def rms_norm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(weight.dtype)


def add_rms_norm_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    residual += x.float()
    return (rms_norm_reference(residual, weight, eps)).to(x.dtype)


@inner
def norm_scale(values, squares, eps):
    """1 / sqrt(mean(values²) + eps) of a float32 vector whose size is a multiple of 16; `squares` is scratch."""
    for i in range(values.size):
        squares[i] = values[i] * values[i]
    mean = sum_of(squares, 0, values.size) / np.float32(values.size)
    return np.float32(1.0) / np.sqrt(mean + eps)


def _rms_norm(x_like, like, x_address, weight_address, eps, rows, hidden, out_address):
    x = view(x_address, rows * hidden, x_like)
    weight = view(weight_address, hidden, like)
    out = view(out_address, rows * hidden, like)
    for row in numba.prange(rows):
        source = x[row * hidden : (row + 1) * hidden]
        target = out[row * hidden : (row + 1) * hidden]
        values = np.empty(hidden, np.float32)
        squares = np.empty(hidden, np.float32)
        for i in range(hidden):
            values[i] = to_float(source[i])
        scale = norm_scale(values, squares, eps)
        for i in range(hidden):
            store_as(target, i, values[i] * scale * to_float(weight[i]))


def _add_rms_norm(residual_like, like, x_address, residual_address, weight_address, eps, rows, hidden, out_address):
    x = view(x_address, rows * hidden, like)
    residual = view(residual_address, rows * hidden, residual_like)
    weight = view(weight_address, hidden, like)
    out = view(out_address, rows * hidden, like)
    for row in numba.prange(rows):
        source = x[row * hidden : (row + 1) * hidden]
        carried = residual[row * hidden : (row + 1) * hidden]
        target = out[row * hidden : (row + 1) * hidden]
        squares = np.empty(hidden, np.float32)
        for i in range(hidden):
            carried[i] += to_float(source[i])
        scale = norm_scale(carried, squares, eps)
        for i in range(hidden):
            store_as(target, i, carried[i] * scale * to_float(weight[i]))


_rms_norm_kernel = cpu_kernel(_rms_norm)
_add_rms_norm_kernel = cpu_kernel(_add_rms_norm)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x: float32 or the weight's dtype → the weight's dtype."""
    rows, hidden = x.shape
    out = torch.empty_like(x, dtype=weight.dtype)
    _rms_norm_kernel(
        like(x), like(weight), x.data_ptr(), weight.data_ptr(), np.float32(eps), rows, hidden, out.data_ptr()
    )
    return out


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    rows, hidden = x.shape
    out = torch.empty_like(x)
    _add_rms_norm_kernel(
        like(residual),
        like(x),
        x.data_ptr(),
        residual.data_ptr(),
        weight.data_ptr(),
        np.float32(eps),
        rows,
        hidden,
        out.data_ptr(),
    )
    return out

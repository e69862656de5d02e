"""The gated activation of the MLP:   silu(gate) · up.

    gate_up: [rows, 2·width], gate first → [rows, width]

Moves 3·rows·width elements: memory bound. fp32 inside, one rounding at the end.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from dspark.kernels.cpu import cpu_kernel, like, view
from dspark.kernels.simd import exp, store_as, to_float


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _silu_mul(like, gate_up_address, rows, width, out_address):
    gate_up = view(gate_up_address, 2 * rows * width, like)
    out = view(out_address, rows * width, like)
    for row in numba.prange(rows):
        gate = gate_up[2 * row * width : (2 * row + 1) * width]
        up = gate_up[(2 * row + 1) * width : (2 * row + 2) * width]
        target = out[row * width : (row + 1) * width]
        for i in range(width):
            x = to_float(gate[i])
            opposite = -x if x > np.float32(-88.0) else np.float32(88.0)
            store_as(target, i, x / (np.float32(1.0) + exp(opposite)) * to_float(up[i]))


_kernel = cpu_kernel(_silu_mul)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    _kernel(like(gate_up), gate_up.data_ptr(), rows, width, out.data_ptr())
    return out

"""The gated activation of the MLP:   silu(gate) · up.

    gate_up: [rows, 2·width], gate first → [rows, width]

Moves 3·rows·width elements: memory bound. fp32 inside, one rounding at the end.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from dspark.kernels.cpu import cpu_kernel, like, view
from dspark.kernels.simd import LANES, exp, silu_mul_row, store_as, to_float


def silu_mul_reference(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate * torch.sigmoid(gate) * up).to(gate_up.dtype)


def _silu_mul(like, gate_up_address, rows, width, out_address):
    gate_up = view(gate_up_address, 2 * rows * width, like)
    out = view(out_address, rows * width, like)
    for row in numba.prange(rows):
        whole = width // LANES * LANES
        silu_mul_row(gate_up, 2 * row * width, width, whole, out, row * width)
        for i in range(whole, width):
            gate = to_float(gate_up[2 * row * width + i])
            opposite = -gate if gate > np.float32(-88.0) else np.float32(88.0)
            up = to_float(gate_up[(2 * row + 1) * width + i])
            store_as(out, row * width + i, gate / (np.float32(1.0) + exp(opposite)) * up)


_kernel = cpu_kernel(_silu_mul)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype)
    _kernel(like(gate_up), gate_up.data_ptr(), rows, width, out.data_ptr())
    return out

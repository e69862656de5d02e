"""The gated activation of the MLP on the device. What `kernels/silu_mul.py` computes:   silu(gate) · up.

    gate_up: [rows, 2·width], gate first → [rows, width]

A program computes 1024 elements of one row; an element sees nothing but its own two inputs. Moves 3·rows·width elements:
memory bound. fp32 inside, one rounding at the end.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspark.kernels.gpu.ahead_of_time import Configuration
from dspark.kernels.gpu.language import jit, tl

_TILE = {"TILE": 1024}
_OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}


@jit
def _silu_mul(gate_up, out, width, TILE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < width
    gate = tl.load(gate_up + 2 * row * width + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + (2 * row + 1) * width + i, mask=inside, other=0.0).to(tl.float32)
    # e^-x overflows below -88, where 1/∞ is the right answer; of -∞ it is NaN, as in the reference
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate))
    tl.store(out + row * width + i, (silu * up).to(out.dtype.element_ty), mask=inside)


def configurations() -> list[Configuration]:
    return [Configuration(_silu_mul, {"gate_up": "*bf16", "out": "*bf16", "width": "i32"}, _TILE, **_OPTIONS)]


def bytes_moved(rows: int, width: int, element: int) -> int:
    return 3 * rows * width * element


def silu_mul(gate_up: Tensor) -> Tensor:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if rows:
        _silu_mul[rows, -(-width // _TILE["TILE"])](gate_up, out, width, **_TILE, **_OPTIONS)
    return out

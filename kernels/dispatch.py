"""Which kernels compute a model: decided here and nowhere else, once for a device, from the device alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor

from dspark.kernels.draft_attention import draft_attention
from dspark.kernels.paged_attention import paged_attention
from dspark.kernels.rms_norm import add_rms_norm, rms_norm
from dspark.kernels.rope_kv_write import rope_kv_write
from dspark.kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True)
class Kernels:
    """Signatures and shapes: the files of these names. Batch metadata are numpy arrays on a CPU, tensors on a GPU."""

    name: Literal["cpu", "triton"]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    rope_kv_write: Callable[..., Tensor]
    paged_attention: Callable[..., Tensor]
    draft_attention: Callable[..., Tensor]


@cache
def choose_kernels(device: torch.device) -> Kernels:
    """Raises ModuleNotFoundError for a CUDA device without Triton, ValueError for a device that there are no kernels for."""
    if device.type == "cpu":
        return Kernels("cpu", rms_norm, add_rms_norm, silu_mul, rope_kv_write, paged_attention, draft_attention)
    if device.type != "cuda":
        raise ValueError(f"there are no kernels for device {device}, only for cpu and cuda")
    if find_spec("triton") is None:
        raise ModuleNotFoundError(
            f"device {device} needs the Python package triton, which is not installed: "
            "pip install 'dspark-server[triton]'",
            name="triton",
        )
    # only here: a CPU server must not pay for loading Triton
    from dspark.kernels.gpu import draft_attention as draft
    from dspark.kernels.gpu import paged_attention as paged
    from dspark.kernels.gpu import rms_norm as norm
    from dspark.kernels.gpu import rope_kv_write as rope
    from dspark.kernels.gpu import silu_mul as silu

    return Kernels(
        "triton",
        norm.rms_norm,
        norm.add_rms_norm,
        silu.silu_mul,
        rope.rope_kv_write,
        paged.paged_attention,
        draft.draft_attention,
    )

"""What a kernel's test and timing need: shapes of a step, random inputs, and the kernel beside its PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.benchmarks.qwen3 import Model

TOLERANCES = {torch.bfloat16: (1.6e-2, 2e-3), torch.float16: (2e-3, 1e-3), torch.float32: (1e-4, 1e-4)}
"""(relative, absolute), where results are rounded: by the dtype of what goes in."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`rows` of each sequence behind `context` tokens. A prompt chunk samples no tokens, and nothing is drafted behind it."""

    name: str
    sequences: int
    rows: int
    context: int

    @property
    def total(self) -> int:
        return self.sequences * self.rows


SHAPES = (
    Shape("decode 1", 1, 1, 1024),
    Shape("decode 8", 8, 1, 1024),
    Shape("decode 32", 32, 1, 1024),
    Shape("decode 128", 128, 1, 1024),
    Shape("verify 1 × 8", 1, 8, 1024),
    Shape("verify 32 × 8", 32, 8, 1024),
    Shape("prefill 512", 1, 512, 0),
)
CHUNK = 16
"""Shapes with more rows of a sequence are prompt chunks."""


class Inputs:
    """Random tensors on a device. dtype: of weights and activations."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=dtype or self.dtype, device=self.device)

    def integers(self, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.randint(high, shape, generator=self._generator, dtype=dtype, device=self.device)

    def full(self, value: float, count: int, dtype: torch.dtype) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=self.device)

    def close(self, got: Tensor, expected: Tensor) -> None:
        relative, absolute = TOLERANCES[self.dtype]
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.float(), expected.float(), rtol=relative, atol=absolute)


@dataclass(frozen=True, slots=True)
class Launch:
    """run: the kernel on inputs that stay. check: raises AssertionError where it does not give what its reference gives."""

    run: Callable[[], object]
    check: Callable[[], None]


@dataclass(frozen=True, slots=True)
class KernelCase:
    """bytes_moved(model, shape, bytes of an element); None: so few that latency is all there is.

    drafting: of a draft round for as many sequences, so without shapes of its own for verification and prompts.
    """

    name: str
    bytes_moved: Callable[[Model, Shape, int], int] | None
    prepare: Callable[[Model, Shape, Inputs], Launch]
    prompts: bool = True
    drafting: bool = False

    def takes(self, shape: Shape) -> bool:
        if shape.rows > CHUNK:
            return self.prompts
        return shape.rows == 1 or not self.drafting


def positions(shape: Shape, inputs: Inputs) -> Tensor:
    """[rows] int32, of all rows."""
    offsets = torch.arange(shape.total, dtype=torch.int32, device=inputs.device) % shape.rows
    return shape.context + offsets

"""What the kernels' benchmark tests on a GPU before it times, at a tiny model's shapes in the interpreter."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from dspark.benchmarks.kernel_cases import Inputs, KernelCase, Launch, Shape
from dspark.benchmarks.kernels import KERNELS
from dspark.benchmarks.qwen3 import MODELS

pytestmark = pytest.mark.usefixtures("nan_filled")

SHAPES = (Shape("decode", 2, 1, 20), Shape("verify", 1, 8, 12), Shape("prompt", 1, 17, 0))


PAIRS = [(kernel, shape) for kernel in KERNELS for shape in SHAPES if kernel.takes(shape)]


def prepare(kernel: KernelCase, shape: Shape) -> Launch:
    return kernel.prepare(MODELS["tiny"], shape, Inputs(torch.device("cpu"), torch.float32))


@pytest.mark.parametrize(("kernel", "shape"), PAIRS, ids=lambda value: value.name)
def test_is_what_its_reference_gives(kernel: KernelCase, shape: Shape) -> None:
    prepare(kernel, shape).check()


@pytest.mark.parametrize(("kernel", "shape"), PAIRS, ids=lambda value: value.name)
def test_a_kernel_that_does_nothing_is_found_out(
    kernel: KernelCase, shape: Shape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InterpretedFunction, "run", lambda *_, **__: None)
    launch = prepare(kernel, shape)
    with pytest.raises(AssertionError):
        launch.check()

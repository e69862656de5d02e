"""Kernels run in Triton's interpreter here, and may be launched only as their file's `configurations()` say."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark.kernels.gpu import paged_attention
from dspark.kernels.gpu.ahead_of_time import Configuration

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "these tests need a process of their own: TRITON_INTERPRET=1 pytest tests/kernels_gpu/interpreted"
    )

import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, TensorHandle  # reads TRITON_INTERPRET

INTEGERS = {"*i64": torch.int64, "*i32": torch.int32, "*i8": torch.int8, "*u8": torch.uint8, "*i1": torch.bool}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def fits(value: Any, listed: str | None) -> bool:
    """An argument is of its listed type. Where bfloat16 is listed, tests pass what the interpreter can compute."""
    if listed is None:
        return value is None
    if isinstance(value, torch.Tensor):
        if listed in INTEGERS:
            return value.dtype == INTEGERS[listed]
        return value.dtype == torch.float32 or (listed == "*bf16" and value.is_floating_point())
    if listed == "fp32":
        return isinstance(value, float)
    return listed == "i32" and isinstance(value, int) and -(2**31) <= value < 2**31


def is_listed(function: Callable[..., None], configuration: Configuration, args: Any, given: dict[str, Any]) -> bool:
    arguments = inspect.getcallargs(function, *args, **{k: v for k, v in given.items() if k not in OPTIONS})
    constexprs = {name: arguments.pop(name) for name in configuration.constexprs}
    return (
        constexprs == dict(configuration.constexprs)
        and all(fits(value, configuration.signature.get(name)) for name, value in arguments.items())
        and all(getattr(configuration, name) == given.get(name, getattr(Configuration, name)) for name in OPTIONS)
    )


@pytest.fixture(autouse=True)
def twice_as_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter swaps all of `tl` at every call of a function, `tl.sum` included: once a launch will do.

    Its overflow checks are left out too: they compute in int64 beside every integer and, not debugging, look at nothing.
    """
    swap = interpreter._patch_lang
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    monkeypatch.setattr(interpreter, "_patch_lang", lambda _: swap(everywhere))
    monkeypatch.setattr(
        InterpretedFunction, "__call__", lambda function, *args, **given: function.rewrite()(*args, **given)
    )
    unchecked = interpreter.InterpreterOptions(sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", unchecked)


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention parts sequences of few positions already, takes fewer rows for a prompt chunk, and each program many items."""
    monkeypatch.setattr(paged_attention, "SPLIT", 64)
    monkeypatch.setattr(paged_attention, "PARTED", 36)
    monkeypatch.setattr(paged_attention, "PROGRAMS", 3)


@pytest.fixture
def products_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of a matrix product does not depend on its place in the tile, as on a device. Numpy's does."""

    def create_dot(a: TensorHandle, b: TensorHandle, c: TensorHandle, *_: object) -> TensorHandle:
        product = np.matmul(a.data[:, None], b.data, dtype=c.data.dtype)[:, 0]
        return TensorHandle(product + c.data, c.dtype.scalar)

    monkeypatch.setattr(interpreter.interpreter_builder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def only_listed_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compile tests prove is then true of every launch."""
    interpret = InterpretedFunction.run

    def run(kernel: InterpretedFunction, *args: Any, grid: Any, warmup: bool, **given: Any) -> None:
        if kernel.fn.__module__.startswith("dspark.kernels.gpu."):
            listed = [one for one in import_module(kernel.fn.__module__).configurations() if one.kernel is kernel]
            fitting = filter(partial(is_listed, kernel.fn, args=args, given=given), listed)
            assert any(fitting), f"{kernel.fn.__name__} is launched as no configuration says: {given}"
        interpret(kernel, *args, grid=grid, warmup=warmup, **given)

    monkeypatch.setattr(InterpretedFunction, "run", run)

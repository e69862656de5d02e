"""How CPU kernels are compiled and handed tensors.

A kernel is numba over flat arrays. Tensors cross as addresses and are viewed inside (`view`), never copied: making a
numpy array of a tensor costs 2 µs, which 30 layers pay hundreds of times a step. bfloat16 travels as uint16, since
numpy has no such type. Compiled code is cached on disk, so only the first start on a machine compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.np.numpy_support import carray
from numpy.typing import NDArray

intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = numba.extending.intrinsic
"""numba's decorator. A kernel calls an intrinsic without its first parameter, which is only there while compiling."""

inner = numba.njit(nogil=True, error_model="numpy")
"""For functions that kernels call. numpy's error model: a check for division by zero would keep loops scalar."""

_LIKE: dict[torch.dtype, NDArray[Any]] = {
    torch.float32: np.empty(0, np.float32),
    torch.bfloat16: np.empty(0, np.uint16),
}


def cpu_kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile `function` for one thread, and with `numba.prange` over torch's threads; each call picks by their number.

    Every row is computed by the same instructions in both, whatever the other rows are.
    """
    serial = numba.njit(nogil=True, error_model="numpy", cache=True)(function)
    parallel = numba.njit(nogil=True, error_model="numpy", cache=True, parallel=True)(function)

    def launch(*args: Any) -> None:
        threads = torch.get_num_threads()
        if threads == 1:
            serial(*args)
            return
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        parallel(*args)

    return launch


def set_threads(count: int) -> None:
    """Threads of the kernels and of torch's operators that the calling thread starts."""
    # in this order: with its own threads numba starts OpenMP on all cores in the calling thread, torch's operators included
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    torch.set_num_threads(count)


def like(tensor: torch.Tensor) -> NDArray[Any]:
    """An empty array that tells a kernel the element type of the addresses beside it."""
    return _LIKE[tensor.dtype]


@intrinsic
def _as_pointer(typing_context: Any, address: Any) -> Any:
    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), codegen


@inner
def view(address, size, like):
    """The `size` elements at `address` as a flat array of the element type of `like`."""
    return carray(_as_pointer(address), size, like.dtype)

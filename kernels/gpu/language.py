"""`jit` and `tl` of Triton, or stand-ins where it is not installed, so that every kernel's file can be imported anywhere.

Importing Triton touches no driver; launching a kernel does. With TRITON_INTERPRET=1 set before the first import, kernels
run on the CPU in Triton's interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["jit", "tl"]

try:
    from triton import jit
    from triton import language as tl
except ModuleNotFoundError as absent:
    if absent.name != "triton":
        raise

    class _NotInstalled:
        """Stands where a kernel would: it can be passed around, not launched."""

        def __init__(self, function: Callable[..., None]) -> None:
            self.__name__ = function.__name__

        def __getitem__(self, grid: object) -> Callable[..., None]:
            raise ModuleNotFoundError(f"the kernel {self.__name__} needs triton, which is not installed", name="triton")

    def jit(function: Callable[..., None] | None = None, **options: object) -> Any:
        return jit if function is None else _NotInstalled(function)

    tl = None

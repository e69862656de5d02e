"""Every kernel, as its launcher uses it, compiles for four generations of GPU and fits the smallest of them."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from dspark.kernels import gpu
from dspark.kernels.gpu.ahead_of_time import Configuration, compile_for

SHARED_BYTES = 99 * 1024
"""Of a block, on consumer cards."""

(FOLDER,) = map(Path, gpu.__path__)
MODULES = [
    import_module(f"dspark.kernels.gpu.{path.stem}")
    for path in sorted(FOLDER.glob("*.py"))
    if path.stem not in ("__init__", "language", "ahead_of_time")
]


def name_of(configuration: Configuration) -> str:
    """The kernel, and all that tells its configurations apart."""
    file = configuration.kernel.__module__.removeprefix("dspark.kernels.gpu.")
    floats = sorted({kind for kind in configuration.signature.values() if kind in ("*bf16", "*fp16", "*fp32")})
    absent = [name for name in configuration.kernel.arg_names if name not in configuration.signature]
    parts = [f"{name}={configuration.constexprs[name]}" for name in absent if name in configuration.constexprs]
    parts += [f"no {name}" for name in absent if name not in configuration.constexprs]
    return f"{file}.{configuration.kernel.__name__.lstrip('_')} {' '.join(parts)} ({' '.join(floats)})"


CONFIGURATIONS = [one for module in MODULES if hasattr(module, "configurations") for one in module.configurations()]


@pytest.mark.parametrize("capability", [80, 89, 90, 120])
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=name_of)
def test_compiles_within_shared_memory_and_registers(
    configuration: Configuration, capability: int, record_property: Callable[[str, object], None]
) -> None:
    needs = compile_for(capability, configuration)
    record_property("configuration", name_of(configuration))
    record_property("gpu", f"sm_{capability}")
    record_property("needs", f"{needs.registers} / {needs.shared_bytes}")
    assert needs.shared_bytes <= SHARED_BYTES
    assert needs.stack_bytes == 0, "registers are spilled"


def test_no_configuration_is_listed_twice() -> None:
    names = [name_of(one) for one in CONFIGURATIONS]
    assert sorted(set(names)) == sorted(names)


def launched(module: ModuleType) -> set[str]:
    """Names of the kernels that a file launches: called as kernel[grid](...)."""
    assert module.__file__ is not None
    return {
        call.func.value.id
        for call in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
    }


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_kernel_that_is_launched_is_listed(module: ModuleType) -> None:
    listed = {one.kernel.__name__ for one in module.configurations()}
    assert {name for name in launched(module) if name in vars(module)} <= listed

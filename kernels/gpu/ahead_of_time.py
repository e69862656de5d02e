"""Compile a Triton kernel for a GPU that is not there, and read what the binary needs of registers and shared memory.

Triton brings compiler, assembler and disassembler with it; no driver is touched.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Configuration:
    """A kernel as one of its launches uses it.

    signature: the types of its arguments, e.g. "*bf16", "i32", "fp32"; an argument that is neither there nor in
    `constexprs` is None. Pointers are taken to be aligned to 16 bytes, as what torch allocates is.
    """

    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    enable_fp_fusion: bool = True


@dataclass(frozen=True)
class Needs:
    """What one block of a kernel takes. stack_bytes: of each thread, for registers that were spilled."""

    shared_bytes: int
    registers: int
    stack_bytes: int


def compile_for(capability: int, configuration: Configuration) -> Needs:
    """capability: the GPU's, 90 for 9.0. Raises what Triton's compiler raises; its cache keeps what it compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = configuration.kernel.arg_names
    types = {name: configuration.signature.get(name, "constexpr") for name in arguments}
    values = {name: configuration.constexprs.get(name) for name in arguments if types[name] == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(arguments) if types[name].startswith("*")}
    binary = triton.compile(
        ASTSource(configuration.kernel, types, values, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "enable_fp_fusion": configuration.enable_fp_fusion,
        },
    )
    return Needs(binary.metadata.shared, *_registers_and_stack(binary.asm["cubin"]))


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return int(found[1]), int(found[2])

"""What a figure was measured on: every table and JSON file of the benchmarks carries these facts."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

GEMM_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "asimd",
    "bf16",
    "sve",
)
"""Processor features that decide which matrix kernels run."""

PACKAGES = ("dspark-server", "torch", "triton", "transformers", "numba", "numpy")


@dataclass(frozen=True, slots=True)
class Machine:
    cpu_model: str
    cores: int
    """Logical processors this process may use."""
    cpu_flags: tuple[str, ...]
    memory_bytes: int
    operating_system: str
    python: str
    versions: dict[str, str]
    read_bandwidth_gb_per_s: float
    """One thread, 1e9 bytes/s; weights ÷ this is the least time of a decode step at batch 1."""

    def line(self) -> str:
        flags = " ".join(flag for flag in self.cpu_flags if flag.endswith("bf16")) or "no bf16 instructions"
        return (
            f"{self.cpu_model}, {self.cores} cores, {flags}, {self.memory_bytes / 2**30:.0f} GiB, "
            f"{self.read_bandwidth_gb_per_s:.1f} GB/s read by one thread, {self.operating_system}, "
            f"python {self.python}, " + ", ".join(f"{name} {version}" for name, version in self.versions.items())
        )

    def as_dict(self) -> dict[str, object]:
        return asdict(self)


def describe_machine() -> Machine:
    """Takes about a second: the bandwidth is measured."""
    cpu_model, flags = _cpu_facts()
    return Machine(
        cpu_model=cpu_model,
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        cpu_flags=tuple(flag for flag in GEMM_FLAGS if flag in flags),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        operating_system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=_installed_versions(),
        read_bandwidth_gb_per_s=read_bandwidth_gb_per_s(),
    )


def read_bandwidth_gb_per_s(buffer_bytes: int = 512 * 2**20, repeats: int = 3) -> float:
    """Best of `repeats` sums of a buffer far larger than the caches, by one thread.

    The best run is the least disturbed one, and a floor for a step's time wants the machine's limit.
    """
    buffer = np.ones(buffer_bytes // 8, dtype=np.int64)  # written once, so that its pages are real
    durations_s = []
    for _ in range(repeats):
        begin_s = time.perf_counter()
        buffer.sum()
        durations_s.append(time.perf_counter() - begin_s)
    return buffer.nbytes / min(durations_s) / 1e9


def _installed_versions() -> dict[str, str]:
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    return {name: metadata.version(name) for name in PACKAGES if name in installed}


def _cpu_facts() -> tuple[str, frozenset[str]]:
    """Model name and feature flags; the flags are empty where the kernel does not list them."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine(), frozenset()
    facts: dict[str, str] = {}
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        facts.setdefault(key.strip().lower(), value.strip())
    flags = facts.get("flags", facts.get("features", ""))
    return facts.get("model name", platform.machine()), frozenset(flags.split())

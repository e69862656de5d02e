"""Which kernels a device gets, and that nothing of Triton is needed where there is no such device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dspark.kernels import dispatch, rms_norm
from dspark.kernels.dispatch import choose_kernels

GPU_FILES = sorted((Path(__file__).resolve().parents[2] / "kernels" / "gpu").glob("*.py"))


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    choose_kernels.cache_clear()


def run_python(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_a_cpu_gets_the_functions_of_the_cpu_kernels_themselves() -> None:
    kernels = choose_kernels(torch.device("cpu"))
    assert kernels.name == "cpu"
    assert kernels.rms_norm is rms_norm.rms_norm
    assert choose_kernels(torch.device("cpu")) is kernels


def test_a_cuda_device_gets_the_triton_kernels() -> None:
    kernels = choose_kernels(torch.device("cuda"))
    assert kernels.name == "triton"
    names = ("rms_norm", "add_rms_norm", "silu_mul", "rope_kv_write", "paged_attention", "draft_attention")
    files = {name: getattr(kernels, name).__module__ for name in names}
    assert files == {name: f"dspark.kernels.gpu.{name.removeprefix('add_')}" for name in names}


@pytest.mark.usefixtures("without_triton")
def test_a_cuda_device_without_triton_is_refused_by_what_is_missing() -> None:
    with pytest.raises(
        ModuleNotFoundError, match=r"device cuda needs the Python package triton.*dspark-server\[triton\]"
    ):
        choose_kernels(torch.device("cuda"))


def test_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="no kernels for device meta"):
        choose_kernels(torch.device("meta"))


def test_the_cpus_kernels_load_nothing_of_triton() -> None:
    program = (
        "import sys, torch\n"
        "from dspark.kernels.dispatch import choose_kernels\n"
        "choose_kernels(torch.device('cpu'))\n"
        "print('triton' in sys.modules, any(name.startswith('dspark.kernels.gpu') for name in sys.modules))\n"
    )
    assert run_python(program).split() == ["False", "False"]


def test_without_triton_every_file_can_be_imported_and_a_launch_says_what_is_missing() -> None:
    modules = [f"dspark.kernels.gpu.{path.stem}" for path in GPU_FILES if path.stem != "__init__"]
    program = (
        "import importlib, sys, torch\n"
        "sys.modules['triton'] = None\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "from dspark.kernels.gpu.silu_mul import silu_mul\n"
        "try: silu_mul(torch.zeros(1, 2))\n"
        "except ModuleNotFoundError as missing: print(missing)\n"
    )
    assert "_silu_mul needs triton, which is not installed" in run_python(program)

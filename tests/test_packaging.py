"""What is installed is what is in the tree: a folder missing from pyproject.toml fails here, not at a user's."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [folder for folder in ("kernels", "engine", "server", "training", "benchmarks") if (ROOT / folder).is_dir()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel built from a clean copy: a `build/` left in the tree would add modules that no longer exist."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(target), str(source)], check=True, timeout=120)
    (path,) = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_exactly_the_modules_of_the_tree_under_the_name_dspark(wheel: zipfile.ZipFile) -> None:
    in_tree = {
        f"dspark/{path.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        if "__pycache__" not in path.parts
    }
    in_wheel = {name for name in wheel.namelist() if name.endswith(".py")}
    assert in_wheel == in_tree


def test_the_wheel_claims_no_top_level_name_but_dspark(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"dspark"}


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "dspark = dspark.server.cli:main" in wheel.read(entry_points).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel.namelist())


def test_the_wheel_carries_the_drafter_of_the_default_model(wheel: zipfile.ZipFile) -> None:
    folder = "dspark/engine/drafters/smollm2_135m/"
    shipped = {name.removeprefix(folder) for name in wheel.namelist() if name.startswith(folder)}
    assert shipped == {"README.md", "config.json", "dspark.json", "model.safetensors"}

"""Dependencies point one way: kernels <- engine <- server, with benchmarks beside server. Read from the syntax trees.

Imports inside functions and under `if TYPE_CHECKING` count like any other: they are dependencies too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [folder for folder in ("kernels", "engine", "server", "training", "benchmarks") if (ROOT / folder).is_dir()]

FORBIDDEN = {
    "kernels": {
        "dspark.engine",
        "dspark.server",
        "dspark.training",
        "dspark.benchmarks",
        "fastapi",
        "starlette",
        "uvicorn",
        "pydantic",
        "prometheus_client",
        "transformers",
    },
    "engine": {
        "dspark.server",
        "dspark.training",
        "dspark.benchmarks",
        "fastapi",
        "starlette",
        "uvicorn",
        "pydantic",
        "prometheus_client",
    },
    "server": {"dspark.training", "dspark.benchmarks", "dspark.kernels", "torch"},
}

ENGINE_LAYERS: list[set[str]] = [
    {"config", "errors", "request", "facts"},
    {
        "request_check",
        "sequence",
        "kv_cache",
        "noise",
        "cost_model",
        "calibration",
        "draft_history",
        "draft_width",
        "grammar",
        "sampling",
        "verification",
    },
    {"accounting", "suspects", "waiting_queue", "load_controller", "models", "drafters"},
    {"admission", "scheduler", "runner", "gpu", "step_facts"},
    {"loop", "startup"},
    {"async_engine"},
    {"__init__"},
]
"""Lowest first. A module imports its own layer or lower ones; folders count as one module."""


@dataclass(frozen=True)
class Import:
    """One imported name. `module`: the dotted module; `name`: what is taken from it, None for `import module`."""

    file: Path
    line: int
    module: str
    name: str | None
    relative: bool
    at_module_level: bool

    def reaches(self, package: str) -> bool:
        targets = [self.module] if self.name is None else [self.module, f"{self.module}.{self.name}"]
        return any(target == package or target.startswith(package + ".") for target in targets)

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}" + (
            f".{self.name}" if self.name else ""
        )


def python_files(folder: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


def syntax_tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports_of(path: Path) -> Iterator[Import]:
    def walk(node: ast.AST, at_module_level: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(path, child.lineno, alias.name, None, False, at_module_level)
            elif isinstance(child, ast.ImportFrom):
                for alias in child.names:
                    yield Import(path, child.lineno, child.module or "", alias.name, child.level > 0, at_module_level)
            else:
                inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from walk(child, at_module_level and not inside)

    yield from walk(syntax_tree(path), True)


def imports_in(folder: str) -> list[Import]:
    return [found for path in python_files(folder) for found in imports_of(path)]


def module_name(path: Path) -> str:
    """Dotted name of a product file; a package's `__init__` is the package itself."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("dspark", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def engine_layer(module: str) -> int | None:
    """Layer of `dspark.engine[.module[...]]`, None when the order does not name the module."""
    parts = module.split(".")
    first = parts[2] if len(parts) > 2 else "__init__"
    return next((level for level, names in enumerate(ENGINE_LAYERS) if first in names), None)


def engine_target(found: Import, modules: set[str]) -> str:
    """The engine module that an import executes: `from dspark.engine import loop` means the module `loop`."""
    inner = f"{found.module}.{found.name}"
    return inner if inner in modules else found.module


def engine_exports() -> set[str]:
    for statement in syntax_tree(ROOT / "engine" / "__init__.py").body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__":
            return set(ast.literal_eval(statement.value))
    raise AssertionError("engine/__init__.py has no __all__")


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_no_layer_reaches_upwards_or_into_the_frameworks_of_another(folder: str) -> None:
    wrong = [
        str(found)
        for found in imports_in(folder)
        if found.file != ROOT / "server" / "cli.py"
        for banned in FORBIDDEN[folder]
        if found.reaches(banned)
    ]
    assert wrong == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_are_absolute(folder: str) -> None:
    assert [str(found) for found in imports_in(folder) if found.relative] == []


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_our_folders_are_imported_under_the_name_dspark_only(folder: str) -> None:
    bare = {"engine", "server", "kernels", "benchmarks", "training"}
    wrong = [str(found) for found in imports_in(folder) if not found.relative and found.module.split(".")[0] in bare]
    assert wrong == []


def test_the_server_uses_only_the_names_that_the_engine_exports() -> None:
    exports = engine_exports()
    wrong = [
        str(found)
        for found in imports_in("server")
        if found.file.name != "cli.py" and found.reaches("dspark.engine")
        if found.module != "dspark.engine" or found.name not in exports
    ]
    assert wrong == []


def test_the_command_line_reaches_deeper_than_the_engines_names_only_inside_functions() -> None:
    exports = engine_exports()
    wrong = [
        str(found)
        for found in imports_of(ROOT / "server" / "cli.py")
        if found.at_module_level
        if any(found.reaches(banned) for banned in FORBIDDEN["server"])
        or (found.reaches("dspark.engine") and (found.module != "dspark.engine" or found.name not in exports))
    ]
    assert wrong == []


def test_every_engine_module_has_a_place_in_the_order() -> None:
    homeless = [module for path in python_files("engine") if engine_layer(module := module_name(path)) is None]
    assert homeless == [], "name these in ENGINE_LAYERS"


def test_no_engine_module_imports_a_higher_one() -> None:
    modules = {module_name(path) for path in python_files("engine")}
    wrong = []
    for found in imports_in("engine"):
        if found.reaches("dspark.engine"):
            importer = engine_layer(module_name(found.file))
            imported = engine_layer(engine_target(found, modules))
            if importer is not None and imported is not None and imported > importer:
                wrong.append(str(found))
    assert wrong == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_are_no_import_cycles(folder: str) -> None:
    modules = {module_name(path) for path in python_files(folder)}
    graph: dict[str, set[str]] = {module: set() for module in modules}
    for found in imports_in(folder):
        target = engine_target(found, modules)
        if target in modules:
            graph[module_name(found.file)].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("import cycle: " + " <- ".join(error.args[1]))


def test_only_the_servers_metrics_module_knows_metric_names() -> None:
    # the engine cannot export metrics at all (FORBIDDEN); there `dspark_` begins keys of draft checkpoints
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.value!r}"
        for path in python_files("server")
        if path.name != "metrics.py"
        for node in ast.walk(syntax_tree(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "dspark_" in node.value
    ]
    assert wrong == []


def test_the_step_fits_one_screen() -> None:
    tree = syntax_tree(ROOT / "engine" / "loop.py")
    steps = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == "step"
    ]
    assert len(steps) == 1
    assert steps[0].end_lineno is not None
    assert steps[0].end_lineno - steps[0].lineno + 1 <= 40

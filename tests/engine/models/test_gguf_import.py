"""A GGUF file becomes a folder that transformers reads as the same model with the same tokenizer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import SPECIAL_TOKENS, write_tiny_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer

from dspark.engine.errors import ConfigError
from dspark.engine.models import gguf_import
from dspark.engine.models.gguf_import import import_gguf
from dspark.engine.models.locate import ModelFiles, locate_model
from dspark.engine.models.rope import inverse_frequencies
from dspark.engine.models.spec import RopeSpec, read_spec
from dspark.engine.models.weights import load_weights

GGUF_ARCHITECTURES = ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_the_folder_holds_the_tensors_the_file_was_made_from(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", architecture, tie_word_embeddings=tied)
    folder = import_gguf(tmp_path / "tiny.gguf", tmp_path)
    spec = read_spec(folder)
    loaded = load_weights(folder, spec, torch.bfloat16)
    parameters = dict(model.named_parameters())
    assert spec.architecture == architecture
    assert spec.eos_token_ids == (2,)
    assert loaded.keys() == parameters.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, parameters[name].bfloat16()), name


@pytest.mark.parametrize("architecture", GGUF_ARCHITECTURES)
def test_transformers_computes_the_same_logits_from_the_folder(tmp_path: Path, architecture: str) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", architecture)
    with torch.no_grad():
        for parameter in model.parameters():  # as the folder holds them
            parameter.copy_(parameter.bfloat16())
    folder = import_gguf(tmp_path / "tiny.gguf", tmp_path)
    converted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_attention_biases_are_put_back_in_order_too(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", attention_bias=True)
    folder = import_gguf(tmp_path / "tiny.gguf", tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(
        load_weights(folder, read_spec(folder), torch.bfloat16)[name], model.state_dict()[name].bfloat16()
    )


def test_any_part_of_a_split_file_stands_for_the_whole(tmp_path: Path) -> None:
    model = write_tiny_gguf(tmp_path / "tiny.gguf", split_max_tensors=8)
    parts = sorted(tmp_path.glob("tiny-*.gguf"))
    assert len(parts) > 2
    folder = import_gguf(parts[0], tmp_path)
    assert folder == import_gguf(parts[-1], tmp_path)
    assert locate_model(str(parts[0]), tmp_path) == ModelFiles("tiny", folder)
    assert load_weights(folder, read_spec(folder), torch.bfloat16).keys() == model.state_dict().keys()
    parts[1].unlink()
    with pytest.raises(ConfigError, match=parts[1].name):
        import_gguf(parts[0], tmp_path)


def test_a_part_beyond_the_last_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"tiny-0000{number}-of-00001.gguf").write_bytes(b"")
    with pytest.raises(ConfigError, match="not one of the 1 parts"):
        import_gguf(tmp_path / "tiny-00002-of-00001.gguf", tmp_path)


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_import, "_SHARD_BYTES", 60_000)
    model = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = import_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    loaded = load_weights(folder, read_spec(folder), torch.bfloat16)
    assert all(torch.equal(loaded[name], tensor.bfloat16()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({"llama.rope.freq_base": 5e5}, RopeSpec("default", 5e5)),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.5},
            RopeSpec("linear", 10000.0, 2.5),
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 1.0,
                "llama.rope.scaling.original_context_length": 128,
                "llama.rope.scaling.yarn_beta_fast": 16.0,
                "llama.rope.scaling.attn_factor": 1.0,
            },
            RopeSpec("yarn", 10000.0, 1.0, 128, beta_fast=16.0),
        ),
    ],
    ids=["default", "linear", "yarn"],
)
def test_rope_scaling_survives(tmp_path: Path, metadata: dict[str, float | str], rope: RopeSpec) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    assert read_spec(import_gguf(tmp_path / "tiny.gguf", tmp_path)).rope == rope


def test_llama3_scaling_is_recovered_from_the_stored_divisors(tmp_path: Path) -> None:
    rope = RopeSpec("llama3", 10000.0, 32.0, 8192)
    divisors = inverse_frequencies(RopeSpec("default", 10000.0), 16) / inverse_frequencies(rope, 16)
    write_tiny_gguf(tmp_path / "tiny.gguf", tensors={"rope_freqs.weight": divisors.numpy()})
    assert read_spec(import_gguf(tmp_path / "tiny.gguf", tmp_path)).rope == rope


def test_other_stored_divisors_are_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "t.gguf", tensors={"rope_freqs.weight": np.linspace(1, 5, 8, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"rope_freqs\.weight is not Llama 3's scaling"):
        import_gguf(tmp_path / "t.gguf", tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'.*supported are none, linear, yarn, llama3"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor"),
        ({"llama.rope.dimension_count": 8}, "turn 8 of 16 dimensions"),
        ({"llama.expert_count": 4}, r"llama\.expert_count is 4"),
        ({"llama.attention.sliding_window": 64}, "sliding_window is 64"),
    ],
)
def test_metadata_that_cannot_be_honoured_is_refused(
    tmp_path: Path, metadata: dict[str, float | str], message: str
) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata=metadata)
    with pytest.raises(ConfigError, match=message) as caught:
        import_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert caught.value.field == "model"
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_tensors_that_do_not_fit_the_metadata_are_named(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "t.gguf", tensors={"blk.2.attn_norm.weight": np.ones(64, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"layers\.2\.input_layernorm\.weight: found \(64,\), wanted None"):
        import_gguf(tmp_path / "t.gguf", tmp_path)


def test_a_tensor_of_another_architecture_is_named(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "t.gguf", tensors={"blk.0.ffn_gate_inp.weight": np.ones(64, dtype=np.float32)})
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_gate_inp\.weight belongs to no supported architecture"):
        import_gguf(tmp_path / "t.gguf", tmp_path)


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 5_000, -5_000, -1])
def test_a_truncated_file_is_named_and_leaves_nothing_behind(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ConfigError, match=r"tiny\.gguf") as caught:
        import_gguf(path, tmp_path)
    assert caught.value.field == "model"
    assert os.listdir(tmp_path) == ["tiny.gguf"]


def test_a_corrupt_array_length_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    content = bytearray(path.read_bytes())
    key = b"tokenizer.ggml.token_type"
    length_at = content.index(key) + len(key) + 8  # behind the types of the value and of its elements
    assert int.from_bytes(content[length_at : length_at + 8], "little") == 320
    content[length_at : length_at + 8] = (2**60).to_bytes(8, "little")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiny\.gguf is not a whole GGUF file"):
        import_gguf(path, tmp_path)


def test_more_layers_than_tensors_are_refused(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"llama.block_count": 2**31})
    with pytest.raises(ConfigError, match="2147483648 layers, but only 21 tensors"):
        import_gguf(tmp_path / "tiny.gguf", tmp_path)


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"PK" * 500)
    with pytest.raises(ConfigError, match=r"fake\.gguf is not a whole GGUF file"):
        import_gguf(tmp_path / "fake.gguf", tmp_path)


def test_a_folder_that_cannot_be_written_is_named_before_the_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"not even a GGUF file")
    with pytest.raises(ConfigError, match="absent cannot be written") as caught:
        import_gguf(tmp_path / "fake.gguf", tmp_path / "absent")
    assert caught.value.field == "cache_dir"


def test_the_second_import_reads_nothing(tmp_path: Path) -> None:
    path, calls = tmp_path / "tiny.gguf", []
    write_tiny_gguf(path)
    folder = import_gguf(path, tmp_path, lambda *call: calls.append(call))
    assert calls[-1] == ("gguf_import", 21, 21)
    calls.clear()
    assert import_gguf(path, tmp_path, lambda *call: calls.append(call)) == folder
    assert calls == []


def test_another_user_can_read_the_weights(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = import_gguf(tmp_path / "tiny.gguf", tmp_path)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_changed_file_is_imported_again(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_tiny_gguf(path)
    first = import_gguf(path, tmp_path)
    os.utime(path, ns=(1, 1))
    assert import_gguf(path, tmp_path) != first


def test_two_imports_at_once_both_get_the_whole_folder(tmp_path: Path) -> None:
    path, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    cache.mkdir()
    write_tiny_gguf(path)
    both_started = threading.Barrier(2)
    folders: list[Path] = []

    def run() -> None:
        # both are past the look into the cache when the first tensor is converted
        waiting = iter([both_started.wait])
        folders.append(import_gguf(path, cache, lambda *_: [wait() for wait in waiting]))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folders[0] == folders[1]
    assert [entry.name for entry in cache.iterdir()] == [folders[0].name]
    assert len(load_weights(folders[0], read_spec(folders[0]), torch.bfloat16)) == 21


@pytest.mark.parametrize(("add_bos", "wanted"), [(True, ["<|im_start|>", "h"]), (False, ["h"])])
def test_texts_begin_with_bos_only_where_the_file_says_so(tmp_path: Path, add_bos: bool, wanted: list[str]) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf", metadata={"tokenizer.ggml.add_bos_token": add_bos})
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(tmp_path / "tiny.gguf", tmp_path))
    assert tokenizer.convert_ids_to_tokens(tokenizer("h").input_ids) == wanted


def test_the_tokenizer_round_trips_and_keeps_special_tokens_whole(tmp_path: Path) -> None:
    write_tiny_gguf(tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(import_gguf(tmp_path / "tiny.gguf", tmp_path))
    text = "naïve 漢字 \U0001f600\tx  y\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("".join(SPECIAL_TOKENS)).input_ids == [0, 1, 2]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


@pytest.fixture(scope="module")
def default_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return locate_model(None, tmp_path_factory.mktemp("cache")).folder


def test_the_default_model_is_described_fully(default_model: Path) -> None:
    spec = read_spec(default_model)
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (30, 576, 9, 3, 64)
    assert (spec.vocab_size, spec.max_position, spec.rms_norm_eps) == (49152, 8192, 1e-5)
    assert spec.rope == RopeSpec("default", 100000.0)
    assert spec.tie_word_embeddings
    assert spec.eos_token_ids == (2,)


def test_the_default_models_tokenizer_is_exact(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    assert tokenizer("<|endoftext|><|im_start|><|im_end|>").input_ids == [0, 1, 2]
    assert tokenizer.eos_token_id == 2
    assert tokenizer.convert_ids_to_tokens(tokenizer("in 2025").input_ids) == ["in", "Ġ", "2", "0", "2", "5"]
    assert tokenizer.convert_ids_to_tokens(tokenizer(" The capital's").input_ids) == ["ĠThe", "Ġcapital", "'s"]
    for text in ("Hello, world!  \n\n\tcode = 1234", "naïve café 漢字 \U0001f600", "def f(x):\n    return x ** 2\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_default_models_chat_template_renders_its_system_prompt(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_default_model_knows_the_capital_of_france(default_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(default_model)
    model = AutoModelForCausalLM.from_pretrained(default_model, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt.input_ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2

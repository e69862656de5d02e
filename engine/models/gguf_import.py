"""Converts a GGUF file, once, into an ordinary Hugging Face folder: bf16 safetensors, configs and tokenizer.

Later starts only read that folder. llama.cpp interleaves the rows of q and k for its rotary layout in the `llama`
architecture (which Mistral's files use too); that is undone here. The Qwen architectures store them as they are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, Keys, ReaderTensor, dequantize
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file

from dspark.engine.errors import ConfigError
from dspark.engine.models.gguf_tokenizer import write_tokenizer
from dspark.engine.models.rope import inverse_frequencies
from dspark.engine.models.spec import RopeSpec, read_spec
from dspark.engine.models.tensor_folder import Progress
from dspark.engine.models.weights import weight_shapes

CONVERTER_VERSION = 1
"""Part of the cache key: raise it whenever the folder written for the same file would differ."""

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_SHARD_BYTES = 4 << 30  # bounds the memory of a conversion
_BF16_BYTES = 2
_LLAMA3_ORIGINAL_CONTEXT = 8192  # GGUF stores Llama 3's resulting factors, not the parameters they came from
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)

_MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"
_NEUTRAL_ROPE_SCALING = {  # keys that change nothing at these values; any other value or key is refused
    "finetuned": (True, False),
    "attn_factor": (1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_ext_factor": (1.0,),
    "yarn_log_multiplier": (0.0,),
}


def import_gguf(path: Path, cache_dir: Path, progress: Progress | None = None) -> Path:
    """The Hugging Face folder in `cache_dir` made from a GGUF file (any part of a split one), converted if needed.

    The folder appears in one rename, so a crash leaves nothing half-done under its name and of two processes that
    convert at once both get a whole folder. progress: called with ("gguf_import", tensors done, tensors).
    Raises ConfigError("model", ...) naming a file that is corrupt or not supported, and ConfigError("cache_dir", ...)
    naming a folder that cannot be written, before any conversion work.
    """
    parts = _part_paths(path)
    folder = cache_dir / f"{gguf_name(path)}-{_cache_key(parts)}"
    if folder.is_dir():
        return folder
    try:
        partial = cache_dir / f".importing-{uuid.uuid4().hex}"
        partial.mkdir()
    except OSError as error:
        raise ConfigError("cache_dir", f"{cache_dir} cannot be written: {error}") from error
    try:
        _convert(parts, partial, progress)
        _publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # gone already when it was published
    return folder


def gguf_name(path: Path) -> str:
    """The file's name without suffix and part number."""
    split = _PART.search(path.name)
    return path.name[: split.start()] if split else path.stem


def _publish(partial: Path, folder: Path) -> None:
    try:
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # otherwise another process was first, and its folder is the same
            raise ConfigError("cache_dir", f"{folder} cannot be written: {error}") from error


def _part_paths(path: Path) -> list[Path]:
    split = _PART.search(path.name)
    if split is None:
        parts = [path]
    else:
        numbers = range(1, int(split[2]) + 1)
        parts = [path.with_name(f"{gguf_name(path)}-{number:05}-of-{split[2]}{path.suffix}") for number in numbers]
    missing = [str(part) for part in parts if not part.is_file()]
    if missing:
        raise ConfigError("model", f"no such GGUF file: {', '.join(missing)}")
    if path not in parts:
        raise ConfigError("model", f"{path} is not one of the {len(parts)} parts that its own name speaks of")
    return parts


def _cache_key(parts: list[Path]) -> str:
    described = [str(CONVERTER_VERSION)]
    for part in parts:
        state = part.stat()
        described.append(f"{part.resolve()}:{state.st_size}:{state.st_mtime_ns}")
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:16]


def _convert(parts: list[Path], folder: Path, progress: Progress | None) -> None:
    readers = [_open(part) for part in parts]
    metadata = _metadata(readers[0], parts[0])
    tensors = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    architecture = _architecture(metadata, parts[0])
    config = _config(metadata, architecture, tensors, parts[0])
    tensors.pop(_ROPE_FREQS, None)
    names = {_hugging_face_name(name, parts[0]): tensor for name, tensor in tensors.items()}
    free = shutil.disk_usage(folder).free
    needed = _BF16_BYTES * sum(int(tensor.n_elements) for tensor in names.values())
    if needed > free:
        raise ConfigError("cache_dir", f"{folder.parent} has {free} bytes free; {parts[0].name} needs {needed}")
    try:
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", _generation_config(metadata))
        _check_tensors(folder, names, parts[0])
        write_tokenizer(metadata, parts[0], folder)
        permuted = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        _write_weights(names, permuted if architecture == "llama" else {}, folder, progress)
    except (OSError, SafetensorError) as error:
        raise ConfigError("cache_dir", f"{folder.parent} cannot be written: {error}") from error


class _BoundedReader(GGUFReader):
    """Refuses to read past the end of the file, where GGUFReader reads nothing and goes on: a corrupt array length
    would keep it busy for ever, and a truncated string would pass."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> NDArray[Any]:
        end = offset + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, but something is stored up to byte {end}")
        return super()._get(offset, dtype, count, override_order)


def _open(path: Path) -> GGUFReader:
    try:
        return _BoundedReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise ConfigError("model", f"{path} is not a whole GGUF file: {error}") from error


def _metadata(reader: GGUFReader, path: Path) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise ConfigError("model", f"{path} has unreadable metadata: {error}") from error


def _architecture(metadata: Mapping[str, Any], path: Path) -> str:
    architecture = metadata.get(Keys.General.ARCHITECTURE)
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            "model",
            f"{path}: GGUF architecture {architecture!r}; supported are {', '.join(_ARCHITECTURES)} (Mistral is llama)",
        )
    for key in (Keys.LLM.EXPERT_COUNT, Keys.Attention.SLIDING_WINDOW):
        name = key.format(arch=architecture)
        if metadata.get(name):
            raise ConfigError("model", f"{path}: {name} is {metadata[name]}; supported is 0 only")
    return str(architecture)


def _config(
    metadata: Mapping[str, Any], architecture: str, tensors: Mapping[str, ReaderTensor], path: Path
) -> dict[str, Any]:
    """config.json of the model; sizes that do not fit the tensors are found by `_check_tensors`."""

    def number(key: str, default: float | None = None) -> float:
        return _number(metadata, key.format(arch=architecture), default, path)

    if "token_embd.weight" not in tensors:
        raise ConfigError("model", f"{path} lacks the tensor token_embd.weight")
    layers = int(number(Keys.LLM.BLOCK_COUNT))
    if layers > len(tensors):
        raise ConfigError("model", f"{path}: {layers} layers, but only {len(tensors)} tensors")
    heads = int(number(Keys.Attention.HEAD_COUNT))
    hidden = int(number(Keys.LLM.EMBEDDING_LENGTH))
    head_dim = int(number(Keys.Attention.KEY_LENGTH, hidden // max(heads, 1)))
    rotated = int(number(Keys.Rope.DIMENSION_COUNT, head_dim))
    if rotated != head_dim:
        raise ConfigError("model", f"{path}: rotary embeddings turn {rotated} of {head_dim} dimensions; must be all")
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[architecture]],
        "model_type": architecture,
        "dtype": "bfloat16",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": hidden,
        "intermediate_size": int(number(Keys.LLM.FEED_FORWARD_LENGTH)),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(number(Keys.Attention.HEAD_COUNT_KV, heads)),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": int(number(Keys.LLM.CONTEXT_LENGTH)),
        "rms_norm_eps": number(Keys.Attention.LAYERNORM_RMS_EPS),
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": _rope_parameters(metadata, architecture, tensors.get(_ROPE_FREQS), head_dim, path),
    }
    if architecture != "qwen2":  # whose q, k, v always have a bias and whose config has no such field
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in tensors
    return config | _token_ids(metadata)


def _token_ids(metadata: Mapping[str, Any]) -> dict[str, int | None]:
    keys = {
        "bos_token_id": Keys.Tokenizer.BOS_ID,
        "eos_token_id": Keys.Tokenizer.EOS_ID,
        "pad_token_id": Keys.Tokenizer.PAD_ID,
    }
    return {name: metadata.get(key) for name, key in keys.items()}


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that ends a text: end of sequence, of turn, of message."""
    ends = (Keys.Tokenizer.EOS_ID, Keys.Tokenizer.EOT_ID, Keys.Tokenizer.EOM_ID)
    eos = list(dict.fromkeys(metadata[key] for key in ends if key in metadata))
    return _token_ids(metadata) | {"eos_token_id": eos or None}


def _rope_parameters(
    metadata: Mapping[str, Any], architecture: str, freqs: ReaderTensor | None, head_dim: int, path: Path
) -> dict[str, Any]:
    theta = _number(metadata, Keys.Rope.FREQ_BASE.format(arch=architecture), 10000.0, path)
    prefix = f"{architecture}.rope.scaling."
    scaling = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    kind = scaling.pop("type", "none")
    original = int(scaling.pop("original_context_length", 0))
    factor = _number(scaling, "factor", 1.0, path)
    scaling.pop("factor", None)
    betas = {
        name: float(scaling.pop(f"yarn_{name}")) for name in ("beta_fast", "beta_slow") if f"yarn_{name}" in scaling
    }
    unknown = {key: value for key, value in scaling.items() if value not in _NEUTRAL_ROPE_SCALING.get(key, ())}
    if kind not in ("none", "linear", "yarn") or unknown:
        raise ConfigError(
            "model", f"{path}: rope scaling of type {kind!r} with {unknown}; supported are none, linear, yarn, llama3"
        )
    if freqs is not None:
        return _llama3_parameters(freqs, theta, original or _LLAMA3_ORIGINAL_CONTEXT, head_dim, path)
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": theta, "factor": factor}
    if kind == "yarn":
        parameters |= betas
        if original:
            parameters["original_max_position_embeddings"] = original
    return parameters


def _llama3_parameters(freqs: ReaderTensor, theta: float, original: int, head_dim: int, path: Path) -> dict[str, Any]:
    """Llama 3's scaling, recovered from the divisor of each rotary frequency that the file stores and checked."""
    divisors = torch.from_numpy(_values(freqs))
    rope = RopeSpec("llama3", theta, float(divisors.max()), original)
    expected = inverse_frequencies(RopeSpec("default", theta), head_dim) / inverse_frequencies(rope, head_dim)
    if divisors.shape != expected.shape or not torch.allclose(divisors, expected, rtol=1e-3):
        raise ConfigError(
            "model",
            f"{path}: {_ROPE_FREQS} is not Llama 3's scaling with factor {rope.factor:g} over {original} tokens, "
            "the only one supported; serve the model from its Hugging Face folder instead",
        )
    return {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": original,
    }


def _number(metadata: Mapping[str, Any], key: str, default: float | None, path: Path) -> float:
    value = metadata.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError("model", f"{path}: {key} must be a number, not {'absent' if value is None else value!r}")
    # GGUF stores float32: its shortest decimal form is what the model's author wrote
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _hugging_face_name(name: str, path: Path) -> str:
    stem, _, kind = name.rpartition(".")
    mapped = _MODEL_NAMES.get(stem)
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if layer and layer[2] in _LAYER_NAMES:
        mapped = f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}"
    if mapped is None:
        raise ConfigError("model", f"{path}: the tensor {name} belongs to no supported architecture")
    return f"{mapped}.{kind}"


def _check_tensors(folder: Path, names: Mapping[str, ReaderTensor], path: Path) -> None:
    try:
        wanted = weight_shapes(read_spec(folder))
    except ConfigError as error:
        raise ConfigError("model", f"{path} describes a model that cannot be served: {error}") from error
    found = {name: tuple(int(size) for size in reversed(tensor.shape)) for name, tensor in names.items()}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        listed = "; ".join(f"{name}: found {found.get(name)}, wanted {wanted.get(name)}" for name in wrong)
        raise ConfigError("model", f"{path}: tensors do not fit the metadata: {listed}")
    if unread := sorted({str(t.tensor_type.name) for t in names.values() if not _readable(t)}):
        raise ConfigError("model", f"{path}: quantisation {', '.join(unread)} cannot be read")


def _readable(tensor: ReaderTensor) -> bool:
    try:
        dequantize(tensor.data[:1], tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _values(tensor: ReaderTensor) -> NDArray[np.float32]:
    """Dequantised, in the shape [out, in] or [size]; a copy, so that it can outlive the file's mapping."""
    return np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)


def _write_weights(
    names: Mapping[str, ReaderTensor], permuted: Mapping[str, int], folder: Path, progress: Progress | None
) -> None:
    """permuted: projections whose rows llama.cpp interleaved, with their number of heads."""
    shards = list(_shards(names))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        tensors: dict[str, torch.Tensor] = {}
        for name in shard:
            values = _values(names[name])
            heads = permuted.get(name.split(".")[-2])
            if heads is not None:
                values = _half_split_rows(values, heads)
            tensors[name] = torch.from_numpy(values).to(torch.bfloat16)
            if progress is not None:
                progress("gguf_import", len(weight_map) + len(tensors), len(names))
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it private, but a cache may be filled by another user
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def _half_split_rows(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's row order: within each head (x0, y0, x1, y1, …) back to (x0, x1, …, y0, y1, …)."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(values.shape))


def _shards(names: Mapping[str, ReaderTensor]) -> Iterator[list[str]]:
    shard: list[str] = []
    size = 0
    for name, tensor in names.items():
        tensor_bytes = _BF16_BYTES * int(tensor.n_elements)
        if shard and size + tensor_bytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += tensor_bytes
    yield shard


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")

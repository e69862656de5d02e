"""Tiny random models and a tiny tokenizer, written to disk the way real ones are published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

_CONFIGS = {
    "LlamaForCausalLM": (LlamaConfig, {"head_dim": 16}),
    "MistralForCausalLM": (MistralConfig, {"head_dim": 16, "sliding_window": 24}),
    "Qwen2ForCausalLM": (Qwen2Config, {}),
    "Qwen3ForCausalLM": (Qwen3Config, {"head_dim": 32}),
}

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_TOKEN_ID = SPECIAL_TOKENS.index("<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random fp32 model: 2 layers, width 64, 4 heads over 2 K/V heads, vocabulary 320, untied.

    overrides: fields of its transformers config. Weights are wide enough that greedy decoding does not get stuck on
    one token, and norms and biases differ from 1 and 0, so that leaving one out is seen.
    """
    config_class, own = _CONFIGS[architecture]
    fields: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": None,
        "initializer_range": 0.15,
    }
    config = config_class(**(fields | own | overrides))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                elif name.endswith(".bias"):
                    parameter.normal_(0.0, 0.1)
    return model.eval()


def write_tiny_model(folder: Path, architecture: str = "LlamaForCausalLM", seed: int = 0, **overrides: Any) -> Path:
    """Save `tiny_model(...)` and its tokenizer in `folder`; returns the folder."""
    model = tiny_model(architecture, seed, **overrides)
    model.save_pretrained(folder)
    write_tiny_tokenizer(folder, model.config.vocab_size)
    return folder


def write_tiny_tokenizer(folder: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer with `vocab_size` ids (at least 259: special tokens and the 256 bytes) and a chat
    template. Every text round-trips; ids after the bytes are merges of two bytes."""
    vocabulary, merges = _vocabulary(vocab_size)
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def _vocabulary(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ascii_letters = [letter for letter in letters if letter.isascii() and letter.isalpha()]
    pairs = [(left, right) for left in ascii_letters for right in ascii_letters]
    merges = pairs[: vocab_size - len(SPECIAL_TOKENS) - len(letters)]
    vocabulary = [*SPECIAL_TOKENS, *letters, *("".join(pair) for pair in merges)]
    if len(vocabulary) != vocab_size:
        raise ValueError(f"vocab_size must be {len(vocabulary)}..{len(vocabulary) + len(pairs)}, not {vocab_size}")
    return vocabulary, merges


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_tiny_gguf(
    path: Path,
    architecture: str = "LlamaForCausalLM",
    *,
    pre: str = "gpt-2",
    metadata: dict[str, float | str] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    split_max_tensors: int = 0,
    **overrides: Any,
) -> PreTrainedModel:
    """Write `tiny_model(architecture, **overrides)` as llama.cpp's converter would, and return the model.

    pre: name of the pre-tokenizer. metadata, tensors: more key-values (these win) and tensors, by their GGUF names.
    split_max_tensors: tensors per part; the parts are named path's stem + -00001-of-0000N.gguf. 0: one file.
    """
    model = tiny_model(architecture, **overrides)
    config = model.config
    arch = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}[architecture]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    _add_tokenizer(writer, config.vocab_size, pre)
    for key, value in (metadata or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32, bool: writer.add_bool}
        add[type(value)](key, value)
    for name, values in _gguf_tensors(model, arch).items():
        writer.add_tensor(name, values)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, pre: str) -> None:
    vocabulary, merges = _vocabulary(vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token in SPECIAL_TOKENS else gguf.TokenType.NORMAL for token in vocabulary]
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(SPECIAL_TOKENS.index("<|im_start|>"))
    writer.add_eos_token_id(EOS_TOKEN_ID)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _gguf_tensors(model: PreTrainedModel, arch: str) -> dict[str, np.ndarray]:
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    tensors: dict[str, np.ndarray] = {}
    for name, parameter in model.named_parameters():  # which lists a tied head once, as the embedding
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, index, inner = stem.split(".", 3)
            mapped, target = _GGUF_NAMES[inner], f"blk.{index}.{_GGUF_NAMES[inner]}.{kind}"
        else:
            mapped, target = _GGUF_NAMES[stem], f"{_GGUF_NAMES[stem]}.{kind}"
        values = parameter.detach().numpy()
        if arch == "llama" and mapped in heads:
            halves = values.reshape(heads[mapped], 2, -1, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
        tensors[target] = values
    return tensors

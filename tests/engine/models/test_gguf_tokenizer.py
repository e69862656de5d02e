"""The tokenizer of a GGUF file cuts and joins text as llama.cpp and the model's own tokenizer do."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from gguf import TokenType
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from dspark.engine.errors import ConfigError
from dspark.engine.models.gguf_tokenizer import build_tokenizer, write_tokenizer

FILE = Path("model.gguf")


def byte_level(pre: str | None, *joins: str, **changes: Any) -> dict[str, Any]:
    tokens = ["<|end|>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [join.replace(" ", "") for join in joins]
    types = [TokenType.CONTROL, TokenType.USER_DEFINED] + [TokenType.NORMAL] * (len(tokens) - 2)
    metadata = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "merges": list(joins)} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """Words of the letters a to d; longer tokens score better, equal lengths in reverse alphabetical order."""
    letters = ["▁", "a", "b", "c", "d"]
    words = ["ab", "bc", "cd", "▁a", "▁b", "abc", "bcd", "▁ab", "aa", "▁▁", "dd", "aaaa", "▁abc", "▁abcd"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *letters]
    types = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL] + [TokenType.BYTE] * 256
    types += [TokenType.NORMAL] * (len(tokens) - len(types))
    scores = [0.0] * 259 + [-float(index) for index in range(len(words))] + [-1000.0 - i for i in range(len(letters))]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": types,
        "scores": scores,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        ("smollm", ["It", "'s", " ", "2", "0", "2", "5", ",", " HE", "'", "LL", "  ", " goOn", "!!", "\n", "\n", "x"]),
        ("gpt-2", ["It", "'s", " 2025", ",", " HE", "'", "LL", "  ", " goOn", "!!", "\n", "\n", "x"]),
        ("llama-bpe", ["It", "'s", " ", "202", "5", ",", " HE", "'LL", "  ", " goOn", "!!\n\n", "x"]),
        ("qwen2", ["It", "'s", " ", "2", "0", "2", "5", ",", " HE", "'LL", "  ", " goOn", "!!\n\n", "x"]),
        ("tekken", ["It", "'s", " ", "2", "0", "2", "5", ",", " HE", "'LL", "  ", " go", "On", "!!\n\n", "x"]),
        ("default", ["It", "'", "s", " ", "202", "5", ",", " HE", "'", "LL", "  ", " goOn", "!!", "\n", "\n", "x"]),
        (None, ["It", "'", "s", " ", "202", "5", ",", " HE", "'", "LL", "  ", " goOn", "!!", "\n", "\n", "x"]),
    ],
)
def test_each_pre_tokenizer_cuts_as_its_models_do(pre: str, wanted: list[str]) -> None:
    assert pieces(build_tokenizer(byte_level(pre), FILE), "It's 2025, HE'LL   goOn!!\n\nx") == wanted


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "tekken", "default"])
@settings(max_examples=30, deadline=None)
@given(text=st.text())
def test_every_text_round_trips_through_byte_level_bpe(pre: str, text: str) -> None:
    tokenizer = build_tokenizer(byte_level(pre, "Ġ t", "h e", "Ġt he"), FILE)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_are_applied_in_order() -> None:
    tokenizer = build_tokenizer(byte_level("gpt-2", "h e", "t h", "t he"), FILE)
    assert tokenizer.encode("the th").tokens == ["the", "Ġ", "th"]


def test_qwen_composes_characters_first() -> None:
    tokenizer = build_tokenizer(byte_level("qwen2"), FILE)
    assert tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids


def test_control_and_user_defined_tokens_are_never_cut_but_only_control_tokens_are_special() -> None:
    tokenizer = build_tokenizer(byte_level("smollm"), FILE)
    ids = tokenizer.encode("<|end|>a<tool>").ids
    assert ids[0] == 0
    assert ids[-1] == 1
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool>"


@pytest.mark.parametrize(
    ("pre", "add_bos", "begins"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_bos_begins_a_text_as_the_file_or_else_llama_cpp_says(pre: str, add_bos: bool | None, begins: bool) -> None:
    tokenizer = build_tokenizer(byte_level(pre, bos_token_id=0, add_bos_token=add_bos), FILE)
    assert (tokenizer.encode("a").ids[0] == 0) == begins


def joined_by_score(text: str, metadata: dict[str, Any]) -> list[str]:
    """SentencePiece's BPE, word for word: join the best-scoring neighbours, leftmost first, until none are left."""
    tokens = metadata["tokenizer.ggml.tokens"]
    score = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [score.get(left + right, -math.inf) for left, right in pairwise(symbols)]
        if not unions or max(unions) == -math.inf:
            return symbols
        best = unions.index(max(unions))
        symbols[best : best + 2] = [symbols[best] + symbols[best + 1]]


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet="abcd ", min_size=1, max_size=24))
def test_sentencepiece_joins_by_score(text: str) -> None:
    metadata = sentencepiece()
    encoded = build_tokenizer(metadata, FILE).encode(text)
    assert encoded.tokens == ["<s>", *joined_by_score(text, metadata)]


def test_sentencepiece_spells_unknown_characters_in_bytes() -> None:
    tokenizer = build_tokenizer(sentencepiece(), FILE)
    assert tokenizer.encode("a\u00e9\n").tokens == ["<s>", "▁a", "<0xC3>", "<0xA9>", "<0x0A>"]


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1))
@pytest.mark.parametrize("add_prefix", [True, False])
def test_sentencepiece_texts_round_trip(text: str, add_prefix: bool) -> None:
    if "▁" in text or any(token in text for token in ("<s>", "</s>", "<unk>")):
        return  # those stand for a space and for special tokens
    tokenizer = build_tokenizer(sentencepiece(add_space_prefix=add_prefix), FILE)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize("metadata", [byte_level("smollm", eos_token_id=0), sentencepiece()], ids=["bytes", "spm"])
def test_transformers_reads_the_written_files_as_the_same_tokenizer(tmp_path: Path, metadata: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    write_tokenizer(metadata | {"tokenizer.chat_template": "{{ messages[0]['content'] }}!"}, FILE, tmp_path)
    read, built = AutoTokenizer.from_pretrained(tmp_path), build_tokenizer(metadata, FILE)
    text = " abcd 12 \u00e9\n"
    assert read(text).input_ids == built.encode(text).ids
    assert read.decode(read(text).input_ids, skip_special_tokens=True) == text
    assert read.eos_token_id == metadata["tokenizer.ggml.eos_token_id"]
    assert read.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab!"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level("gpt-4o"), r"tokenizer\.ggml\.pre is 'gpt-4o'; supported are smollm, gpt-2, llama-bpe"),
        (byte_level("gpt-2", model="bert"), r"tokenizer\.ggml\.model is 'bert'; supported are gpt2"),
        (byte_level("gpt-2", model=None), r"the metadata lacks tokenizer\.ggml\.model"),
        (byte_level("gpt-2", merges=None), r"the metadata lacks tokenizer\.ggml\.merges"),
        (byte_level("gpt-2", merges=["ab"]), "the merge 'ab' is not two tokens"),
        (byte_level("gpt-2", merges=["a b"]), "uses 'ab', which is not a token"),
        (byte_level("gpt-2", tokens=["a", "a"]), "2 tokens, 1 of them distinct"),
        (byte_level("gpt-2", bos_token_id=9999, add_bos_token=True), "bos_token_id is 9999 but the vocabulary holds"),
        (sentencepiece(scores=[0.0]), "1 token scores for"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_exactly_is_refused(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_tokenizer(metadata, FILE)
    assert caught.value.field == "model"
    assert "model.gguf" in str(caught.value)

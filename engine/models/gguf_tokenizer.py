"""Builds the tokenizer that a GGUF file describes, with the `tokenizers` library.

`tokenizer.ggml.model` is `gpt2` (byte-level BPE) or `llama` (SentencePiece BPE: Llama 2, Mistral 7B). How text is cut
before byte-level BPE is named by `tokenizer.ggml.pre`; the patterns are those llama.cpp applies for these names (its
llama-vocab.cpp), written the way the models' own Hugging Face tokenizers write them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf import Keys, TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from dspark.engine.errors import ConfigError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's stand-in for a space

_TOKEN_FIELDS = {
    "bos_token": Keys.Tokenizer.BOS_ID,
    "eos_token": Keys.Tokenizer.EOS_ID,
    "unk_token": Keys.Tokenizer.UNK_ID,
    "pad_token": Keys.Tokenizer.PAD_ID,
}


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cut at the matches of each pattern in turn, keeping what lies between; then map bytes to letters."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _single_digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


_PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "smollm": _single_digits,
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "llama-bpe": lambda: _split(_WORDS % "{1,3}"),
    "qwen2": lambda: _split(_WORDS % ""),
    "tekken": lambda: _split(_TEKKEN),
    "default": lambda: _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_WHOLE_WORDS = ("llama-bpe", "tekken")
"""A piece that is a token is taken as it is, merges or not; these vocabularies also begin texts with bos by default."""


def write_tokenizer(metadata: Mapping[str, Any], path: Path, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json (special tokens, chat template) into `folder`.

    metadata: the GGUF key-values. path: the GGUF file, for messages.
    Raises ConfigError("model", ...) for a tokenizer that cannot be built exactly.
    """
    build_tokenizer(metadata, path).save(str(folder / "tokenizer.json"))
    vocabulary: list[str] = metadata[Keys.Tokenizer.LIST]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in _TOKEN_FIELDS.items():
        if key in metadata:
            config[name] = vocabulary[_token_id(metadata, key, path)]
    if Keys.Tokenizer.CHAT_TEMPLATE in metadata:
        config["chat_template"] = metadata[Keys.Tokenizer.CHAT_TEMPLATE]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8")


def build_tokenizer(metadata: Mapping[str, Any], path: Path) -> Tokenizer:
    """The tokenizer of `tokenizer.ggml.*`; control and user-defined tokens are never cut."""
    vocabulary: list[str] = _required(metadata, Keys.Tokenizer.LIST, path)
    types: list[int] = _required(metadata, Keys.Tokenizer.TOKEN_TYPE, path)
    ids = {token: index for index, token in enumerate(vocabulary)}
    if len(ids) != len(vocabulary) or len(types) != len(vocabulary):
        raise ConfigError(
            "model", f"{path}: {len(vocabulary)} tokens, {len(ids)} of them distinct, with {len(types)} token types"
        )
    model = _required(metadata, Keys.Tokenizer.MODEL, path)
    if model == "gpt2":
        tokenizer, begins_with_bos = _byte_level_bpe(metadata, ids, path)
    elif model == "llama":
        tokenizer, begins_with_bos = _sentencepiece_bpe(metadata, ids, path), True
    else:
        raise ConfigError(
            "model",
            f"{path}: {Keys.Tokenizer.MODEL} is {model!r}; supported are gpt2 (byte-level BPE) and llama "
            "(SentencePiece BPE). Serve the model from its Hugging Face folder instead",
        )
    if metadata.get(Keys.Tokenizer.ADD_BOS, begins_with_bos) and Keys.Tokenizer.BOS_ID in metadata:
        tokenizer.post_processor = _bos_first(metadata, vocabulary, path)
    for kind, special in ((TokenType.CONTROL, True), (TokenType.UNKNOWN, True), (TokenType.USER_DEFINED, False)):
        whole = [token for token, token_type in zip(vocabulary, types, strict=True) if token_type == kind]
        added = [AddedToken(token, special=special, normalized=False) for token in whole]
        if special:
            tokenizer.add_special_tokens(added)
        else:
            tokenizer.add_tokens(added)
    return tokenizer


def _byte_level_bpe(metadata: Mapping[str, Any], ids: dict[str, int], path: Path) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether llama.cpp begins texts with bos when the file does not say."""
    pre = str(metadata.get(Keys.Tokenizer.PRE, "default"))
    if pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            "model",
            f"{path}: {Keys.Tokenizer.PRE} is {pre!r}; supported are {', '.join(_PRE_TOKENIZERS)}. "
            "Serve the model from its Hugging Face folder instead",
        )
    merges = [_merge(line, path) for line in _required(metadata, Keys.Tokenizer.MERGES, path)]
    unknown = [part for pair in merges for part in (*pair, "".join(pair)) if part not in ids]
    if unknown:
        raise ConfigError("model", f"{path}: {Keys.Tokenizer.MERGES} uses {unknown[0]!r}, which is not a token")
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, ignore_merges=pre in _WHOLE_WORDS))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer, pre in _WHOLE_WORDS


def _sentencepiece_bpe(metadata: Mapping[str, Any], ids: dict[str, int], path: Path) -> Tokenizer:
    """SentencePiece joins the neighbours whose union scores best; as merges, best score first.

    Characters outside the vocabulary fall back to the tokens of their bytes, <0x00> to <0xFF>.
    """
    scores: list[float] = _required(metadata, Keys.Tokenizer.SCORES, path)
    if len(scores) != len(ids):
        raise ConfigError("model", f"{path}: {len(scores)} token scores for {len(ids)} tokens")
    scored = [
        (scores[index], len(token[:cut]), len(token[cut:]), token[:cut], token[cut:])
        for token, index in ids.items()
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    scored.sort(key=lambda merge: merge[:3], reverse=True)
    merges = [(left, right) for *_, left, right in scored]
    unknown = next((token for token, index in ids.items() if index == metadata.get(Keys.Tokenizer.UNK_ID)), None)
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    decode = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get(Keys.Tokenizer.ADD_PREFIX, True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*decode, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(decode)
    return tokenizer


def _merge(line: str, path: Path) -> tuple[str, str]:
    left, separator, right = line.partition(" ")
    if not separator:
        raise ConfigError("model", f"{path}: the merge {line!r} is not two tokens with a space between")
    return left, right


def _bos_first(metadata: Mapping[str, Any], vocabulary: list[str], path: Path) -> processors.PostProcessor:
    bos_id = _token_id(metadata, Keys.Tokenizer.BOS_ID, path)
    bos = vocabulary[bos_id]
    return processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
    )


def _token_id(metadata: Mapping[str, Any], key: str, path: Path) -> int:
    token, size = int(metadata[key]), len(metadata[Keys.Tokenizer.LIST])
    if token >= size:
        raise ConfigError("model", f"{path}: {key} is {token} but the vocabulary holds {size} tokens")
    return token


def _required(metadata: Mapping[str, Any], key: str, path: Path) -> Any:
    if key not in metadata:
        raise ConfigError("model", f"{path}: the metadata lacks {key}")
    return metadata[key]

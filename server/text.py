"""Text on one side, token ids on the other: tokenizer, chat template, incremental detokenizer, stop strings.

The tokenizer is the model folder's `tokenizer.json`, read by the `tokenizers` library alone: transformers' wrapper
would add half a second to every start. Text is assembled from the bytes of each token, because only bytes tell an
unfinished UTF-8 character from a real U+FFFD, and because OpenAI's logprobs want them.
"""

from __future__ import annotations

import codecs
import json
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from dspark.engine import ConfigError, TokenDelta
from dspark.server.errors import InvalidRequestError

SPIECE_SPACE = "\u2581"


class Vocabulary:
    """What each token id stands for, in bytes. Ids beyond the tokenizer's, padding of the model's head, are empty.

    special_ids: control tokens, never shown as text.
    strips_first_space: a SentencePiece tokenizer, whose first word carries a space that the text does not have.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._tokenizer = tokenizer
        self._added = {token_id: token.content for token_id, token in added.items()}
        decoders = _flat(json.loads(tokenizer.to_str())["decoder"])
        kinds = {decoder["type"] for decoder in decoders}
        if "ByteLevel" in kinds:
            self._to_bytes: Callable[[str], bytes] = _byte_level_reader()
        elif kinds & {"ByteFallback", "Metaspace", "Replace"}:
            self._to_bytes = _sentencepiece_bytes
        else:
            raise ConfigError(
                "model",
                f"its tokenizer.json has the decoder {'+'.join(sorted(kinds)) or 'null'}; "
                "byte-level BPE and SentencePiece decoders are supported",
            )
        self.strips_first_space = any(map(_strips_first_space, decoders))
        self._bytes: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        known = self._bytes.get(token_id)
        if known is None:
            if token_id in self._added:
                known = self._added[token_id].encode()
            else:
                token = self._tokenizer.id_to_token(token_id)
                known = b"" if token is None else self._to_bytes(token)
            self._bytes[token_id] = known
        return known


def _flat(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [step for part in decoder["decoders"] for step in _flat(part)] if "decoders" in decoder else [decoder]


def _strips_first_space(decoder: dict[str, Any]) -> bool:
    if decoder["type"] == "Metaspace":
        return decoder.get("prepend_scheme") != "never"
    return decoder["type"] == "Strip" and decoder.get("content") == " " and decoder.get("start", 0) > 0


def _byte_level_reader() -> Callable[[str], bytes]:
    """Inverse of GPT-2's printable alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    byte_of = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in byte_of]
    byte_of.update({chr(0x100 + k): byte for k, byte in enumerate(hidden)})

    def read(token: str) -> bytes:
        if all(char in byte_of for char in token):
            return bytes(byte_of[char] for char in token)
        return token.encode()

    return read


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPIECE_SPACE, " ").encode()


class Detokenizer:
    """Bytes of one choice's tokens to text, O(1) per token; an unfinished UTF-8 character waits for its rest."""

    def __init__(self, vocabulary: Vocabulary, *, continues_text: bool) -> None:
        """continues_text: the choice goes on after a text, so that a leading space belongs to it."""
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = vocabulary.strips_first_space and not continues_text

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if token_id in self._vocabulary.special_ids:
            return ""
        data = self._vocabulary.token_bytes(token_id)
        if self._strip_space and data:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is left; U+FFFD where the last character never got all its bytes."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Finds the first of several strings in a text that arrives in pieces, and holds back what could begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def add(self, piece: str, *, may_stop: bool) -> tuple[str, bool]:
        """(text safe to show, whether a stop string is complete); a stop string and what follows it are never shown.

        may_stop: False lets a stop string that is completed by this piece pass as text.
        """
        text = self._held + piece
        if may_stop:
            cuts = [
                cut for stop in self._stops if (cut := text.find(stop, max(0, len(self._held) - len(stop) + 1))) >= 0
            ]
            if cuts:
                self._held = ""
                return text[: min(cuts)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that ends `text`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class ChoiceText:
    """The text of one choice as its token ids arrive; decoded once, for the engine's stop check and the client alike.

    With stop strings the engine calls it in commit (the StopCheck contract of `dspark.engine`) and `read` finds the
    text ready; without, the engine has no check to call and `read` decodes outside the step. Tokens are taken one by
    one, so that the text does not depend on how many of them a step brought.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        end_token_ids: Collection[int] = (),
        echo: str = "",
    ) -> None:
        """end_token_ids: tokens that end the text and are no part of it, once `min_tokens` came before.
        echo: text to show before the first token's."""
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stops)
        self._min_tokens = min_tokens
        self._end_token_ids = end_token_ids
        self._ready = echo
        self._decoded = 0
        self._delivered = 0
        self.ended = False

    def __call__(self, token_ids: Sequence[int]) -> int | None:
        """How many of these ids are kept when a stop string is complete within them, else None."""
        for kept, token_id in enumerate(token_ids, 1):
            if self._add(token_id):
                return kept
        return None

    def _add(self, token_id: int) -> bool:
        self._decoded += 1
        if self.ended:
            return False
        if self.is_end(token_id, self._decoded - 1):
            self.ended = True
            self._finish()
            return False
        piece = self._detokenizer.add(token_id)
        shown, stopped = self._stop_strings.add(piece, may_stop=self._decoded >= self._min_tokens)
        self._ready += shown
        self.ended = stopped
        return stopped

    def is_end(self, token_id: int, position: int) -> bool:
        """Whether this token, `position` output tokens being before it, ends the text without being shown."""
        return token_id in self._end_token_ids and position >= self._min_tokens

    def read(self, delta: TokenDelta) -> str:
        """The text that this delta lets the client see; everything when it is the choice's last."""
        self._delivered += len(delta.token_ids)
        missing = self._delivered - self._decoded
        if missing > 0:
            self(delta.token_ids[-missing:])
        if delta.finish_reason is not None and not self.ended:
            self.ended = True
            self._finish()
        shown, self._ready = self._ready, ""
        return shown

    def _finish(self) -> None:
        self._ready += self._stop_strings.finish() + self._detokenizer.finish()


class ChatTemplate:
    """The model's own Jinja template, rendered in a sandbox: it came with the weights and is not to be trusted.

    Offers what transformers offers to templates: `raise_exception`, `strftime_now`, `tojson`, loop controls.
    """

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: time.strftime(pattern)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError("model", f"its chat template does not parse: {error}") from error
        self._special_tokens = special_tokens

    def render(self, messages: list[dict[str, str]]) -> str:
        """The prompt up to where the assistant's answer begins. Raises InvalidRequestError on `messages`."""
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special_tokens)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            message = f"The model's chat template refuses these messages: {error}"
            raise InvalidRequestError(message, "messages") from error


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    # jinja2's own filter escapes for HTML, which a prompt is not
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ModelText:
    """Tokenizer and chat template of one model folder."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self.vocabulary = Vocabulary(tokenizer)

    @classmethod
    def load(cls, folder: Path) -> ModelText:
        """Raises ConfigError on a missing or corrupt tokenizer."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError("model", f"{folder} has no tokenizer.json")
        try:
            tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:
            raise ConfigError("model", f"{path} is not a readable tokenizer: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return cls(tokenizer, _load_template(folder))

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, the model's beginning-of-text token included where its tokenizer adds one."""
        return self._tokenizer.encode(text).ids

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation up to where the assistant answers. Raises InvalidRequestError on `messages`."""
        if self._template is None:
            raise InvalidRequestError("This model has no chat template; use /v1/completions", "messages")
        # the template writes the special tokens itself
        return self._tokenizer.encode(self._template.render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a whole sequence, special tokens left out."""
        detokenizer = Detokenizer(self.vocabulary, continues_text=False)
        return "".join(map(detokenizer.add, token_ids)) + detokenizer.finish()


def _load_template(folder: Path) -> ChatTemplate | None:
    """From chat_template.jinja, else `chat_template` of tokenizer_config.json: a string, or a list with a `default`."""
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path) if config_path.is_file() else {}
    source = config.get("chat_template")
    if isinstance(source, list):
        source = {entry["name"]: entry["template"] for entry in source}.get("default")
    template_path = folder / "chat_template.jinja"
    if template_path.is_file():
        source = template_path.read_text(encoding="utf-8")
    if source is None:
        return None
    tokens = {key: value for key, value in config.items() if key.endswith("_token") and value}
    return ChatTemplate(
        source,
        {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()},
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError("model", f"{path} is not valid JSON: {error}") from error

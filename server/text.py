"""Text on one side, token ids on the other: tokenizer, chat template, incremental detokenizer, stop strings.

The tokenizer is the model folder's `tokenizer.json`, read by the `tokenizers` library alone: transformers' wrapper
would add half a second to every start. Text is assembled from the bytes of each token, because only bytes tell an
unfinished UTF-8 character from a real U+FFFD, and because OpenAI's logprobs want them.
"""

from __future__ import annotations

import codecs
import json
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from dspark.engine import ConfigError, FinishReason, TokenDelta
from dspark.server.errors import InvalidRequestError
from dspark.server.parts import Part, PartKind, PlainText, TextParser, held_back, joined

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

    def token_text(self, token_id: int) -> str:
        """The token by itself, U+FFFD for bytes that are no whole characters."""
        return self.token_bytes(token_id).decode("utf-8", "replace")


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

    def __init__(
        self, vocabulary: Vocabulary, *, continues_text: bool, shown_ids: Collection[int] = frozenset()
    ) -> None:
        """continues_text: the choice goes on after a text, so that a leading space belongs to it.
        shown_ids: control tokens that are text all the same, since a parser looks for them."""
        self._hidden_ids = vocabulary.special_ids.difference(shown_ids)
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = vocabulary.strips_first_space and not continues_text

    def add(self, token_id: int) -> str:
        """The text that became certain with this token."""
        if token_id in self._hidden_ids:
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
        keep = max((held_back(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        held, self._held = self._held, ""
        return held


class ChoiceText:
    """The text of one choice as its token ids arrive; decoded once, for the engine's stop check and the client alike.

    Where the text can end the choice the engine calls it in commit (the StopCheck contract of `dspark.engine`) and
    `read` finds the parts ready; else the engine has no check to call and `read` decodes outside the step. Tokens are
    taken one by one, so that nothing depends on how many of them a step brought.
    """

    def __init__(
        self,
        detokenizer: Detokenizer,
        *,
        stops: Sequence[str] = (),
        min_tokens: int = 0,
        end_token_ids: Collection[int] = (),
        echo: str = "",
        parser: TextParser | None = None,
    ) -> None:
        """end_token_ids: tokens that end the text and are no part of it, once `min_tokens` came before.
        echo: text to show before the first token's. parser: tells reasoning and calls from content."""
        self._detokenizer = detokenizer
        self._stop_strings = StopStrings(stops)
        self._min_tokens = min_tokens
        self._end_token_ids = end_token_ids
        self._parser = parser or PlainText()
        self._ready = [Part(PartKind.CONTENT, echo)] if echo else []
        self._decoded = 0
        self._delivered = 0
        self.reasoning_tokens = 0
        self.ended = False

    def __call__(self, token_ids: Sequence[int]) -> int | None:
        """How many of these ids are kept when the text is over within them, else None."""
        for kept, token_id in enumerate(token_ids, 1):
            if self._add(token_id):
                return kept
        return None

    def _add(self, token_id: int) -> bool:
        self._decoded += 1
        if self.ended:
            return False
        if self.is_end(token_id, self._decoded - 1):
            self._finish(self._stop_strings.finish() + self._detokenizer.finish())
            return False
        piece = self._detokenizer.add(token_id)
        may_stop = self._decoded >= self._min_tokens
        shown, stopped = self._stop_strings.add(piece, may_stop=may_stop)
        was_reasoning = self._parser.in_reasoning
        self._ready += self._parser.feed(shown)
        self.reasoning_tokens += was_reasoning or self._parser.in_reasoning
        if stopped or (self._parser.done and may_stop):
            self._finish("")
        return self.ended

    def is_end(self, token_id: int, position: int) -> bool:
        """Whether this token, `position` output tokens being before it, ends the text without being shown."""
        return token_id in self._end_token_ids and position >= self._min_tokens

    def read(self, delta: TokenDelta) -> list[Part]:
        """What this delta lets the client see; everything when it is the choice's last."""
        self._delivered += len(delta.token_ids)
        missing = self._delivered - self._decoded
        if missing > 0:
            self(delta.token_ids[-missing:])
        if delta.finish_reason is not None and not self.ended:
            self._finish(self._stop_strings.finish() + self._detokenizer.finish())
        shown, self._ready = joined(self._ready), []
        return shown

    def finish_reason(self, reason: FinishReason) -> str:
        """What the client is told: that calls are to be made, where the text did not end too early for it."""
        return "tool_calls" if reason is FinishReason.STOP and self._parser.calls else reason.value

    def _finish(self, rest: str) -> None:
        self.ended = True
        self._ready += [*self._parser.feed(rest), *self._parser.finish()]


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
            self.variables = jinja2.meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError("model", f"its chat template does not parse: {error}") from error
        self.source = source
        self._special_tokens = special_tokens

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt up to where the assistant's answer begins. Raises InvalidRequestError on `messages`.

        variables: `tools` and whatever else the template knows; `add_generation_prompt` is true unless given.
        """
        known = {"add_generation_prompt": True, **self._special_tokens, **variables}
        try:
            return self._template.render(messages=messages, **known)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
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
        self.tokenizer = tokenizer
        self.template = template
        self.vocabulary = Vocabulary(tokenizer)
        control = [self.vocabulary.token_bytes(token_id).decode() for token_id in self.vocabulary.special_ids]
        # the longest first, since one may begin another
        self._control = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or r"(?!)")
        # what stands around a control token's text in a message: never in any text, since nobody can know it
        self._fence = f"\ufdd0{secrets.token_hex(8)}\ufdd1"

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

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, the model's beginning-of-text token included where its tokenizer adds one."""
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant answers. variables: see `ChatTemplate.render`.

        The text of a control token within a message, a tool or a variable is encoded as mere text: nobody ends a
        message or begins the system's but the template. Raises InvalidRequestError on `messages`.
        """
        if self.template is None:
            raise InvalidRequestError("This model has no chat template; use /v1/completions", "messages")
        text = self.template.render(self._fenced(messages), **self._fenced(variables))
        first, *others = text.split(self._fence)
        # the template writes the special tokens itself
        token_ids = self.encode(first, add_special_tokens=False)
        for index, part in enumerate(others):
            encode = self.encode if index % 2 else self._encode_as_text
            token_ids += encode(part, add_special_tokens=False)
        if len(others) % 2:
            raise InvalidRequestError("The model's chat template cuts a control token in these messages", "messages")
        return token_ids

    def ends_with(self, token_ids: Sequence[int], text: str) -> bool:
        """Whether so the prompt's text ends, control tokens included and white space aside."""
        last = b"".join(map(self.vocabulary.token_bytes, token_ids[-2 * len(text) :]))
        return last.rstrip().endswith(text.encode())

    def _fenced(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._control.sub(lambda found: f"{self._fence}{found[0]}{self._fence}", value)
        if isinstance(value, Mapping):
            return {self._fenced(key): self._fenced(inner) for key, inner in value.items()}
        return [self._fenced(inner) for inner in value] if isinstance(value, list | tuple) else value

    def _encode_as_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._blind_tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    @cached_property
    def _blind_tokenizer(self) -> Tokenizer:
        """One that sees no control tokens; a copy, because others encode with the first at the same time."""
        copy = Tokenizer.from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        return copy

    def control_ids(self, texts: Iterable[str]) -> frozenset[int]:
        """Ids of the control tokens among these texts."""
        ids = (self.tokenizer.token_to_id(text) for text in texts)
        return self.vocabulary.special_ids.intersection(token_id for token_id in ids if token_id is not None)

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

"""Structured output: what a client asks for (JSON schema, regex, choice, Lark grammar) to the engine's `Grammar`.

llguidance follows the text: an Earley parser over a lexer of derivatives, without backtracking, whose every step is
bounded by `LLParserLimits`. It wants the bytes of each token, so that any tokenizer of `text.Vocabulary` works. Source:
github.com/guidance-ai/llguidance; its docs list the JSON-schema keywords and the Lark dialect.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dspark.engine import Grammar, GrammarError
from dspark.server.errors import InvalidRequestError
from dspark.server.text import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How JSON is written: on one line, with the spaces that models are used to. Free white space would let a small model write
nothing else. The value of `x-guidance` in a schema that a Lark grammar embeds with `%json`."""
MOST_NESTING = 64
"""Levels of a JSON schema."""
MOST_COMPILED = 64
_LIMITS = LLParserLimits(step_lexer_fuel=100_000, step_max_items=10_000, max_items_in_row=500, verbose_errors=False)
"""A mask computed within these takes some 50 ms at most on one slow core; an ordinary JSON schema's takes less than one."""


@dataclass(frozen=True, slots=True)
class JsonSchema:
    """JSON that is valid under `schema`."""

    schema: dict[str, Any]


@dataclass(frozen=True, slots=True)
class AnyJsonObject:
    """Any JSON object."""


@dataclass(frozen=True, slots=True)
class Regex:
    """The whole text matches `pattern`, in the syntax of Rust's regex: without look-around and back-references."""

    pattern: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The text is one of `options`."""

    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Lark:
    """The text is derived from `start` of a grammar in llguidance's dialect of Lark."""

    grammar: str


GrammarSpec = JsonSchema | AnyJsonObject | Regex | Choice | Lark


class Grammars:
    """Compiles grammars for one tokenizer, in a thread of its own, and keeps the last ones."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        *,
        max_source_bytes: int = 65536,
        compile_timeout_s: float = 5.0,
    ) -> None:
        """vocab_size: of the model's head, which may be padded beyond the tokenizer's. eos_token_ids: may not be empty."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._max_source_bytes = max_source_bytes
        self._compile_timeout_s = compile_timeout_s
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")

    async def compile(self, spec: GrammarSpec, param: str) -> Callable[[], Grammar]:
        """→ a maker of grammars at the beginning of a text.

        Raises InvalidRequestError on `param` for what is unsupported, too large or too slow to compile.
        """
        source = _source(spec, param)
        size = len(source.encode())
        if size > self._max_source_bytes:
            raise InvalidRequestError(
                f"'{param}' is a grammar of {size} bytes; at most {self._max_source_bytes} are compiled", param
            )
        matcher = self._compiled.get(source)
        if matcher is None:
            matcher = await self._compile(source, param)
            self._compiled[source] = matcher
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(source)
        eos = self._eos_token_ids
        return lambda: MatcherGrammar(matcher.deep_copy(), eos)

    async def _compile(self, source: str, param: str) -> LLMatcher:
        running = asyncio.get_running_loop().run_in_executor(self._worker, self._build, source)
        try:
            matcher = await asyncio.wait_for(running, self._compile_timeout_s)
        except TimeoutError:
            raise InvalidRequestError(
                f"'{param}' took longer than {self._compile_timeout_s:g} s to compile; simplify it", param
            ) from None
        if matcher.is_error():
            raise InvalidRequestError(f"'{param}' is not supported: {_shortened(matcher.get_error())}", param)
        return matcher

    def _build(self, source: str) -> LLMatcher:
        return LLMatcher(self._ll_tokenizer, source, log_level=0, limits=_LIMITS)

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        """Made with the first grammar: it costs about a second."""
        return LLTokenizer(
            TokenizerWrapper(_TokenBytes(self._tokenizer, self._vocab_size, self._eos_token_ids[0])),
            eos_token=list(self._eos_token_ids),
        )

    def close(self) -> None:
        """Wait for nothing: what is still compiling is dropped."""
        self._worker.shutdown(wait=False, cancel_futures=True)


class MatcherGrammar:
    """A `Grammar` that asks an LLMatcher. The end of text is this class's: the matcher only says where it may be."""

    def __init__(self, matcher: LLMatcher, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._eos_token_ids = frozenset(eos_token_ids)
        self._ended = False

    def mask(self) -> NDArray[np.int32]:
        if self._ended:
            raise GrammarError("the text has ended; nothing may follow")
        words = np.frombuffer(self._matcher.compute_bitmask(), np.int32)
        self._check()
        return words

    def advance(self, token_ids: Sequence[int]) -> int:
        if self._ended:
            return 0
        text = list(token_ids)
        end = next((i for i, token in enumerate(text) if token in self._eos_token_ids), len(text))
        taken: int = self._matcher.try_consume_tokens(text[:end])
        self._check()
        if taken == end < len(text) and self._matcher.is_accepting():
            self._ended = True
            taken += 1
        return taken

    def rollback(self, count: int) -> None:
        if self._ended and count:
            self._ended = False
            count -= 1
        if count:
            self._matcher.rollback(count)
            self._check()

    def forced(self) -> list[int]:
        tokens: list[int] = [] if self._ended else self._matcher.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the text cannot be followed: {_shortened(self._matcher.get_error())}")


class _TokenBytes:
    """The vocabulary as llguidance reads it. Control tokens are marked by a first byte that is in no text."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        vocabulary = Vocabulary(tokenizer)
        control = vocabulary.special_ids | {eos_token_id}
        self.eos_token_id = eos_token_id
        self.special_token_ids = sorted(control)
        self.tokens = [b"\xff" * (i in control) + vocabulary.token_bytes(i) for i in range(vocab_size)]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        given = text.decode() if isinstance(text, bytes) else text
        ids: list[int] = self._tokenizer.encode(given, add_special_tokens=False).ids
        return ids


def _source(spec: GrammarSpec, param: str) -> str:
    """The grammar in the form that llguidance compiles; equal specs give equal text."""
    match spec:
        case JsonSchema(schema):
            _check_nesting(schema, param)
            try:
                return LLMatcher.grammar_from_json_schema(schema, overrides=JSON_STYLE)
            except ValueError as error:
                raise InvalidRequestError(f"'{param}' is not a JSON schema: {_shortened(str(error))}", param) from error
        case AnyJsonObject():
            return _source(JsonSchema({"type": "object"}), param)
        case Regex(pattern):
            return LLMatcher.grammar_from_regex(pattern)
        case Choice(options):
            if not options:
                raise InvalidRequestError(f"'{param}' must have at least one option, given none", param)
            return LLMatcher.grammar_from_regex("|".join(map(_literal, options)))
        case Lark(grammar):
            return LLMatcher.grammar_from_lark(grammar)


def _literal(text: str) -> str:
    """A regex that matches exactly `text`."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~/\-\s]", lambda found: f"\\x{{{ord(found[0]):x}}}", text)


def _check_nesting(value: Any, param: str) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MOST_NESTING:
            raise InvalidRequestError(f"'{param}' is nested more than {MOST_NESTING} levels deep", param)
        containers = [one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list)]
        level = [child for container in containers for child in container]


def _shortened(message: str, limit: int = 200) -> str:
    line = " ".join(message.split())
    return line if len(line) <= limit else f"{line[:limit]}…"

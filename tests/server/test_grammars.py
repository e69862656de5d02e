"""Structured output: every kind of grammar is followed token by token, and hostile ones are refused or bounded."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import EOS_TOKEN_ID, write_tiny_tokenizer
from tokenizers import Tokenizer, decoders, models

from dspark.engine import Grammar, GrammarError
from dspark.server.errors import InvalidRequestError
from dspark.server.grammars import (
    MOST_NESTING,
    AnyJsonObject,
    Choice,
    Grammars,
    GrammarSpec,
    JsonSchema,
    Lark,
    Regex,
)
from dspark.server.text import Vocabulary

PADDED_VOCAB_SIZE = 333  # the tokenizer has 320 ids
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["x", "y", "zz"]}, "maxItems": 3},
        "address": {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]},
    },
    "required": ["name", "age", "tags", "address"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder, 320)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, PADDED_VOCAB_SIZE, (EOS_TOKEN_ID, 0))


def compiled(grammars: Grammars, spec: GrammarSpec) -> Callable[[], Grammar]:
    return asyncio.run(grammars.compile(spec, "response_format"))


def start(grammars: Grammars, spec: GrammarSpec) -> Grammar:
    return compiled(grammars, spec)()


def allowed(grammar: Grammar) -> list[int]:
    words = grammar.mask()
    assert words.dtype == np.int32
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def accepts(grammars: Grammars, spec: GrammarSpec, text: str) -> bool:
    """Whether `text` can be written and then ended."""
    grammar = start(grammars, spec)
    ids = grammars._tokenizer.encode(text, add_special_tokens=False).ids
    return grammar.advance([*ids, EOS_TOKEN_ID]) == len(ids) + 1


def random_text(grammar: Grammar, vocabulary: Vocabulary, rng: random.Random, most: int = 400) -> str | None:
    """Tokens drawn from what is allowed until the text ends; None if it does not."""
    data = b""
    for _ in range(most):
        choices = allowed(grammar)
        # quotes and brackets often, or strings of random bytes would be all there is
        likely = [token for token in choices if vocabulary.token_bytes(token) in (b'"', b"]", b"}")]
        token = rng.choice(likely if likely and rng.random() < 0.3 else choices)
        assert grammar.advance([token]) == 1
        if token in (EOS_TOKEN_ID, 0):
            return data.decode()
        data += vocabulary.token_bytes(token)
    return None


SPECS: list[tuple[GrammarSpec, list[str], list[str]]] = [
    (Regex(r"[ab]{2,3}\.c"), ["ab.c", "bbb.c"], ["a.c", "ab.", "abxc", "ab.cc", ""]),
    (Regex(r"(a|bc)*"), ["", "abca"], ["b"]),
    (
        Choice(("yes", "no", "a.b|c", 'say "hi"\n', "ü/€", "-1 #~&")),
        ["yes", "no", "a.b|c", 'say "hi"\n', "ü/€", "-1 #~&"],
        ["ye", "axb|c", "yesno", "", "c"],
    ),
    (Lark('start: "a" start "b" | "c"'), ["c", "aacbb"], ["aacb", "ab"]),
    (Lark('start: "x=" %json {"type": "integer"}'), ["x=12", "x=-3"], ["x=a", "x=1.5"]),
    (AnyJsonObject(), ["{}", '{"a": [1, {"b": null}], "c": "d"}'], ["[]", "1", '{"a":1}', '{ "a": 1}', "{\n}"]),
    (
        JsonSchema(PERSON),
        ['{"name": "Ann", "age": 3, "tags": ["x", "zz"], "address": {"city": "Rome"}}'],
        [
            '{"name": "Ann", "age": 131, "tags": [], "address": {"city": "Rome"}}',
            '{"age": 3, "name": "Ann", "tags": [], "address": {"city": "Rome"}}',
            '{"name": "Ann"}',
            '{"name":"Ann","age":3,"tags":[],"address":{"city":"Rome"}}',
        ],
    ),
    (JsonSchema({"type": "string", "pattern": "^a+$"}), ['"aa"'], ['"b"', '""']),
    (JsonSchema({"anyOf": [{"type": "null"}, {"const": 5}]}), ["null", "5"], ["6"]),
    (
        JsonSchema(
            {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {"c": {"$ref": "#/$defs/n"}}}}}
        ),
        ["{}", '{"c": {"c": {}}}'],
        ['{"c": 1}'],
    ),
]


@pytest.mark.parametrize(("spec", "right", "wrong"), SPECS, ids=[type(spec).__name__ for spec, _, _ in SPECS])
def test_a_grammar_accepts_its_texts_and_no_others(
    grammars: Grammars, spec: GrammarSpec, right: list[str], wrong: list[str]
) -> None:
    assert [text for text in right if not accepts(grammars, spec, text)] == []
    assert [text for text in wrong if accepts(grammars, spec, text)] == []


def test_the_mask_is_what_advance_takes_in(grammars: Grammars) -> None:
    rng = random.Random(0)
    for spec, _, _ in SPECS:
        grammar = start(grammars, spec)
        for _ in range(12):
            choices = allowed(grammar)
            taken = []
            for token in range(PADDED_VOCAB_SIZE):
                if grammar.advance([token]):
                    taken.append(token)
                    grammar.rollback(1)
            assert taken == choices
            text = [token for token in choices if token not in (EOS_TOKEN_ID, 0)]
            if not text:
                break
            grammar.advance([rng.choice(text)])


def test_what_is_forced_is_text_that_must_come(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"answer": {"enum": ["yes", "yesterday"]}}, "required": ["answer"]}
    grammar = start(grammars, JsonSchema({**schema, "additionalProperties": False}))
    said = ""
    while forced := list(grammar.forced()):
        assert grammar.advance(forced) == len(forced)
        said += tokenizer.decode(forced, skip_special_tokens=False)
        if said.endswith("yes"):
            break
        grammar.advance(allowed(grammar)[:1])  # white space, say
    assert "answer" in said


def test_the_text_may_end_with_any_end_and_nothing_follows(grammars: Grammars) -> None:
    for end in (EOS_TOKEN_ID, 0):
        grammar = start(grammars, Regex("ab?"))
        a, b = (grammars._tokenizer.token_to_id(letter) for letter in "ab")
        assert allowed(grammar) == [a]
        assert grammar.advance([end]) == 0
        assert grammar.advance([a, end, b]) == 2
        assert grammar.advance([b]) == grammar.advance([end]) == 0
        grammar.rollback(1)
        assert allowed(grammar) == sorted([EOS_TOKEN_ID, 0, b])
        assert grammar.advance([b, end]) == 2
        grammar.rollback(3)
        assert allowed(grammar) == [a]


def test_rolling_back_leaves_no_trace(grammars: Grammars) -> None:
    text = grammars._tokenizer.encode(SPECS[6][1][0]).ids
    text.append(EOS_TOKEN_ID)
    grammar = start(grammars, JsonSchema(PERSON))
    masks = []
    for token in text:
        masks.append(allowed(grammar))
        assert grammar.advance([token]) == 1
    rng = random.Random(1)
    at = len(text)
    for _ in range(60):
        back = rng.randint(0, at)
        grammar.rollback(back)
        at -= back
        if at < len(text):
            assert allowed(grammar) == masks[at]
        step = rng.randint(0, len(text) - at)
        assert grammar.advance(text[at : at + step]) == step
        at += step


def test_choices_of_one_request_are_followed_separately(grammars: Grammars) -> None:
    make = compiled(grammars, Choice(("ab", "cd")))
    first, second = make(), make()
    a, c = (grammars._tokenizer.token_to_id(letter) for letter in "ac")
    assert first.advance([a]) == second.advance([c]) == 1
    assert allowed(first) != allowed(second)


def test_random_texts_of_a_schema_parse_and_obey_it(grammars: Grammars) -> None:
    rng = random.Random(2)
    vocabulary = Vocabulary(grammars._tokenizer)
    make = compiled(grammars, JsonSchema(PERSON))
    for _ in range(40):
        text = random_text(make(), vocabulary, rng)
        assert text is not None, "a bounded schema has bounded texts"
        person = json.loads(text)
        assert list(person) == ["name", "age", "tags", "address"]
        assert len(person["name"]) <= 12
        assert 0 <= person["age"] <= 130
        assert set(person["tags"]) <= {"x", "y", "zz"}
        assert json.dumps(person, ensure_ascii=False).encode().decode()


def test_no_control_token_and_no_padding_is_ever_text(grammars: Grammars) -> None:
    grammar = start(grammars, Regex(r"(?s:.*)"))
    assert set(allowed(grammar)) & {1, *range(320, PADDED_VOCAB_SIZE)} == set()
    assert {EOS_TOKEN_ID, 0} <= set(allowed(grammar))


def test_a_sentencepiece_vocabulary_is_followed_by_its_bytes() -> None:
    pieces = ["<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁a", "b", "é"]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<s>", "</s>", "<unk>"])
    grammars = Grammars(tokenizer, len(pieces), (1,))
    grammar = start(grammars, Regex("[éü]( a|b)"))
    ids = {piece: i for i, piece in enumerate(pieces)}
    assert allowed(grammar) == [ids["<0xC3>"], ids["é"]]
    assert grammar.advance([ids["<0xC3>"], ids["<0xA9>"]]) == 2
    assert allowed(grammar) == sorted(ids[piece] for piece in ("<0x20>", "<0x62>", "▁", "▁a", "b"))
    assert grammar.advance([ids["▁a"], 1]) == 2


# What is refused


REFUSED: list[tuple[GrammarSpec, str]] = [
    (JsonSchema({"type": "array", "uniqueItems": True}), "uniqueItems"),
    (JsonSchema({"not": {"type": "string"}}), "not"),
    (JsonSchema({"type": "strong"}), "strong"),
    (JsonSchema({"$ref": "http://example.com/schema"}), "http://example.com/schema"),
    (JsonSchema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
    (Regex("("), "("),
    (Regex("a(?=b)"), "a(?=b)"),
    (Regex(r"(a)\1"), r"(a)\\1"),
    (Choice(()), "at least one option"),
    (Lark("start: missing"), "missing"),
    (Lark("no grammar at all ((("), "Expected"),
    (Lark(""), "Empty grammar"),
]


@pytest.mark.parametrize(("spec", "named"), REFUSED, ids=str)
def test_what_is_not_supported_is_refused_by_name(grammars: Grammars, spec: GrammarSpec, named: str) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        compiled(grammars, spec)
    assert refused.value.param == "response_format"
    assert "'response_format'" in str(refused.value)
    assert named in str(refused.value)
    assert len(str(refused.value)) < 400


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(levels):
        schema = {"anyOf": [schema]}
    return schema


def test_what_is_too_large_or_too_deep_is_refused_before_it_is_compiled(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, 320, (EOS_TOKEN_ID,), max_source_bytes=1000)
    for spec in (Regex("a" * 1001), Choice(("é" * 600,)), Lark("start: " + '"a" ' * 300)):
        with pytest.raises(InvalidRequestError, match="bytes; at most 1000 are compiled"):
            compiled(grammars, spec)
    for levels in (MOST_NESTING, 100_000):
        with pytest.raises(InvalidRequestError, match=f"more than {MOST_NESTING} levels"):
            compiled(grammars, JsonSchema(nested(levels)))
    assert "_ll_tokenizer" not in vars(grammars), "nothing was compiled"


def test_what_takes_too_long_to_compile_is_refused(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, 320, (EOS_TOKEN_ID,), compile_timeout_s=0.0)
    with pytest.raises(InvalidRequestError, match="took longer than 0 s to compile"):
        compiled(grammars, Regex("a"))


HOSTILE: list[GrammarSpec] = [
    Regex(r"(a+)+$"),
    Regex(r"(a|aa)+b"),
    Regex(r"(x+x+)+y"),
    Regex(r"((a{1,100}){1,100}){1,100}"),
    Regex(r"(.*a){30}.*"),
    Regex(r"(?:a?){60}a{60}"),
    Regex(r"(a|b)*a(a|b){25}"),
    Regex(r".*(.{2000})a.{2000}"),
    Regex(r"\p{L}{1,5000}"),
    Regex("|".join(f"a{i}.*b{i}" for i in range(800))),
    Lark('start: s\ns: s s | "a" | s s s'),
    Lark('start: s\ns: s s | "a" | ""'),
    Lark("start: " + " ".join(["s"] * 200) + '\ns: "a" | "aa" | ""'),
    JsonSchema({"type": "array", "items": {"type": "string", "maxLength": 5000}, "maxItems": 5000}),
    JsonSchema({"anyOf": [{"type": "string", "pattern": f"^{'a' * i}.*$"} for i in range(300)]}),
    JsonSchema({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}),
]


@pytest.mark.parametrize("spec", HOSTILE, ids=lambda spec: type(spec).__name__)
def test_a_hostile_grammar_is_refused_or_followed_or_given_up_but_never_hangs(
    grammars: Grammars, spec: GrammarSpec
) -> None:
    """The bound is far above what was measured; it tells the exponential from the slow."""
    slowest_s = 0.0
    with suppress(InvalidRequestError, GrammarError):
        grammar = start(grammars, spec)
        a = grammars._tokenizer.token_to_id("a")
        for _ in range(150):
            began_s = time.perf_counter()
            choices = allowed(grammar)
            text = [token for token in choices if token not in (EOS_TOKEN_ID, 0)]
            if not text:
                break
            grammar.advance([a if a in text else text[0]])
            slowest_s = max(slowest_s, time.perf_counter() - began_s)
    assert slowest_s < 2.0


# Keeping


def test_a_compiled_grammar_is_kept_and_the_oldest_is_dropped(tokenizer: Tokenizer) -> None:
    grammars = Grammars(tokenizer, 320, (EOS_TOKEN_ID,))
    asyncio.run(grammars.compile(Regex("a"), "x"))
    built: list[str] = []
    build = grammars._build
    grammars._build = lambda source: built.append(source) or build(source)  # type: ignore[func-returns-value,method-assign]
    asyncio.run(grammars.compile(Regex("a"), "x"))
    assert built == []
    for number in range(64):
        asyncio.run(grammars.compile(Regex(f"b{number}"), "x"))
    asyncio.run(grammars.compile(Regex("a"), "x"))
    assert len(built) == 65


def test_the_event_loop_goes_on_while_a_grammar_is_compiled(grammars: Grammars) -> None:
    async def both() -> int:
        turns = 0

        async def turn() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        turning = asyncio.create_task(turn())
        slow = JsonSchema({"type": "object", "properties": {f"q{i}": {"type": "string"} for i in range(700)}})
        await grammars.compile(slow, "x")
        turning.cancel()
        return turns

    assert asyncio.run(both()) > 2


def test_a_grammar_file_is_not_read(grammars: Grammars, tmp_path: Path) -> None:
    """Lark can import grammars from files; here it cannot."""
    (tmp_path / "other.lark").write_text('x: "a"')
    with pytest.raises(InvalidRequestError):
        compiled(grammars, Lark(f"%import {tmp_path}/other.x\nstart: x"))

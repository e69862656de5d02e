"""Prompt files, and which of their prompts are asked."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from tiny_models import write_tiny_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dspark.engine import ConfigError
from dspark.training.answers import HELD_OUT_SHARE, Prompt, encode_prompts, read_prompts, temperature_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(folder, 320)
    return AutoTokenizer.from_pretrained(folder)


def test_a_text_file_has_a_prompt_a_line_of_the_files_kind(tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("Tell me one.\n\n  \nAnother, with “quotes”.\n", encoding="utf-8")
    assert read_prompts([tmp_path / "story.txt"]) == [
        Prompt("story", "Tell me one."),
        Prompt("story", "Another, with “quotes”."),
    ]


def test_a_jsonl_file_may_name_the_kind_of_each_prompt(tmp_path: Path) -> None:
    lines = [{"prompt": "Add 1 and 2.", "kind": "sum", "licence": "MIT"}, {"prompt": "Two\nlines."}]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_prompts([tmp_path / "other.jsonl"]) == [Prompt("sum", "Add 1 and 2."), Prompt("other", "Two\nlines.")]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"prompt": "a"', "line 2: not valid JSON"),
        (b'{"text": "a"}', "line 2: must be an object with the text of a `prompt`"),
        (b'{"prompt": 3}', "line 2: must be an object"),
        (b'["a"]', "line 2: must be an object"),
        (b"\xff", "cannot be read"),
    ],
)
def test_a_broken_line_is_named(line: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=said) as refused:
        read_prompts([tmp_path / "broken.jsonl"])
    assert refused.value.field == "prompts"


def test_a_fixed_share_of_the_prompts_is_held_out_whatever_their_order_and_kind() -> None:
    texts = [f"Question {i}?" for i in range(4000)]
    held_out = {text for text in texts if Prompt("a", text).held_out}
    assert len(held_out) / len(texts) == pytest.approx(HELD_OUT_SHARE, abs=0.015)
    assert held_out == {text for text in reversed(texts) if Prompt("b", text).held_out}


def test_prompts_become_chats_and_those_that_are_too_long_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [Prompt("a", "Hi"), Prompt("b", "Hi " * 50), Prompt("c", "Ho")]
    encoded = encode_prompts(tokenizer, prompts, longest=60)
    assert [kind for kind, _ in encoded] == ["a", "c"]
    assert tokenizer.decode(encoded[0][1]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_no_more_prompts_are_looked_at_than_are_wanted(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = [Prompt("a", "Hi"), Prompt("b", "Ho " * 50), Prompt("c", "Ho"), Prompt("d", "Hu")]
    assert [kind for kind, _ in encode_prompts(tokenizer, prompts, longest=60, most=2)] == ["a", "c"]
    assert encode_prompts(tokenizer, prompts, longest=60, most=9) == encode_prompts(tokenizer, prompts, longest=60)


def test_two_in_five_prompts_are_answered_greedily() -> None:
    assert Counter(map(temperature_of, range(100))) == {0.0: 40, 0.7: 30, 1.0: 30}

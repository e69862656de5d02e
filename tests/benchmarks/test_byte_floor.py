"""The floor of a step, against sums made by hand."""

from __future__ import annotations

from dspark.benchmarks.byte_floor import CARDS, Card, floor_steps, floor_table, step_bytes
from dspark.benchmarks.qwen3 import MODELS

QWEN3_8B = MODELS["Qwen3-8B"]
HEAD = 151_936 * 4096
"""Elements of its head, and of its embedding."""
KV_BYTES = 36 * 2 * 8 * 128 * 2
"""Of a position of its cache."""


def test_plain_decoding_reads_the_weights_but_the_embedding_table_once() -> None:
    step = step_bytes(QWEN3_8B, 1, 1024, drafts=False)
    assert step.weights == 2 * (8_190_735_360 - HEAD)
    assert step.draft == 0
    assert step.total == step.weights + step.kv


def test_a_tied_head_is_read() -> None:
    assert step_bytes(MODELS["Qwen3-4B"], 1, 1024, drafts=False).weights == 2 * 4_022_468_096


def test_every_position_of_every_sequence_is_read_once_a_layer() -> None:
    def kv(sequences: int, context: int) -> int:
        return step_bytes(QWEN3_8B, sequences, context, drafts=False).kv

    assert kv(1, 1024) - kv(1, 1000) == 24 * KV_BYTES
    assert kv(8, 1024) == 8 * kv(1, 1024)
    queries_and_results = 36 * 2 * 32 * 128 * 2
    assert kv(1, 1024) == 1025 * KV_BYTES + queries_and_results


def test_drafting_reads_the_drafter_and_the_head_again() -> None:
    step, alone = step_bytes(QWEN3_8B, 1, 1024, drafts=True), step_bytes(QWEN3_8B, 1, 1024, drafts=False)
    assert step.drafts == 7
    assert step.weights == alone.weights
    layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 12_288 * 4096
    context_kv = 5 * 2 * 1024 * 4096
    markov = 7 * 151_936 * (256 + 1)
    matrices = 5 * layer + 5 * 4096 * 4096 + context_kv + markov + HEAD
    vectors = 5 * (2 * 4096 + 2 * 128) + 2 * 4096 + (4096 + 256 + 1)  # norms, confidence head
    attention = 5 * 2 * 128 * (8 * (1024 + 7) + 32 * 7)
    assert step.draft == 2 * (matrices + vectors + attention)


def test_what_is_held_is_weights_and_whole_blocks() -> None:
    weights, drafter = 2 * 8_190_735_360, step_bytes(QWEN3_8B, 0, 0, drafts=True).held - 2 * 8_190_735_360
    assert step_bytes(QWEN3_8B, 1, 1024, drafts=False).held == weights + 1040 * KV_BYTES
    assert step_bytes(QWEN3_8B, 2, 1024, drafts=True).held == weights + drafter + 2 * 1040 * KV_BYTES * 41 // 36


def test_a_card_without_room_for_the_weights_says_so() -> None:
    text = floor_table(floor_steps()).splitlines()

    def cells(model: str, sequences: int, drafts: str) -> list[str]:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text[2:]]
        return next(row[-len(CARDS) :] for row in rows if row[:3] == [model, str(sequences), drafts])

    assert cells("Qwen3-14B", 1, "off")[0] == "no room"
    assert "no room" not in cells("Qwen3-14B", 1, "off")[2:]
    assert "no room" not in cells("Qwen3-8B", 1, "7")
    assert cells("Qwen3-8B", 128, "off")[:2] == ["no room", "no room"]


def test_the_floor_is_bytes_over_bandwidth() -> None:
    step = step_bytes(QWEN3_8B, 1, 1024, drafts=False)
    assert step.floor_ms(1000.0) == step.total / 1e9
    row = floor_table([step], [Card("slow", 100, 80)]).splitlines()[2]
    assert row.split("|")[-2].strip() == f"{step.total / 1e8:.2f}"

"""The bytes that a step cannot avoid, and what they take at the memory bandwidth of a card. Computed, not measured.

    weights     every weight of the target once, of the embedding table only a tied head
    K/V         what attention reads of the sequences' contexts, with its queries and results
    draft       the drafter's weights once, its Markov table once per slot, the target's head once more, and its context

A step decodes one token of each sequence, or verifies 7 drafts of each and drafts the next 7. What other kernels move is not
in it: a floor is for comparing, and theirs could be fused away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dspark.benchmarks.load import align
from dspark.benchmarks.qwen3 import MODELS, Model, elements
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.kernels.gpu import draft_attention, markov_step, paged_attention

ELEMENT = 2
"""Bytes of a bfloat16."""
CONTEXT_TOKENS = 1024
SEQUENCES = (1, 8, 32, 128)


@dataclass(frozen=True, slots=True)
class Card:
    """gb_per_s, gb: published memory bandwidth and size, 1e9 bytes."""

    name: str
    gb_per_s: float
    gb: float


CARDS = (
    Card("RTX 4090", 1008, 24),
    Card("RTX 5090", 1792, 32),
    Card("H100 SXM", 3350, 80),
    Card("H200", 4800, 141),
)


@dataclass(frozen=True, slots=True)
class StepBytes:
    """Bytes that a step moves, and `held`: bytes of weights and K/V that must be in the card's memory for it."""

    model: str
    sequences: int
    drafts: int
    weights: int
    kv: int
    draft: int
    held: int

    @property
    def total(self) -> int:
        return self.weights + self.kv + self.draft

    def floor_ms(self, gb_per_s: float) -> float:
        return self.total / gb_per_s / 1e6


def step_bytes(model: Model, sequences: int, context: int, drafts: bool, element: int = ELEMENT) -> StepBytes:
    """context: tokens of each sequence that are in the cache. drafts: 7 verified and 7 drafted of each, else none."""
    target, block = model.target, model.draft.block_size
    shapes = model.target_shapes
    read = {name: shape for name, shape in shapes.items() if name != "model.embed_tokens.weight"}
    if target.tie_word_embeddings:
        read = shapes
    rows = 1 + block * drafts
    kv = target.num_layers * attention_bytes(model, sequences, rows, context, element)
    held = elements(shapes) * element + sequences * _kv_held(model, context + rows, drafts) * element
    return StepBytes(
        model=model.name,
        sequences=sequences,
        drafts=block * drafts,
        weights=elements(read) * element,
        kv=kv,
        draft=_draft_bytes(model, sequences, context, element) if drafts else 0,
        held=held + (elements(model.draft_shapes) * element if drafts else 0),
    )


def attention_bytes(model: Model, sequences: int, rows: int, context: int, element: int) -> int:
    """Of one layer's attention: `rows` rows of each sequence behind `context` tokens."""
    target = model.target
    pieces = [(context, rows)] * sequences
    return paged_attention.bytes_moved(pieces, target.num_heads, target.num_kv_heads, target.head_dim, element)


def draft_attention_bytes(model: Model, sequences: int, context: int, element: int) -> int:
    """The same of a layer of the drafter."""
    draft = model.draft
    return draft_attention.bytes_moved(
        [context] * sequences, draft.block_size, draft.num_heads, draft.num_kv_heads, draft.head_dim, element
    )


def _draft_bytes(model: Model, sequences: int, context: int, element: int) -> int:
    draft = model.draft
    shapes = model.draft_shapes
    # of w1 rows are looked up; w2 is read in each slot, as `markov_step` says
    once = {name: shape for name, shape in shapes.items() if "markov_w" not in name}
    # keys and values of the context are made by a copy of these layers that lies together
    again = {name: shape for name, shape in shapes.items() if "k_proj" in name or "v_proj" in name}
    head = draft.vocab_size * draft.hidden_size
    attention = draft.num_layers * draft_attention_bytes(model, sequences, context, element)
    markov = markov_step.bytes_moved(sequences, draft.block_size, draft.vocab_size, draft.markov_rank, element)
    return (elements(once) + elements(again) + head) * element + attention + markov


def _kv_held(model: Model, tokens: int, drafts: bool) -> int:
    """Elements of the blocks of one sequence, in the target's cache and with `drafts` in the drafter's."""
    target, draft = model.target, model.draft
    per_token = 2 * target.num_layers * target.num_kv_heads * target.head_dim
    per_token += 2 * draft.num_layers * draft.num_kv_heads * draft.head_dim * drafts
    return blocks_for(tokens) * BLOCK_SIZE * per_token


def floor_steps(models: Sequence[str] = ("Qwen3-4B", "Qwen3-8B", "Qwen3-14B")) -> list[StepBytes]:
    return [
        step_bytes(MODELS[name], sequences, CONTEXT_TOKENS, drafts)
        for name in models
        for sequences in SEQUENCES
        for drafts in (False, True)
    ]


def floor_table(steps: Sequence[StepBytes], cards: Sequence[Card] = CARDS) -> str:
    """One row per step; in a card's column the least milliseconds, or that it has no room."""
    heads = ["model", "sequences", "drafts", "weights GB", "K/V GB", "draft GB", "held GB"]
    rows = [[*heads, *(f"{card.name} ms" for card in cards)]]
    for step in steps:
        sizes = (step.weights, step.kv, step.draft, step.held)
        rows.append(
            [
                step.model,
                str(step.sequences),
                str(step.drafts) if step.drafts else "off",
                *(f"{size / 1e9:.2f}" for size in sizes),
                *(_cell(step, card) for card in cards),
            ]
        )
    return align(rows)


def _cell(step: StepBytes, card: Card) -> str:
    return f"{step.floor_ms(card.gb_per_s):.2f}" if step.held <= card.gb * 1e9 else "no room"

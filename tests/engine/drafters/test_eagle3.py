"""The Eagle3 drafter equals its formulae, computed naively one index at a time, whenever its context is made."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_checkpoints import TARGET_CONFIG, eagle3_config, random_tensors, write_draft_checkpoint
from draft_sequences import KV_BLOCK_SIZE, DraftSequence, blocks_before, noise_at, noise_rows
from naive_eagle3 import NaiveDraft, NaiveEagle3
from numpy.typing import NDArray
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import drop_shared_with_target
from dspark.engine.drafters.drafter import Draft
from dspark.engine.drafters.eagle3 import Eagle3Drafter
from dspark.engine.drafters.eagle3_checkpoint import load_eagle3_weights, read_eagle3_spec
from dspark.engine.models.decoder import LinearFactory

NUM_BLOCKS = 40
MAX_MODEL_LEN = 128
VOCAB_SIZE = TARGET_CONFIG["vocab_size"]


@dataclass
class Bench:
    """A drafter loaded from a checkpoint on disk, beside the naive model of the same checkpoint."""

    config: dict[str, Any]
    drafter: Eagle3Drafter
    naive: NaiveEagle3
    generator: torch.Generator
    free_blocks: list[int]
    noise_calls: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)
    next_id: int = 0

    def sequence(self, length: int, **options: Any) -> DraftSequence:
        """`length` tokens, the anchor included; blocks are taken in shuffled order, just enough for what is computed."""
        blocks = [self.free_blocks.pop() for _ in range(blocks_before(length - 1))]
        tokens = torch.randint(VOCAB_SIZE, (length,), generator=self.generator).tolist()
        self.next_id += 1
        return DraftSequence(self.next_id, tokens, blocks, self.random_features(length - 1), **options)

    def random_features(self, rows: int) -> Tensor:
        width = len(self.config["target_layer_ids"]) * self.config["hidden_size"]
        return torch.randn(rows, width, generator=self.generator)

    def observe(self, *pieces: tuple[DraftSequence, int, int]) -> None:
        """One target pass over positions start..end-1 of some sequences."""
        self.drafter.observe(
            torch.cat([s.features[start:end] for s, start, end in pieces]),
            np.concatenate([np.arange(start, end, dtype=np.int32) for _, start, end in pieces]),
            np.concatenate([s.slots(start, end) for s, start, end in pieces]),
        )

    def prefill(self, *sequences: DraftSequence) -> None:
        self.observe(*[(s, 0, len(s.features)) for s in sequences])

    def verify(self, s: DraftSequence, accepted: list[int], rejected: int = 0) -> None:
        """A target pass over the anchor, `accepted[:-1]` and some rejected drafts; the last of `accepted` is its own."""
        start, end = s.position, s.position + len(accepted) + rejected
        while len(s.blocks) < blocks_before(end):
            s.blocks.append(self.free_blocks.pop())
        verified = self.random_features(len(accepted) + rejected)
        self.observe((replace(s, features=torch.cat((s.features, verified))), start, end))
        s.features = torch.cat((s.features, verified[: len(accepted)]))
        s.tokens += accepted

    def propose(self, *sequences: DraftSequence) -> Draft:
        return self.drafter.propose([s.row() for s in sequences])

    def expected(self, sequence: DraftSequence) -> NaiveDraft:
        s, count = sequence.position, self.drafter.block_size
        noise = torch.stack([noise_at(sequence.key, p, VOCAB_SIZE) for p in range(s + 1, s + 1 + count)])
        return self.naive.draft(sequence.tokens, sequence.features, sequence.temperature, noise, count)


def open_bench(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    own_embeddings: bool = False,
    block_size: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Bench:
    config = eagle3_config(**options)
    tensors = random_tensors(config, seed)
    write_draft_checkpoint(folder, config, tensors)
    spec = read_eagle3_spec(folder)
    embedding, head = tensors["embed_tokens.weight"].to(dtype), tensors["lm_head.weight"].to(dtype)
    if own_embeddings:
        embedding, head = torch.full_like(embedding, 7.0), torch.full_like(head, 7.0)
    noise_calls: list[tuple[list[int], list[int], list[int]]] = []

    def recorded_noise(keys: NDArray[np.uint64], positions: NDArray[np.int64], rounds: NDArray[np.int64]) -> Tensor:
        noise_calls.append((keys.tolist(), positions.tolist(), rounds.tolist()))
        return noise_rows(spec.vocab_size, keys, positions)

    drafter = Eagle3Drafter(
        spec,
        drop_shared_with_target(load_eagle3_weights(folder, spec, dtype), embedding, head),
        embedding,
        lambda hidden: hidden @ head.T,
        LinearFactory(),
        block_size=block_size or spec.ttt_length,
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        noise=recorded_noise,
    )
    drafter.allocate_context(NUM_BLOCKS, KV_BLOCK_SIZE)
    generator = torch.Generator().manual_seed(seed)
    free_blocks = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    return Bench(config, drafter, NaiveEagle3(config, tensors), generator, free_blocks, noise_calls)


def assert_equals_naive(bench: Bench, draft: Draft, *sequences: DraftSequence) -> None:
    assert draft.lengths.tolist() == [bench.drafter.block_size] * len(sequences)
    for i, sequence in enumerate(sequences):
        expected = bench.expected(sequence)
        assert draft.tokens[i].tolist() == expected.tokens
        np.testing.assert_allclose(draft.confidence[i], log_odds(sequence, expected), rtol=1e-3, atol=1e-3)


def log_odds(sequence: DraftSequence, expected: NaiveDraft) -> list[float]:
    """Of each drafted token under the softmax of the scores that it won with."""
    wanted = []
    for k, (token, z) in enumerate(zip(expected.tokens, expected.logits, strict=True)):
        if sequence.temperature > 0:
            z = z / sequence.temperature + noise_at(sequence.key, sequence.position + 1 + k, VOCAB_SIZE)
        p = torch.softmax(z.double(), dim=0)[token]
        wanted.append(float(torch.log(p / (1 - p))))
    return wanted


VARIANTS: dict[str, dict[str, Any]] = {
    "three captured layers": {},
    "one captured layer": {"target_layer_ids": (3,)},
    "five captured layers": {"target_layer_ids": (0, 1, 2, 3, 4)},
    "attention bias": {"attention_bias": True},
    "one token": {"ttt_length": 1},
    "a block longer than a KV block": {"ttt_length": 19},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_batch_with_chunked_prefill_and_shuffled_blocks_equals_the_formulae(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    bench = open_bench(tmp_path, **options)
    a, b, c = bench.sequence(38), bench.sequence(17), bench.sequence(2)
    bench.observe((a, 0, 11), (b, 0, 5))
    bench.observe((b, 5, 16), (a, 11, 37), (c, 0, 1))
    assert_equals_naive(bench, bench.propose(a, b, c), a, b, c)


def test_drafts_follow_the_noise_at_their_positions_and_carry_no_probabilities(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    hot, greedy = bench.sequence(20, temperature=1.2, key=3), bench.sequence(21)
    bench.prefill(hot, greedy)
    draft = bench.propose(greedy, hot)
    assert_equals_naive(bench, draft, greedy, hot)
    assert draft.probs is None
    assert bench.noise_calls == [([3], [20 + k], [19]) for k in range(5)]


def test_rounds_with_accepted_and_rejected_drafts_go_on_as_the_formulae_do(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    s, other = bench.sequence(15), bench.sequence(33)
    bench.prefill(s, other)
    for accepted, rejected in (([3, 4], 3), ([5], 0), ([6, 7, 8, 9], 1), ([1], 4), ([2, 3, 4, 5, 6, 7], 0)):
        draft = bench.propose(s, other)
        assert_equals_naive(bench, draft, s, other)
        bench.verify(s, accepted, rejected)
        bench.verify(other, [int(draft.tokens[1, 0]), 11], 2)
    assert_equals_naive(bench, bench.propose(s, other), s, other)


def test_features_of_rejected_drafts_do_not_enter(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    s = bench.sequence(14)
    bench.prefill(s)
    bench.verify(s, [9], rejected=4)  # reaches into the next block
    assert_equals_naive(bench, bench.propose(s), s)


def test_drafting_leaves_the_context_untouched(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    a, b = bench.sequence(33), bench.sequence(16)
    bench.prefill(a, b)
    first = bench.propose(a, b)
    np.testing.assert_array_equal(bench.propose(b, a).tokens, first.tokens[::-1])


def test_context_is_made_when_drafts_are_wanted_again(tmp_path: Path) -> None:
    """Zero-draft mode: many rounds are only observed."""
    bench = open_bench(tmp_path)
    s = bench.sequence(10)
    bench.prefill(s)
    bench.propose(s)
    for token in range(40):
        bench.verify(s, [token])
    assert_equals_naive(bench, bench.propose(s), s)


def test_sequences_that_share_prefix_blocks_draft_as_if_each_had_its_own(tmp_path: Path) -> None:
    """They go on differently right behind the shared blocks, whose last index depends on the next token."""
    bench = open_bench(tmp_path)
    first, second, third = bench.sequence(33), bench.sequence(33), bench.sequence(40)
    bench.prefill(first)
    for sharing in (second, third):
        sharing.tokens[:32], sharing.features[:32] = first.tokens[:32], first.features[:32]
        sharing.blocks[:2] = first.blocks[:2]
    bench.observe((third, 32, 39))
    assert len({s.tokens[32] for s in (first, second, third)}) == 3
    for _ in range(2):
        assert_equals_naive(bench, bench.propose(first, second, third), first, second, third)
        for s in (first, second, third):
            bench.verify(s, [s.id])


def test_a_prefix_that_was_computed_while_nobody_drafted_serves_a_later_sequence(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    first = bench.sequence(40)
    bench.prefill(first)
    later = bench.sequence(40)
    later.tokens[:32], later.features[:32], later.blocks[:2] = first.tokens[:32], first.features[:32], first.blocks[:2]
    bench.observe((later, 32, 39))
    assert_equals_naive(bench, bench.propose(later), later)


def test_a_preempted_sequence_that_comes_back_in_other_blocks_drafts_the_same(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    s = bench.sequence(40)
    bench.prefill(s)
    before = bench.propose(s)
    bench.drafter.forget(s.id)
    s.blocks = [s.blocks[0], *(bench.free_blocks.pop() for _ in s.blocks[1:])]
    bench.observe((s, 16, 39))
    np.testing.assert_array_equal(bench.propose(s).tokens, before.tokens)


def test_a_reused_block_keeps_nothing_of_its_former_sequence(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    old = bench.sequence(40)
    bench.prefill(old)
    bench.propose(old)
    bench.drafter.forget(old.id)
    new = bench.sequence(20)
    new.blocks = old.blocks[1::-1]
    bench.prefill(new)
    assert_equals_naive(bench, bench.propose(new), new)


def test_new_features_under_the_same_tokens_replace_the_old_context(tmp_path: Path) -> None:
    """What start-up measures with leaves K/V of arbitrary features behind."""
    bench = open_bench(tmp_path)
    s = bench.sequence(40)
    bench.prefill(s)
    bench.propose(s)
    bench.drafter.forget(s.id)
    s.features = bench.random_features(39)
    bench.prefill(s)
    assert_equals_naive(bench, bench.propose(s), s)


def test_a_long_context_is_made_over_several_calls_that_propose_nothing_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.engine.drafters.eagle3.CATCH_UP_TOKENS", 32)
    bench = open_bench(tmp_path)
    old, young = bench.sequence(60), bench.sequence(50)
    bench.prefill(old, young)
    lengths = [bench.propose(young, old).lengths.tolist() for _ in range(5)]
    assert lengths == [[0, 0], [0, 0], [0, 5], [5, 5], [5, 5]]
    assert_equals_naive(bench, bench.propose(young, old), young, old)


def test_the_longest_sequence_can_still_draft_a_whole_block(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    s = bench.sequence(MAX_MODEL_LEN)
    bench.prefill(s)
    assert_equals_naive(bench, bench.propose(s), s)


def test_a_shorter_block_is_the_beginning_of_the_longer_one(tmp_path: Path) -> None:
    bench = open_bench(tmp_path, block_size=2)
    s = bench.sequence(20)
    bench.prefill(s)
    assert bench.propose(s).tokens.tolist() == [bench.naive.draft(s.tokens, s.features).tokens[:2]]


def test_a_scaled_rope_of_the_target_is_applied_to_the_draft(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    bench = open_bench(tmp_path, rope_parameters=rope)
    s = bench.sequence(70)
    bench.prefill(s)
    assert_equals_naive(bench, bench.propose(s), s)


def test_embedding_and_head_of_the_drafter_win_where_they_differ_from_the_targets(tmp_path: Path) -> None:
    bench = open_bench(tmp_path, own_embeddings=True)
    s = bench.sequence(20)
    bench.prefill(s)
    assert_equals_naive(bench, bench.propose(s), s)


def test_bfloat16_stays_near_the_fp32_formulae(tmp_path: Path) -> None:
    bench = open_bench(tmp_path, dtype=torch.bfloat16)
    sequences = [bench.sequence(30) for _ in range(4)]
    for s in sequences:
        s.features = s.features.to(torch.bfloat16)
    bench.prefill(*sequences)
    draft = bench.propose(*sequences)
    for s in sequences:
        s.features = s.features.float()
    first = [bench.expected(s).tokens[0] for s in sequences]
    assert sum(a == b for a, b in zip(draft.tokens[:, 0].tolist(), first, strict=True)) >= 3


def test_nothing_is_proposed_for_an_empty_batch(tmp_path: Path) -> None:
    assert open_bench(tmp_path).propose().tokens.shape == (0, 5)


def test_memory_is_counted_as_it_is_allocated(tmp_path: Path) -> None:
    drafter = open_bench(tmp_path, dtype=torch.bfloat16).drafter
    per_position = 2 * 2 * 32 * 2 + 32 * 2  # K and V, heads, head dim, bytes; hidden, bytes
    assert drafter.bytes_per_block(KV_BLOCK_SIZE) == KV_BLOCK_SIZE * per_position

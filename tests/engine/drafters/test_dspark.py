"""The DSpark drafter equals its formulae, computed naively one position at a time, however its context was made."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_checkpoints import draft_config, random_tensors, write_draft_checkpoint
from draft_sequences import KV_BLOCK_SIZE, DraftSequence, noise_at, noise_rows
from naive_dspark import NaiveDraft, NaiveDSpark
from numpy.typing import NDArray
from scipy.stats import chisquare
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import drop_shared_with_target, load_draft_weights, read_draft_spec
from dspark.engine.drafters.drafter import Draft, Noise
from dspark.engine.drafters.dspark import DSparkDrafter
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import LinearFactory
from dspark.kernels.gumbel_noise import gumbel_noise

NUM_BLOCKS = 40
MAX_MODEL_LEN = 128

HEADS = {
    "vanilla": {"markov": "vanilla"},
    "gated": {"markov": "gated"},
    "rnn": {"markov": "rnn"},
    "no Markov head": {"markov": None},
    "DFlash": {"markov": None, "confidence": False},
    "no confidence head": {"markov": "vanilla", "confidence": False},
    "confidence without Markov": {"markov": "rnn", "confidence_with_markov": False},
    "attention bias": {"markov": "gated", "attention_bias": True},
}


@dataclass
class Bench:
    """A drafter loaded from a checkpoint on disk, beside the naive model of the same checkpoint."""

    config: dict[str, Any]
    drafter: DSparkDrafter
    naive: NaiveDSpark
    generator: torch.Generator
    free_blocks: list[int]
    noise_calls: list[tuple[list[int], list[int], list[int]]] = field(default_factory=list)
    made: int = 0

    def sequence(self, length: int, **options: Any) -> DraftSequence:
        """`length` tokens, the anchor included; blocks are taken in shuffled order, with room for the draft."""
        blocks = [self.free_blocks.pop() for _ in range(-(-(length + self.config["block_size"]) // KV_BLOCK_SIZE))]
        tokens = torch.randint(self.config["vocab_size"] - 1, (length,), generator=self.generator).tolist()
        self.made += 1
        return DraftSequence(self.made, tokens, blocks, self.random_features(length - 1), **options)

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

    def propose(self, *sequences: DraftSequence) -> Draft:
        return self.drafter.propose([s.row() for s in sequences])

    def expected(self, sequence: DraftSequence) -> NaiveDraft:
        s = len(sequence.tokens) - 1
        positions = range(s + 1, s + 1 + self.config["block_size"])
        noise = torch.stack([noise_at(sequence.key, p, self.config["vocab_size"]) for p in positions])
        return self.naive.draft(sequence.tokens, sequence.features, sequence.temperature, noise)


def open_bench(
    folder: Path,
    *,
    verification: str = "coupled",
    dtype: torch.dtype = torch.float32,
    own_embeddings: bool = False,
    noise: Noise | None = None,
    seed: int = 0,
    ids: list[int] | None = None,
    extras: dict[str, Any] | None = None,
    max_num_seqs: int = 4,
    **options: Any,
) -> Bench:
    config = draft_config(**options)
    tensors = random_tensors(config, seed)
    write_draft_checkpoint(folder, config, tensors)
    extras = {**(extras or {}), **({} if ids is None else {"draft_token_ids": ids})}
    if extras:
        (folder / "dspark.json").write_text(json.dumps(extras))
    spec = read_draft_spec(folder)
    embedding, head = tensors["embed_tokens.weight"].to(dtype), tensors["lm_head.weight"].to(dtype)
    if own_embeddings:
        embedding, head = torch.full_like(embedding, 7.0), torch.full_like(head, 7.0)
    noise_calls: list[tuple[list[int], list[int], list[int]]] = []

    def recorded_noise(keys: NDArray[np.uint64], positions: NDArray[np.int64], rounds: NDArray[np.int64]) -> Tensor:
        noise_calls.append((keys.tolist(), positions.tolist(), rounds.tolist()))
        return noise_rows(spec.vocab_size, keys, positions)

    drafter = DSparkDrafter(
        spec,
        drop_shared_with_target(load_draft_weights(folder, spec, dtype), embedding, head),
        embedding,
        lambda hidden: hidden @ (head if ids is None else head[ids]).T,
        LinearFactory(),
        max_num_seqs=max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        verification=verification,  # type: ignore[arg-type]
        noise=noise or recorded_noise,
    )
    drafter.allocate_context(NUM_BLOCKS, KV_BLOCK_SIZE)
    generator = torch.Generator().manual_seed(seed)
    free_blocks = torch.randperm(NUM_BLOCKS, generator=generator).tolist()
    return Bench(config, drafter, NaiveDSpark(config, tensors, ids), generator, free_blocks, noise_calls)


def assert_equals_naive(bench: Bench, draft: Draft, *sequences: DraftSequence) -> None:
    assert draft.lengths.tolist() == [bench.config["block_size"]] * len(sequences)
    for i, sequence in enumerate(sequences):
        expected = bench.expected(sequence)
        assert draft.tokens[i].tolist() == expected.tokens
        np.testing.assert_allclose(draft.confidence[i], expected.confidence, rtol=1e-4, atol=1e-4)
        if draft.probs is not None and sequence.temperature > 0:
            q = torch.softmax(expected.logits / sequence.temperature, dim=-1)
            torch.testing.assert_close(draft.probs[i], q, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS.keys())
def test_a_batch_with_chunked_prefill_and_shuffled_blocks_equals_the_formulae(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    bench = open_bench(tmp_path, **options)
    a, b, c = bench.sequence(38), bench.sequence(17), bench.sequence(2)
    bench.observe((a, 0, 11), (b, 0, 5))
    bench.observe((b, 5, 16), (a, 11, 37), (c, 0, 1))
    assert_equals_naive(bench, bench.propose(a, b, c), a, b, c)


@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn", None])
def test_logits_equal_the_formulae_and_drafts_are_drawn_from_the_returned_probabilities(
    tmp_path: Path, markov: str | None
) -> None:
    bench = open_bench(tmp_path, verification="rejection", markov=markov)
    hot, cold, greedy = (
        bench.sequence(20, temperature=1.5, key=1),
        bench.sequence(33, temperature=0.5, key=2),
        bench.sequence(9),
    )
    bench.prefill(hot, cold, greedy)
    draft = bench.propose(hot, cold, greedy)
    assert_equals_naive(bench, draft, hot, cold, greedy)
    assert draft.probs is not None
    assert draft.probs.dtype == torch.float32
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(draft.tokens[2]), bench.config["vocab_size"]).float()
    torch.testing.assert_close(draft.probs[2], one_hot, rtol=0, atol=0)


def test_sampled_drafts_are_drawn_at_the_scaled_temperature_and_greedy_ones_as_ever(tmp_path: Path) -> None:
    bench = open_bench(tmp_path, verification="rejection", extras={"sampling_scale": 0.8})
    sampled, greedy = bench.sequence(20, temperature=1.5, key=1), bench.sequence(33)
    bench.prefill(sampled, greedy)
    draft = bench.propose(sampled, greedy)
    sampled.temperature *= 0.8
    assert_equals_naive(bench, draft, sampled, greedy)


@pytest.mark.parametrize("own_embeddings", [False, True], ids=["the target's head", "a head of its own"])
@pytest.mark.parametrize("verification", ["coupled", "rejection"])
@pytest.mark.parametrize("markov", ["vanilla", "gated", "rnn", None])
def test_a_reduced_head_drafts_as_if_all_other_ids_were_impossible(
    tmp_path: Path, markov: str | None, verification: str, own_embeddings: bool
) -> None:
    bench = open_bench(
        tmp_path,
        ids=list(range(3, 90, 5)),
        markov=markov,
        verification=verification,
        own_embeddings=own_embeddings,
    )
    sampled, greedy = bench.sequence(20, temperature=1.3, key=1), bench.sequence(33)
    bench.prefill(sampled, greedy)
    draft = bench.propose(sampled, greedy)
    assert_equals_naive(bench, draft, sampled, greedy)
    assert (draft.probs is None) == (verification == "coupled")


def test_drafts_drawn_with_the_real_noise_are_distributed_as_the_returned_probabilities(tmp_path: Path) -> None:
    bench = open_bench(
        tmp_path,
        verification="rejection",
        max_num_seqs=100,
        noise=lambda keys, positions, rounds: torch.from_numpy(
            gumbel_noise(keys, positions, np.zeros_like(positions), 97)
        ),
    )
    s = bench.sequence(20, temperature=1.5)
    bench.prefill(s)
    counts = np.zeros(97)
    for first_key in range(0, 2000, 100):
        draft = bench.propose(*(replace(s, key=first_key + i) for i in range(100)))
        counts += np.bincount(draft.tokens[:, 0], minlength=97)
    assert draft.probs is not None
    expected = 2000 * draft.probs[0, 0].double().numpy()
    common = expected >= 5
    assert common.sum() > 5
    observed = np.append(counts[common], counts[~common].sum())
    assert chisquare(observed, np.append(expected[common], 2000 - expected[common].sum())).pvalue > 0.01


@pytest.mark.parametrize("verification", ["coupled", "rejection"])
def test_noise_is_asked_for_at_the_positions_of_the_drafts_and_for_sampled_sequences_only(
    tmp_path: Path, verification: str
) -> None:
    bench = open_bench(tmp_path, verification=verification)
    sampled, greedy = bench.sequence(12, temperature=1.0, key=7), bench.sequence(12)
    bench.prefill(sampled, greedy)
    bench.propose(greedy, sampled)
    assert bench.noise_calls == [([7] * 5, [12, 13, 14, 15, 16], [11] * 5)]


def test_coupled_drafts_follow_the_noise_and_carry_no_probabilities(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    hot, greedy = bench.sequence(20, temperature=1.2, key=3), bench.sequence(21)
    bench.prefill(hot, greedy)
    draft = bench.propose(greedy, hot)
    assert_equals_naive(bench, draft, greedy, hot)
    assert draft.probs is None
    hot.key = 4
    assert draft.tokens[1].tolist() != bench.expected(hot).tokens


def test_features_of_rejected_drafts_are_overwritten_by_the_next_pass(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    s = bench.sequence(15)
    bench.prefill(s)
    # a verify pass over the anchor and four drafts, of which one is accepted; rejected rows reach into the next block
    verified = bench.random_features(5)
    stale = DraftSequence(s.id, s.tokens, s.blocks, torch.cat([s.features, verified]))
    bench.observe((stale, 14, 19))
    s.tokens += [3, 4]
    s.features = torch.cat([s.features, verified[:2]])
    assert_equals_naive(bench, bench.propose(s), s)
    s.tokens += [5]
    s.features = torch.cat([s.features, bench.random_features(1)])
    bench.observe((s, 16, 17))
    assert_equals_naive(bench, bench.propose(s), s)


def test_a_block_drafted_without_verification_leaves_the_context_untouched(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    a, b = bench.sequence(33), bench.sequence(16)
    a.blocks, b.blocks = [NUM_BLOCKS - 1, 0, 2], [1, NUM_BLOCKS - 2]
    bench.prefill(a, b)
    first = bench.propose(a, b)
    assert_equals_naive(bench, first, a, b)
    np.testing.assert_array_equal(bench.propose(b, a).tokens, first.tokens[::-1])


def test_sequences_that_share_prefix_blocks_draft_as_if_each_had_its_own(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    first = bench.sequence(40)
    bench.prefill(first)
    second = bench.sequence(40)
    second.tokens[:32], second.features[:32], second.blocks[:2] = (
        first.tokens[:32],
        first.features[:32],
        first.blocks[:2],
    )
    bench.observe((second, 32, 39))
    assert_equals_naive(bench, bench.propose(first, second), first, second)


def test_a_reused_block_keeps_nothing_of_its_former_sequence(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    old = bench.sequence(40)
    bench.prefill(old)
    new = bench.sequence(20)
    new.blocks = old.blocks[::-1]
    bench.prefill(new)
    assert_equals_naive(bench, bench.propose(new), new)


def test_the_longest_sequence_can_still_draft_a_whole_block(tmp_path: Path) -> None:
    bench = open_bench(tmp_path)
    s = bench.sequence(MAX_MODEL_LEN)
    bench.prefill(s)
    assert_equals_naive(bench, bench.propose(s), s)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["yarn", "llama3"],
)
def test_a_scaled_rope_of_the_target_is_applied_to_the_draft(tmp_path: Path, rope: dict[str, Any]) -> None:
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
    s = bench.sequence(30)
    s.features = s.features.bfloat16()
    bench.prefill(s)
    s.features = s.features.float()
    np.testing.assert_allclose(bench.propose(s).confidence[0, 0], bench.expected(s).confidence[0], atol=0.15)


def test_a_drafter_without_confidence_head_is_indifferent(tmp_path: Path) -> None:
    bench = open_bench(tmp_path, markov=None, confidence=False)
    s = bench.sequence(5)
    bench.prefill(s)
    assert not bench.propose(s).confidence.any()


def test_an_empty_batch_gives_an_empty_draft(tmp_path: Path) -> None:
    draft = open_bench(tmp_path).propose()
    assert draft.tokens.shape == draft.confidence.shape == (0, 5)
    assert draft.lengths.shape == (0,)


def test_context_memory_is_keys_and_values_of_every_layer(tmp_path: Path) -> None:
    drafter = open_bench(tmp_path, num_layers=3, dtype=torch.bfloat16).drafter
    layers, keys_and_values, kv_heads, head_dim, element_bytes = 3, 2, 2, 32, 2
    assert drafter.bytes_per_block(16) == layers * keys_and_values * kv_heads * head_dim * 16 * element_bytes


def test_a_draft_block_longer_than_a_kv_block_is_refused(tmp_path: Path) -> None:
    drafter = open_bench(tmp_path, block_size=16).drafter
    with pytest.raises(ConfigError, match=r"KV block of 8 .* draft block of 16"):
        drafter.allocate_context(NUM_BLOCKS, 8)

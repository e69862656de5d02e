"""A small model as drafter proposes what the same model in transformers says, whenever its context is computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from draft_sequences import KV_BLOCK_SIZE, DraftSequence, blocks_before, noise_at, noise_rows
from scipy.stats import chisquare
from tiny_models import ARCHITECTURES, tiny_model, write_tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dspark.engine import EngineConfig
from dspark.engine.drafters.draft_model import DraftModelDrafter, open_draft_model
from dspark.engine.drafters.drafter import Draft
from dspark.engine.errors import ConfigError
from dspark.engine.models.decoder import Decoder, FlatBatch, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights
from dspark.kernels.gumbel_noise import gumbel_noise

NUM_BLOCKS = 40
MAX_MODEL_LEN = 128
GAMMA = 4
VOCAB_SIZE = 320


@dataclass
class Bench:
    drafter: DraftModelDrafter
    model: PreTrainedModel
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))
    free_blocks: list[int] = field(default_factory=list)
    next_id: int = 0

    def sequence(self, length: int, **options: Any) -> DraftSequence:
        blocks = [self.free_blocks.pop() for _ in range(blocks_before(length - 1))]
        tokens = torch.randint(VOCAB_SIZE, (length,), generator=self.generator).tolist()
        self.next_id += 1
        return DraftSequence(self.next_id, tokens, blocks, torch.empty(0, 0), **options)

    def go_on(self, s: DraftSequence, tokens: list[int]) -> None:
        """The target has verified: these tokens follow."""
        s.tokens += tokens
        while len(s.blocks) < blocks_before(s.position):
            s.blocks.append(self.free_blocks.pop())

    def propose(self, *sequences: DraftSequence) -> Draft:
        return self.drafter.propose([s.row() for s in sequences])

    def scores(self, s: DraftSequence, drafts: list[int], k: int) -> Tensor:
        """Logits [V] that draft k is drawn from, by transformers, without temperature and noise."""
        with torch.no_grad():
            return self.model(torch.tensor([[*s.tokens, *drafts[:k]]])).logits[0, -1].float()

    def expected(self, s: DraftSequence) -> tuple[list[int], list[float]]:
        """Drafts, and the log-odds of each under the softmax of the scores that it won with."""
        drafts: list[int] = []
        confidence = []
        for k in range(self.drafter.block_size):
            scores = self.scores(s, drafts, k)
            if s.temperature:
                scores = scores / s.temperature + noise_at(s.key, s.position + 1 + k, VOCAB_SIZE)
            drafts.append(int(scores.argmax()))
            p = scores.double().softmax(dim=0)[drafts[-1]]
            confidence.append(float(torch.log(p / (1 - p))))
        return drafts, confidence


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("draft") / "model")


def target_of(folder: Path) -> Decoder:
    spec = read_spec(folder)
    return Decoder(spec, load_weights(folder, spec, torch.float32), MAX_MODEL_LEN, LinearFactory())


def open_bench(folder: Path, architecture: str = "LlamaForCausalLM", **options: Any) -> Bench:
    fields = {"max_num_seqs": 4, "num_speculative_tokens": GAMMA, "speculation": "fixed"} | options
    noise = fields.pop("noise", lambda keys, positions, rounds: noise_rows(VOCAB_SIZE, keys, positions))
    drafter = open_draft_model(folder, EngineConfig(**fields), target_of(folder), MAX_MODEL_LEN, noise)
    drafter.allocate_context(NUM_BLOCKS, KV_BLOCK_SIZE)
    bench = Bench(drafter, tiny_model(architecture))
    bench.free_blocks = torch.randperm(NUM_BLOCKS, generator=bench.generator).tolist()
    return bench


def assert_equals_model(bench: Bench, draft: Draft, *sequences: DraftSequence) -> None:
    assert draft.lengths.tolist() == [bench.drafter.block_size] * len(sequences)
    for i, s in enumerate(sequences):
        tokens, confidence = bench.expected(s)
        assert draft.tokens[i].tolist() == tokens
        np.testing.assert_allclose(draft.confidence[i], confidence, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_in_shuffled_blocks_proposes_what_the_model_says(tmp_path: Path, architecture: str) -> None:
    bench = open_bench(write_tiny_model(tmp_path, architecture), architecture)
    a, b, c = bench.sequence(38), bench.sequence(17, temperature=0.8, key=5), bench.sequence(2)
    assert_equals_model(bench, bench.propose(a, b, c), a, b, c)


def test_rounds_with_accepted_and_rejected_drafts_go_on_as_the_model_does(folder: Path) -> None:
    bench = open_bench(folder)
    s, other = bench.sequence(15), bench.sequence(30, temperature=1.3, key=2)
    for accepted in (0, 4, 1, 3, 4, 2, 4, 4):
        draft = bench.propose(s, other)
        assert_equals_model(bench, draft, s, other)
        bench.go_on(s, [*draft.tokens[0, :accepted].tolist(), 7])
        bench.go_on(other, [*draft.tokens[1, : 4 - accepted].tolist(), 8])
    assert_equals_model(bench, bench.propose(s, other), s, other)


def test_the_kv_of_accepted_drafts_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = open_bench(folder)
    rows: list[int] = []
    forward = Decoder.forward

    def counted(decoder: Decoder, batch: FlatBatch) -> Any:
        rows.append(len(batch.token_ids))
        return forward(decoder, batch)

    monkeypatch.setattr(Decoder, "forward", counted)
    s = bench.sequence(21)  # its second block has room for the whole draft block
    draft = bench.propose(s)
    bench.go_on(s, [*draft.tokens[0].tolist(), 7])
    bench.propose(s)
    # the last draft was drawn but not read, so it is read with the new anchor
    assert rows == [21, 1, 1, 1, 2, 1, 1, 1]


def test_a_token_of_the_targets_own_that_was_drafted_too_changes_nothing(folder: Path) -> None:
    """The block was cut to one draft, and the token behind it came out as the second one."""
    bench = open_bench(folder)
    s = bench.sequence(20)
    draft = bench.propose(s)
    bench.go_on(s, draft.tokens[0, :2].tolist())
    assert_equals_model(bench, bench.propose(s), s)


def test_context_is_computed_when_drafts_are_wanted_again(folder: Path) -> None:
    bench = open_bench(folder)
    s = bench.sequence(10)
    bench.propose(s)
    bench.go_on(s, list(range(50)))
    assert_equals_model(bench, bench.propose(s), s)


def test_a_prefix_is_shared_by_sequences_that_go_on_differently(folder: Path) -> None:
    bench = open_bench(folder)
    first, second = bench.sequence(40), bench.sequence(33)
    second.tokens[:32], second.blocks[:2] = first.tokens[:32], first.blocks[:2]
    for _ in range(2):
        assert_equals_model(bench, bench.propose(first, second), first, second)
        bench.go_on(first, [1, 2])
        bench.go_on(second, [3])


def test_a_preempted_sequence_that_comes_back_in_other_blocks_drafts_the_same(folder: Path) -> None:
    bench = open_bench(folder)
    s = bench.sequence(40)
    before = bench.propose(s)
    bench.drafter.forget(s.id)
    s.blocks = [s.blocks[0], *(bench.free_blocks.pop() for _ in s.blocks[1:])]
    np.testing.assert_array_equal(bench.propose(s).tokens, before.tokens)


def test_a_reused_block_keeps_nothing_of_its_former_sequence(folder: Path) -> None:
    bench = open_bench(folder)
    old = bench.sequence(40)
    bench.propose(old)
    bench.drafter.forget(old.id)
    new = bench.sequence(20)
    new.blocks = old.blocks[1::-1]
    assert_equals_model(bench, bench.propose(new), new)


def test_a_long_context_is_computed_over_several_calls_that_propose_nothing_for_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dspark.engine.drafters.draft_model.CATCH_UP_TOKENS", 32)
    bench = open_bench(folder)
    old, young = bench.sequence(60), bench.sequence(50)
    lengths = []
    for _ in range(6):
        draft = bench.propose(young, old)
        lengths.append(draft.lengths.tolist())
    assert lengths == [[0, 0], [0, 0], [0, 4], [4, 4], [4, 4], [4, 4]]
    assert_equals_model(bench, draft, young, old)


def test_the_longest_sequence_can_still_draft_a_whole_block(folder: Path) -> None:
    bench = open_bench(folder)
    s = bench.sequence(MAX_MODEL_LEN)
    assert_equals_model(bench, bench.propose(s), s)


def test_in_rejection_mode_drafts_are_distributed_as_the_returned_probabilities(folder: Path) -> None:
    bench = open_bench(
        folder,
        verification="rejection",
        max_num_seqs=100,
        noise=lambda keys, positions, rounds: torch.from_numpy(gumbel_noise(keys, positions, rounds, VOCAB_SIZE)),
    )
    s = bench.sequence(20, temperature=1.5)
    copies = [replace(s, id=s.id + i) for i in range(100)]
    while 0 in bench.propose(*copies).lengths:  # their contexts are computed in turns
        pass
    counts = np.zeros(VOCAB_SIZE)
    for first_key in range(0, 2000, 100):
        draft = bench.propose(*(replace(copy, key=first_key + i) for i, copy in enumerate(copies)))
        assert draft.lengths.tolist() == [GAMMA] * 100
        counts += np.bincount(draft.tokens[:, 0], minlength=VOCAB_SIZE)
    assert draft.probs is not None
    torch.testing.assert_close(draft.probs[0, 0], (bench.scores(s, [], 0) / 1.5).softmax(dim=0), rtol=1e-3, atol=1e-6)
    expected = 2000 * draft.probs[0, 0].double().numpy()
    common = expected >= 5
    assert common.sum() > 5
    observed = np.append(counts[common], counts[~common].sum())
    assert chisquare(observed, np.append(expected[common], 2000 - expected[common].sum())).pvalue > 0.01


def test_in_rejection_mode_confidence_does_not_depend_on_the_token_drawn(folder: Path) -> None:
    bench = open_bench(folder, verification="rejection")
    sequences = [bench.sequence(20, temperature=2.0, key=key) for key in range(4)]
    for s in sequences:
        s.tokens = sequences[0].tokens
    draft = bench.propose(*sequences)
    assert len(set(draft.tokens[:, 0].tolist())) > 1
    assert len(set(draft.confidence[:, 0].tolist())) == 1


def test_a_greedy_draft_in_rejection_mode_is_certain(folder: Path) -> None:
    bench = open_bench(folder, verification="rejection")
    s = bench.sequence(20)
    draft = bench.propose(s)
    assert_equals_model(bench, draft, s)
    assert draft.probs is not None
    one_hot = torch.nn.functional.one_hot(torch.from_numpy(draft.tokens[0]), VOCAB_SIZE).float()
    torch.testing.assert_close(draft.probs[0], one_hot, rtol=0, atol=0)


def test_nothing_is_proposed_for_an_empty_batch(folder: Path) -> None:
    assert open_bench(folder).propose().tokens.shape == (0, GAMMA)


def refusal(folder: Path, target: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        open_draft_model(folder, EngineConfig(), target_of(target), MAX_MODEL_LEN, lambda k, p, r: torch.empty(0))
    return caught.value


def test_a_model_of_another_vocabulary_is_refused_with_both_sizes(folder: Path, tmp_path: Path) -> None:
    tiny_model("LlamaForCausalLM", vocab_size=300).save_pretrained(tmp_path)
    error = refusal(tmp_path, folder)
    assert error.field == "drafter"
    assert "300" in str(error)
    assert "320" in str(error)


def test_a_model_that_cannot_be_read_is_the_drafters_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    error = refusal(tmp_path, folder)
    assert error.field == "drafter"
    assert "safetensors" in str(error)

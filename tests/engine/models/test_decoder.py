"""The decoder computes what transformers computes, and the bits of a row do not depend on what shares its pass."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import ARCHITECTURES, write_tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dspark.engine.errors import ConfigError
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.models import decoder as module
from dspark.engine.models.decoder import Decoder, FlatBatch, LinearFactory
from dspark.engine.models.spec import read_spec
from dspark.engine.models.weights import load_weights

NUM_BLOCKS = 64
MAX_LEN = 256
LAYERS = 3
ALL_LAYERS = tuple(range(LAYERS))
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny random model of an architecture, written once."""
    written: dict[str, Path] = {}

    def folder(architecture: str, **overrides: Any) -> Path:
        name = f"{architecture}-{overrides}"
        if name not in written:
            target = tmp_path_factory.mktemp(architecture)
            written[name] = write_tiny_model(target, architecture, num_hidden_layers=LAYERS, **overrides)
        return written[name]

    return folder


def open_decoder(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec = read_spec(folder)
    decoder = Decoder(spec, load_weights(folder, spec, dtype), MAX_LEN, LinearFactory())
    decoder.allocate_kv(NUM_BLOCKS, BLOCK_SIZE)
    return decoder


@dataclass
class Sequence:
    """Tokens, and the cache blocks that hold them."""

    tokens: NDArray[np.int64]
    blocks: list[int] = field(default_factory=list)


def sequences(*lengths: int, seed: int = 0) -> list[Sequence]:
    """Random tokens in blocks that lie anywhere."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(NUM_BLOCKS).tolist()
    return [
        Sequence(rng.integers(0, 320, length), [order.pop() for _ in range(blocks_for(length))]) for length in lengths
    ]


def flat_batch(*pieces: tuple[Sequence, int, int]) -> FlatBatch:
    """Tokens begin … end-1 of each sequence."""
    tables = np.zeros((len(pieces), max(len(sequence.blocks) for sequence, _, _ in pieces)), np.int32)
    for row, (sequence, _, _) in enumerate(pieces):
        tables[row, : len(sequence.blocks)] = sequence.blocks
    positions = [np.arange(begin, end) for _, begin, end in pieces]
    blocks = [tables[row, at // BLOCK_SIZE].astype(np.int64) for row, at in enumerate(positions)]
    return FlatBatch(
        token_ids=np.concatenate([sequence.tokens[begin:end] for sequence, begin, end in pieces]),
        positions=np.concatenate(positions).astype(np.int32),
        slots=np.concatenate(blocks) * BLOCK_SIZE + np.concatenate(positions) % BLOCK_SIZE,
        block_tables=tables,
        row_starts=np.cumsum([0, *(len(at) for at in positions)], dtype=np.int32),
        first_positions=np.array([begin for _, begin, _ in pieces], np.int32),
    )


@dataclass(frozen=True)
class Rows:
    """Everything that a pass gives for its rows."""

    hidden: Tensor
    features: Tensor
    logits: Tensor

    def __getitem__(self, at: slice) -> Rows:
        return Rows(self.hidden[at], self.features[at], self.logits[at])

    def assert_same_bits(self, other: Rows) -> None:
        """Layer by layer first, so that a failure names the layer that began it."""
        mine, others = self.features.chunk(LAYERS + 1, dim=1), other.features.chunk(LAYERS + 1, dim=1)
        for layer, (a, b) in enumerate(zip(mine, others, strict=True), start=-1):
            assert torch.equal(a, b), f"the output of layer {layer} differs"
        assert torch.equal(self.hidden, other.hidden), "the final hidden states differ"
        assert torch.equal(self.logits, other.logits), "the logits differ"


def run(decoder: Decoder, *pieces: tuple[Sequence, int, int]) -> Rows:
    hidden, features = decoder.forward(flat_batch(*pieces), (-1, *ALL_LAYERS))
    assert features is not None
    return Rows(hidden, features, decoder.logits(hidden))


def transformers_rows(model: PreTrainedModel, tokens: NDArray[np.int64]) -> tuple[Tensor, list[Tensor]]:
    """Logits, the embedding and the output of each layer, all [tokens, …]."""
    outputs: list[Tensor] = []

    def keep(layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).reshape(len(tokens), -1))

    hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
    with torch.no_grad():
        result = model(torch.from_numpy(tokens)[None], output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return result.logits[0], [result.hidden_states[0][0], *outputs]


@pytest.mark.parametrize("chunk", [1, 7, 16, 33, 200])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_features_are_those_of_transformers(
    folder_of: Callable[..., Path], architecture: str, chunk: int
) -> None:
    folder = folder_of(architecture)
    decoder, model = open_decoder(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for sequence in sequences(1, 15, 16, 17, 70, 131):
        length = len(sequence.tokens)
        parts = [run(decoder, (sequence, at, min(at + chunk, length))) for at in range(0, length, chunk)]
        logits, layers = transformers_rows(model, sequence.tokens)
        torch.testing.assert_close(torch.cat([part.logits for part in parts]), logits, rtol=0, atol=1e-4)
        features = torch.cat([part.features for part in parts])
        torch.testing.assert_close(features, torch.cat(layers, dim=1), rtol=0, atol=1e-4)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("LlamaForCausalLM", {"tie_word_embeddings": True}),
        ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
        ("LlamaForCausalLM", {"num_key_value_heads": 4}),
        ("LlamaForCausalLM", {"num_key_value_heads": 1, "head_dim": 80}),
        ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
        ("Qwen3ForCausalLM", {"rope_parameters": YARN}),
    ],
    ids=["tied head", "biases everywhere", "MHA", "MQA, head_dim 80", "windows in some layers", "yarn"],
)
def test_variants_of_the_architectures_are_those_of_transformers(
    folder_of: Callable[..., Path], architecture: str, overrides: dict[str, Any]
) -> None:
    folder = folder_of(architecture, **overrides)
    decoder, model = open_decoder(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    (sequence,) = sequences(70)
    logits, layers = transformers_rows(model, sequence.tokens)
    rows = run(decoder, (sequence, 0, 70))
    torch.testing.assert_close(rows.logits, logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.features, torch.cat(layers, dim=1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_logits_are_nearer_to_those_of_fp32_than_transformers_are(
    folder_of: Callable[..., Path], architecture: str
) -> None:
    folder = folder_of(architecture)
    (sequence,) = sequences(70)
    ours = run(open_decoder(folder, torch.bfloat16), (sequence, 0, 70)).logits
    exact, theirs = (
        transformers_rows(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), sequence.tokens)[0]
        for dtype in DTYPES
    )
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).std() < (theirs.float() - exact).std()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_a_mixed_batch_have_the_bits_of_rows_computed_alone(
    folder_of: Callable[..., Path], architecture: str, dtype: torch.dtype
) -> None:
    """Chunks of prompts, single decode rows and verify rows share a pass; alone, each row is a pass of its own."""
    lengths = [40, 1, 65, 17, 30, 90, 16]
    alone = []
    decoder = open_decoder(folder_of(architecture), dtype)
    for sequence in sequences(*lengths, seed=1):
        alone.append([run(decoder, (sequence, at, at + 1)) for at in range(len(sequence.tokens))])

    batched = sequences(*lengths, seed=1)
    decoder.allocate_kv(NUM_BLOCKS, BLOCK_SIZE)
    prompt, short, verified, decoded, second_chunk, long, edge = batched
    run(decoder, (verified, 0, 59), (decoded, 0, 16), (second_chunk, 0, 11), (long, 0, 83), (edge, 0, 8))
    pieces = [
        (prompt, 0, 40),
        (short, 0, 1),
        (verified, 59, 65),
        (decoded, 16, 17),
        (second_chunk, 11, 30),
        (long, 83, 90),
        (edge, 8, 16),
    ]
    together = run(decoder, *pieces)
    at = 0
    for index, (_, begin, end) in enumerate(pieces):
        for position in range(begin, end):
            together[at : at + 1].assert_same_bits(alone[index][position])
            at += 1
    assert at == len(together.hidden)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_any_split_into_chunks_gives_the_same_bits(
    folder_of: Callable[..., Path], architecture: str, dtype: torch.dtype
) -> None:
    decoder = open_decoder(folder_of(architecture), dtype)
    (sequence,) = sequences(150)
    whole = run(decoder, (sequence, 0, 150))
    for seed in range(5):
        cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, 150), size=2 + 3 * seed, replace=False)).tolist()
        decoder.allocate_kv(NUM_BLOCKS, BLOCK_SIZE)
        for begin, end in zip([0, *cuts], [*cuts, 150], strict=True):
            run(decoder, (sequence, begin, end)).assert_same_bits(whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES)
def test_rejected_drafts_left_in_the_cache_change_no_bit(folder_of: Callable[..., Path], dtype: torch.dtype) -> None:
    decoder = open_decoder(folder_of("Qwen3ForCausalLM"), dtype)
    (sequence,) = sequences(40)
    expected = run(decoder, (sequence, 0, 40))
    drafts = Sequence((sequence.tokens + 1) % 320, sequence.blocks)
    decoder.allocate_kv(NUM_BLOCKS, BLOCK_SIZE)
    run(decoder, (sequence, 0, 30))
    run(decoder, (drafts, 30, 38))
    run(decoder, (sequence, 30, 33)).assert_same_bits(expected[30:33])
    run(decoder, (sequence, 33, 40)).assert_same_bits(expected[33:40])


def test_features_come_in_the_order_asked_for(folder_of: Callable[..., Path]) -> None:
    decoder = open_decoder(folder_of("LlamaForCausalLM"))
    (sequence,) = sequences(9)
    batch = flat_batch((sequence, 0, 9))
    _, every = decoder.forward(batch, (-1, 0, 1, 2))
    _, some = decoder.forward(batch, (2, -1, 0))
    assert every is not None
    assert some is not None
    embedding, first, _, third = every.chunk(4, dim=1)
    assert torch.equal(some, torch.cat((third, embedding, first), dim=1))


def test_without_feature_layers_there_are_no_features(folder_of: Callable[..., Path]) -> None:
    decoder = open_decoder(folder_of("LlamaForCausalLM"))
    (sequence,) = sequences(9)
    hidden, features = decoder.forward(flat_batch((sequence, 0, 9)))
    assert features is None
    assert hidden.shape == (9, 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_per_block_are_those_of_the_allocated_caches(folder_of: Callable[..., Path], dtype: torch.dtype) -> None:
    decoder = open_decoder(folder_of("Qwen3ForCausalLM"), dtype)
    values = 2 * LAYERS * 2 * 32 * BLOCK_SIZE  # K and V, layers, K/V heads, head_dim, positions
    assert decoder.bytes_per_block(BLOCK_SIZE) == values * dtype.itemsize


@pytest.mark.parametrize(
    ("field", "value", "overrides"),
    [("head_dim", 24, {"head_dim": 24}), ("hidden_size", 72, {"hidden_size": 72})],
)
def test_sizes_that_the_kernels_cannot_take_are_refused_by_name(
    folder_of: Callable[..., Path], field: str, value: int, overrides: dict[str, int]
) -> None:
    with pytest.raises(ConfigError, match=rf"{field} {value}.*multiples of 16"):
        open_decoder(folder_of("LlamaForCausalLM", **overrides))


def test_a_layer_without_a_row_invariant_plan_is_reported(
    folder_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = folder_of("LlamaForCausalLM")
    spec = read_spec(folder)
    weights = load_weights(folder, spec, torch.bfloat16)
    found = LinearFactory()
    Decoder(spec, weights, MAX_LEN, found)
    assert found.row_invariant

    monkeypatch.setattr(module, "find_row_plan", lambda weight, packing: None)
    with caplog.at_level(logging.WARNING, module.__name__):
        none_found = LinearFactory()
        Decoder(spec, weights, MAX_LEN, none_found)
    assert not none_found.row_invariant
    assert "no row-invariant way found" in caplog.text

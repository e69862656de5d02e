"""Sampled blocks train what the training-time test over every index would, and what is trained is what runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dspark.engine.drafters.drafter import DraftRow
from dspark.engine.drafters.eagle3 import Eagle3Drafter
from dspark.engine.drafters.eagle3_checkpoint import Eagle3Spec
from dspark.engine.models.decoder import LinearFactory
from dspark.engine.models.rope import rope_tables
from dspark.engine.models.spec import RopeSpec
from dspark.training.draft_network import Rope
from dspark.training.eagle3_network import Eagle3Network
from dspark.training.warm_start import random_start

SPEC = Eagle3Spec(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-6,
    rope=RopeSpec("default", 10000.0),
    attention_bias=False,
    ttt_length=4,
    target_layer_ids=(0, 2, 4),
    num_target_layers=6,
)
LENGTH = 18
EMBEDDING = torch.randn(SPEC.vocab_size, SPEC.hidden_size, generator=torch.Generator().manual_seed(9))
SHAPES = {
    "fc.weight": (32, 96),
    "norm.weight": (32,),
    "layers.0.hidden_norm.weight": (32,),
    "layers.0.input_layernorm.weight": (32,),
    "layers.0.post_attention_layernorm.weight": (32,),
    "layers.0.self_attn.q_proj.weight": (128, 64),
    "layers.0.self_attn.k_proj.weight": (64, 64),
    "layers.0.self_attn.v_proj.weight": (64, 64),
    "layers.0.self_attn.o_proj.weight": (32, 128),
    "layers.0.self_attn.q_norm.weight": (32,),
    "layers.0.self_attn.k_norm.weight": (32,),
    "layers.0.mlp.gate_proj.weight": (48, 32),
    "layers.0.mlp.up_proj.weight": (48, 32),
    "layers.0.mlp.down_proj.weight": (32, 48),
}
"""DeepSpec's names, embedding and head apart."""


def no_noise(keys: NDArray[np.uint64], positions: NDArray[np.int64], anchors: NDArray[np.int64]) -> Tensor:
    raise AssertionError("greedy drafting draws no noise")


def random_network(seed: int = 0) -> Eagle3Network:
    """Scaled so that every part moves the output: norms near 1, the rest by fan-in."""
    generator = torch.Generator().manual_seed(seed)
    network = Eagle3Network(SPEC, EMBEDDING, LENGTH)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * values if "norm" in name else 1.5 * values / parameter.shape[-1] ** 0.5)
    return network


def random_batch(seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, LENGTH, len(SPEC.target_layer_ids) * SPEC.hidden_size, generator=generator)
    return features, torch.randint(SPEC.vocab_size, (2, LENGTH + SPEC.ttt_length + 1), generator=generator)


def training_time_test(network: Eagle3Network, features: Tensor, tokens: Tensor) -> Tensor:
    """Every step at every index, by its definition: one mask over the keys of all steps → normed outputs [S, T, steps, d]."""
    weights = dict(network.named_parameters())
    length = features.shape[1]
    cos, sin = rope_tables(SPEC.rope, SPEC.head_dim, length + SPEC.ttt_length)
    group = SPEC.num_heads // SPEC.num_kv_heads

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + SPEC.rms_norm_eps) * weights[name]

    def heads(y: Tensor, letter: str) -> Tensor:
        return (y @ weights[f"layers.0.self_attn.{letter}_proj.weight"].T).unflatten(-1, (-1, SPEC.head_dim))

    state = features @ weights["fc.weight"].T
    all_keys, all_values, outputs = [], [], []
    mask = torch.ones(length, length).tril().bool()
    for step in range(SPEC.ttt_length):
        embedded = EMBEDDING[tokens[:, 1 + step : 1 + step + length]]
        y = torch.cat(
            (norm(embedded, "layers.0.input_layernorm.weight"), norm(state, "layers.0.hidden_norm.weight")), dim=-1
        )
        rope = Rope(cos, sin, length, (torch.arange(length) + step).expand(len(features), -1))
        q = rope.at_blocks(norm(heads(y, "q"), "layers.0.self_attn.q_norm.weight"))
        all_keys.append(rope.at_blocks(norm(heads(y, "k"), "layers.0.self_attn.k_norm.weight")))
        all_values.append(heads(y, "v"))
        keys = torch.cat(all_keys, dim=1).repeat_interleave(group, dim=2)
        values = torch.cat(all_values, dim=1).repeat_interleave(group, dim=2)
        seen = torch.cat([mask, *[torch.eye(length).bool()] * step], dim=1)
        scores = torch.einsum("sqhe,skhe->shqk", q, keys) / math.sqrt(SPEC.head_dim)
        attention = scores.masked_fill(~seen, -math.inf).softmax(-1)
        mixed = torch.einsum("shqk,skhe->sqhe", attention, values).flatten(2)
        state = state + mixed @ weights["layers.0.self_attn.o_proj.weight"].T
        normed = norm(state, "layers.0.post_attention_layernorm.weight")
        gate, up = (normed @ weights[f"layers.0.mlp.{one}_proj.weight"].T for one in ("gate", "up"))
        state = state + (F.silu(gate) * up) @ weights["layers.0.mlp.down_proj.weight"].T
        outputs.append(norm(state, "norm.weight"))
    return torch.stack(outputs, dim=2)


def test_the_state_dict_has_deepspecs_names_and_shapes() -> None:
    state = random_network().state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == SHAPES


def test_a_block_of_anchor_i_is_index_i_minus_1_of_the_training_time_test() -> None:
    network, (features, tokens) = random_network(), random_batch()
    anchors = torch.tensor([[1, 5, 5, 17], [2, 9, 16, 3]])
    with torch.no_grad():
        blocks = network.backbone(features, tokens, anchors)
        everywhere = training_time_test(network, features, tokens)
    for sequence in range(2):
        for block, anchor in enumerate(anchors[sequence].tolist()):
            wanted = everywhere[sequence, anchor - 1]
            torch.testing.assert_close(blocks[sequence, block], wanted, atol=1e-4, rtol=1e-4)


def test_with_every_index_sampled_the_gradients_are_those_of_the_whole_training_time_test() -> None:
    network, (features, tokens) = random_network(), random_batch()
    anchors = torch.arange(1, LENGTH + 1).expand(2, -1)
    direction = torch.randn(2, LENGTH, SPEC.ttt_length, SPEC.hidden_size, generator=torch.Generator().manual_seed(2))
    parameters = list(network.parameters())
    by_blocks = torch.autograd.grad((network.backbone(features, tokens, anchors) * direction).sum(), parameters)
    by_definition = torch.autograd.grad((training_time_test(network, features, tokens) * direction).sum(), parameters)
    for found, wanted in zip(by_blocks, by_definition, strict=True):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)


def test_the_loss_of_the_last_step_reaches_the_features_through_every_step_before_it() -> None:
    network, (features, tokens) = random_network(), random_batch()
    anchors = torch.tensor([[1], [1]])  # index 0 sees its own keys only: its features act through step 0's output too
    features.requires_grad_(True)
    network.backbone(features, tokens, anchors)[:, :, -1].sum().backward()
    assert features.grad is not None
    assert features.grad[:, 0].abs().max() > 1e-4
    assert features.grad[:, 1:].abs().max() == 0


def test_a_block_sees_no_token_that_it_is_to_predict() -> None:
    network, (features, tokens) = random_network(), random_batch()
    anchors = torch.tensor([[6], [9]])
    with torch.no_grad():
        before = network.backbone(features, tokens, anchors)
        for slot in range(SPEC.ttt_length):
            changed, unseen = tokens.clone(), features.clone()
            for sequence, anchor in enumerate(anchors[:, 0].tolist()):
                changed[sequence, anchor + 1 + slot :] = 0
                unseen[sequence, anchor:] = 0.0
            after = network.backbone(unseen, changed, anchors)
            assert torch.equal(after[:, :, : slot + 1], before[:, :, : slot + 1])
            if slot + 1 < SPEC.ttt_length:
                assert not torch.equal(after[:, :, slot + 1], before[:, :, slot + 1])


def test_a_reduced_head_gives_the_logits_of_its_ids() -> None:
    network, (features, tokens) = random_network(), random_batch()
    head = torch.randn(SPEC.vocab_size, SPEC.hidden_size, generator=torch.Generator().manual_seed(3))
    ids = torch.tensor([3, 20, 21, 90])
    anchors = torch.tensor([[4], [7]])
    with torch.no_grad():
        hidden = network.backbone(features, tokens, anchors)
        whole = network.logits(hidden, tokens[:, :0], head)
        torch.testing.assert_close(network.logits(hidden, tokens[:, :0], head[ids], ids), whole[..., ids])


def test_it_learns_a_text_that_repeats_itself() -> None:
    torch.manual_seed(0)
    network = Eagle3Network(SPEC, EMBEDDING, LENGTH)
    random_start(network)
    head = torch.randn(SPEC.vocab_size, SPEC.hidden_size)
    tokens = (torch.arange(LENGTH + SPEC.ttt_length + 1) * 5 % 11).expand(2, -1)
    features = torch.randn(2, LENGTH, len(SPEC.target_layer_ids) * SPEC.hidden_size)
    anchors = torch.arange(1, LENGTH - SPEC.ttt_length).expand(2, -1)
    labels = tokens[0][anchors[..., None] + 1 + torch.arange(SPEC.ttt_length)]
    optimiser = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.0)
    losses = []
    for _ in range(120):
        logits = network.logits(network.backbone(features, tokens, anchors), tokens, head)
        loss = F.cross_entropy(logits.flatten(0, 2), labels.flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2
    assert losses[0] > 3
    assert (logits.argmax(-1) == labels).float().mean((0, 1)).min() > 0.95


def test_the_runtimes_logits_of_a_block_are_the_trainers_on_the_tokens_that_it_drew() -> None:
    network, (features, tokens) = random_network(), random_batch()
    head = torch.randn(SPEC.vocab_size, SPEC.hidden_size, generator=torch.Generator().manual_seed(3))
    logits: list[Tensor] = []

    def recorded_head(hidden: Tensor) -> Tensor:
        logits.append(F.linear(hidden, head))
        return logits[-1].clone()  # drawing may overwrite it

    drafter = Eagle3Drafter(
        SPEC,
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
        EMBEDDING,
        recorded_head,
        LinearFactory(),
        block_size=SPEC.ttt_length,
        max_num_seqs=2,
        max_model_len=64,
        noise=no_noise,
    )
    drafter.allocate_context(4, 16)
    anchors = [17, 9]
    tables = np.array([[2, 0], [3, 1]], np.int32)
    rows = []
    for sequence, anchor in enumerate(anchors):
        positions = np.arange(anchor, dtype=np.int32)
        drafter.observe(features[sequence, :anchor], positions, tables[sequence, positions // 16] * 16 + positions % 16)
        known = tokens[sequence, : anchor + 1].numpy()
        rows.append(DraftRow(sequence, known, anchor, 0.0, 0, tables[sequence]))
    with torch.no_grad():
        drawn = torch.from_numpy(drafter.propose(rows).tokens)
        for sequence, anchor in enumerate(anchors):
            tokens[sequence, anchor + 1 : anchor + 1 + SPEC.ttt_length] = drawn[sequence]
        hidden = network.backbone(features, tokens, torch.tensor(anchors)[:, None])
        teacher_forced = network.logits(hidden, tokens, head)[:, 0]
    torch.testing.assert_close(teacher_forced, torch.stack(logits, dim=1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("extra", [0, 5])
def test_padding_behind_a_sequence_changes_nothing(extra: int) -> None:
    network, (features, tokens) = random_network(), random_batch()
    anchors = torch.tensor([[3, 8], [5, 6]])
    with torch.no_grad():
        wanted = network.backbone(features, tokens, anchors)
        padded = F.pad(features[:, :12], (0, 0, 0, extra))
        found = network.backbone(padded, tokens, anchors)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)

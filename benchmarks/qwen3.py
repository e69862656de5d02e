"""Qwen3 targets and their DSpark drafters at published sizes, with random weights: all of a model but what it knows.

Sizes: the config.json of Qwen3-4B, 8B and 14B and of DeepSpec's drafters for them, 5 layers and blocks of 7. `tiny` is none of
theirs: it lets everything here run on a CPU in seconds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.drafters.draft_checkpoint import EMBEDDING, HEAD, DraftSpec, tensor_shapes
from dspark.engine.models.spec import ModelSpec, RopeSpec
from dspark.engine.models.weights import weight_shapes

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Model:
    """A target and its drafter, which shares the target's embedding and head."""

    name: str
    target: ModelSpec
    draft: DraftSpec

    @property
    def target_shapes(self) -> dict[str, tuple[int, ...]]:
        return weight_shapes(self.target)

    @property
    def draft_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the drafter's own tensors."""
        shapes = tensor_shapes(self.draft)
        return {name: shape for name, shape in shapes.items() if name not in (EMBEDDING, HEAD)}


class RandomWeights(Mapping[str, Tensor]):
    """Tensors that are drawn when they are asked for, each from a seed that its name gives: the same every time.

    Nothing is kept, so a model that fuses its layers never has them in memory twice. Norms are 1, the confidence head is 0
    (it could know nothing of a random target), all else is normal with a deviation of 1/√columns.
    """

    def __init__(self, shapes: Shapes, dtype: torch.dtype, device: torch.device) -> None:
        self._shapes = shapes
        self._dtype = dtype
        self._device = device

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=self._dtype, device=self._device)
        if name.startswith("confidence_head") or len(shape) == 1:
            return torch.zeros(shape, dtype=self._dtype, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(shape, generator=generator, dtype=self._dtype, device=self._device)
        return drawn.mul_(shape[-1] ** -0.5)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def _qwen3(
    name: str,
    *,
    hidden: int,
    inner: int,
    layers: int,
    heads: int,
    tied: bool,
    features: tuple[int, ...],
    kv_heads: int = 8,
    head_dim: int = 128,
    vocab: int = 151_936,
    mask: int = 151_669,
    max_position: int = 40_960,
    draft_layers: int = 5,
    markov_rank: int = 256,
) -> Model:
    target = ModelSpec(
        architecture="Qwen3ForCausalLM",
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        max_position=max_position,
        rope=RopeSpec("default", 1e6),
        tie_word_embeddings=tied,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=True,
        windows=(0,) * layers,
        eos_token_ids=(),
    )
    draft = DraftSpec(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=draft_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope=target.rope,
        attention_bias=False,
        block_size=7,
        mask_token_id=mask,
        target_layer_ids=features,
        num_target_layers=layers,
        markov="vanilla",
        markov_rank=markov_rank,
        confidence_head=True,
        confidence_with_markov=True,
    )
    return Model(name, target, draft)


MODELS = {
    model.name: model
    for model in (
        _qwen3(
            "Qwen3-4B",
            hidden=2560,
            inner=9728,
            layers=36,
            heads=32,
            tied=True,
            features=(1, 9, 17, 25, 33),
        ),
        _qwen3(
            "Qwen3-8B",
            hidden=4096,
            inner=12_288,
            layers=36,
            heads=32,
            tied=False,
            features=(1, 9, 17, 25, 33),
        ),
        _qwen3(
            "Qwen3-14B",
            hidden=5120,
            inner=17_408,
            layers=40,
            heads=40,
            tied=False,
            features=(1, 10, 19, 28, 37),
        ),
        _qwen3(
            "tiny",
            hidden=64,
            inner=128,
            layers=3,
            heads=4,
            tied=False,
            features=(0, 1),
            kv_heads=2,
            head_dim=32,
            vocab=320,
            mask=319,
            max_position=512,
            draft_layers=1,
            markov_rank=16,
        ),
    )
}
"""By name."""

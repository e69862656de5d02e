"""The target: a decoder of the Llama family over a flat batch and a paged K/V cache.

Llama, Mistral, Qwen2 and Qwen3 differ in data only (biases, QK-norm, windows, rotary scaling): there is one code path.
q/k/v and gate/up are fused, so a layer is four linear calls and four kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dspark.engine.errors import ConfigError
from dspark.engine.models.rope import rope_tables
from dspark.engine.models.spec import ModelSpec
from dspark.engine.models.weights import weight_shapes
from dspark.kernels.dispatch import choose_kernels
from dspark.kernels.packed_linear import PackedLinear, RowPlan, find_row_plan, packing_works
from dspark.kernels.panel_linear import PanelLinear

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """Rows of all sequences, one after another; the layouts of kernels/paged_attention.py.

    token_ids: [rows] int64; positions: [rows] int32; slots: [rows] int64, where each row's K/V goes.
    block_tables: [sequences, max_blocks] int32; row_starts: [sequences + 1] int32; first_positions: [sequences] int32.
    """

    token_ids: NDArray[np.int64]
    positions: NDArray[np.int32]
    slots: NDArray[np.int64]
    block_tables: NDArray[np.int32]
    row_starts: NDArray[np.int32]
    first_positions: NDArray[np.int32]

    def to(self, device: torch.device) -> DeviceBatch:
        names = DeviceBatch.__dataclass_fields__
        return DeviceBatch(*(torch.from_numpy(getattr(self, name)).to(device) for name in names))


@dataclass(frozen=True, slots=True)
class DeviceBatch:
    """The same on a device; rows behind the last of `row_starts` are padding, whose K/V go where nobody reads them.

    token_ids: [rows] int64; positions: [rows] int32; slots: [rows] int64; block_tables: [sequences, max_blocks] int32;
    row_starts: [sequences + 1] int32; first_positions: [sequences] int32.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    row_starts: Tensor
    first_positions: Tensor


class PlainLinear:
    """A linear layer on a device, computed by the vendor's library (cuBLAS).

    Which of its kernels does depends on the number of rows, so a row's result may depend on it too.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self._bias = bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self._bias)


Linear = PackedLinear | PanelLinear | PlainLinear


class LinearFactory:
    """Makes linear layers: on a CPU row-invariant ones; in bfloat16 it finds the row plan once per weight shape."""

    def __init__(self) -> None:
        self._packing: bool | None = None
        self._plans: dict[tuple[torch.Size, bool], RowPlan | None] = {}

    def __call__(self, weight: Tensor, bias: Tensor | None = None) -> Linear:
        if weight.device.type != "cpu":
            return PlainLinear(weight, bias)
        if weight.dtype == torch.float32:
            return PanelLinear(weight, bias)
        if self._packing is None:
            self._packing = packing_works()
            if not self._packing:
                log.warning("no packed bfloat16 linear operators here: linear layers run slower, through F.linear")
        key = (weight.shape, bias is None)
        if key not in self._plans:
            self._plans[key] = find_row_plan(weight, self._packing)
            if self._plans[key] is None:
                log.warning("no row-invariant way found to compute a %s linear layer of %s", weight.dtype, weight.shape)
        return PackedLinear(weight, bias, self._plans[key])

    def fused(self, weights: Mapping[str, Tensor], *names: str) -> Linear:
        """One layer whose output is the outputs of the named ones (without `.weight`), one after another."""
        weight = torch.cat([weights[f"{name}.weight"] for name in names])
        biases = [weights[f"{name}.bias"] for name in names if f"{name}.bias" in weights]
        return self(weight, torch.cat(biases) if biases else None)

    @property
    def row_invariant(self) -> bool:
        """Every packed layer made so far has a row-invariant plan."""
        return all(plan is not None for plan in self._plans.values())


@dataclass(frozen=True, slots=True)
class _Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    output: Linear
    mlp_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int

    @property
    def matrices(self) -> tuple[Linear, ...]:
        return self.qkv, self.output, self.gate_up, self.down


class Decoder:
    """`forward` writes K/V and returns hidden states; `logits` applies the vocabulary head to the rows that need it."""

    def __init__(self, spec: ModelSpec, weights: Mapping[str, Tensor], max_len: int, linear: LinearFactory) -> None:
        """`weights`: as read by `load_weights`, all of one dtype; `max_len`: positions the rotary tables cover."""
        if spec.hidden_size % 16 or spec.head_dim % 16:
            sizes = f"hidden_size {spec.hidden_size}, head_dim {spec.head_dim}"
            raise ConfigError("model", f"{sizes}: both must be multiples of 16 for the CPU kernels")
        self.spec = spec
        self.embedding = weights["model.embed_tokens.weight"]
        self.kernels = choose_kernels(self.embedding.device)
        self.dtype = self.embedding.dtype
        head = self.embedding if spec.tie_word_embeddings else weights["lm_head.weight"]
        self.head_weight = head
        self._head = linear(head)
        self._norm = weights["model.norm.weight"]
        self._cos, self._sin = (
            table.to(self.embedding.device) for table in rope_tables(spec.rope, spec.head_dim, max_len)
        )
        self._layers = [_make_layer(spec, weights, i, linear) for i in range(spec.num_layers)]
        matrices = [self._head, *(one for layer in self._layers for one in layer.matrices)]
        vectors = sum(shape[0] for shape in weight_shapes(spec).values() if len(shape) == 1)
        self.weight_bytes = sum(matrix.weight_bytes for matrix in matrices) + vectors * self.dtype.itemsize
        """What a decode step reads: every weight once, of the embedding table only a tied head."""
        self._k_caches: list[Tensor] = []
        self._v_caches: list[Tensor] = []

    def bytes_per_block(self, block_size: int) -> int:
        spec = self.spec
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * block_size * self.dtype.itemsize

    def allocate_kv(self, num_blocks: int, block_size: int) -> None:
        """Zeroed, because a masked position still takes part as 0 · value."""
        k_shape = (num_blocks, self.spec.num_kv_heads, self.spec.head_dim, block_size)
        v_shape = (num_blocks, self.spec.num_kv_heads, block_size, self.spec.head_dim)
        device = self.embedding.device
        self._k_caches = [_zeros(k_shape, self.dtype, device) for _ in range(self.spec.num_layers)]
        self._v_caches = [_zeros(v_shape, self.dtype, device) for _ in range(self.spec.num_layers)]

    def clear_blocks(self, blocks: Sequence[int]) -> None:
        """Zero the K/V of these blocks, whatever was in them."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.embedding.device)
        for cache in (*self._k_caches, *self._v_caches):
            cache[index] = 0

    def forward(
        self, batch: FlatBatch | DeviceBatch, feature_layers: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """→ final-normed hidden states [rows, hidden], and the outputs of `feature_layers` [rows, layers · hidden]

        side by side (the residual stream after each layer, before any final norm), or None without any.
        """
        spec, eps, kernels = self.spec, self.spec.rms_norm_eps, self.kernels
        scale = spec.head_dim**-0.5
        token_ids = torch.as_tensor(batch.token_ids)
        residual = self.embedding[token_ids].float()
        normed = kernels.rms_norm(residual, self._layers[0].input_norm, eps)
        features: dict[int, Tensor] = {}
        for index, layer in enumerate(self._layers):
            k_cache, v_cache = self._k_caches[index], self._v_caches[index]
            q = kernels.rope_kv_write(
                layer.qkv(normed),
                batch.positions,
                batch.slots,
                self._cos,
                self._sin,
                k_cache,
                v_cache,
                layer.q_norm,
                layer.k_norm,
                eps,
            )
            tables, starts, firsts = batch.block_tables, batch.row_starts, batch.first_positions
            attended = kernels.paged_attention(q, k_cache, v_cache, tables, starts, firsts, scale, layer.window)
            attended = layer.output(attended.view(len(token_ids), -1))
            normed = kernels.add_rms_norm(attended, residual, layer.mlp_norm, eps)
            hidden = layer.down(kernels.silu_mul(layer.gate_up(normed)))
            last = index + 1 == len(self._layers)
            next_norm = self._norm if last else self._layers[index + 1].input_norm
            normed = kernels.add_rms_norm(hidden, residual, next_norm, eps)
            if index in feature_layers:
                features[index] = residual.to(self.dtype, copy=True)
        wanted = [self.embedding[token_ids] if i < 0 else features[i] for i in feature_layers]
        return normed, torch.cat(wanted, dim=1) if wanted else None

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab], in the model's dtype."""
        return self._head(hidden)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU the pages are backed by memory when first written: numpy asks for them unfilled, torch fills them."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(shape, np.int16 if dtype.itemsize == 2 else np.int32)).view(dtype)


def _make_layer(spec: ModelSpec, weights: Mapping[str, Tensor], index: int, linear: LinearFactory) -> _Layer:
    prefix = f"model.layers.{index}."
    attention, mlp = f"{prefix}self_attn", f"{prefix}mlp"
    return _Layer(
        input_norm=weights[f"{prefix}input_layernorm.weight"],
        qkv=linear.fused(weights, f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        q_norm=weights.get(f"{attention}.q_norm.weight"),
        k_norm=weights.get(f"{attention}.k_norm.weight"),
        output=linear.fused(weights, f"{attention}.o_proj"),
        mlp_norm=weights[f"{prefix}post_attention_layernorm.weight"],
        gate_up=linear.fused(weights, f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        down=linear.fused(weights, f"{mlp}.down_proj"),
        window=spec.windows[index],
    )

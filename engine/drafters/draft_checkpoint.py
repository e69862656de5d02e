"""DSpark and DFlash draft checkpoints as DeepSpec publishes them for Qwen3 targets: `config.json` + safetensors.

A DFlash checkpoint of DeepSpec is a `Qwen3DSparkModel` with Markov rank 0 and no confidence head. Sizes, rope and
epsilon in the file are the target's own; the attention is full in every layer whatever the target's is.
Source: DeepSpec (deepseek-ai), `modeling/dspark`; sequential temperatures: DSpark paper, confidence calibration (STS).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Literal, cast, get_args

import torch
from torch import Tensor

from dspark.engine.drafters.checkpoint_config import (
    CheckpointConfig,
    check_made_for,
    drafter_error,
    is_positive,
    read_json,
)
from dspark.engine.models.spec import ModelSpec, RopeSpec
from dspark.engine.models.tensor_folder import TensorFolder

MarkovKind = Literal["vanilla", "gated", "rnn"]

ARCHITECTURE = "Qwen3DSparkModel"
EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"

EXTRAS_FILE = "dspark.json"
"""What DeepSpec's layout has no place for; optional."""

_REFUSED_ARCHITECTURES = {
    "Gemma4DSparkModel": "Gemma4 targets are not supported",
    "Qwen3Eagle3Model": "that is an Eagle3 checkpoint, not a DSpark one",
    "Eagle3DraftModel": "that is an Eagle3 checkpoint, not a DSpark one",
    "Gemma4Eagle3Model": "Gemma4 targets are not supported, nor is Eagle3 for them",
    "DFlashDraftModel": "z-lab's DFlash predicts one position less per block and is not supported",
    "DSparkDraftModel": "this wrapping of DSpark weights is not supported",
}
_KNOWN_SWITCHES = {
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "block_size",
}


@dataclass(frozen=True, slots=True)
class DraftExtras:
    """`dspark.json`, all of it optional. target: name of the model that the drafter was trained for; others: `DraftSpec`."""

    target: str | None = None
    temperatures: tuple[tuple[float, ...], ...] = ()
    draft_token_ids: tuple[int, ...] | None = None
    sampling_scale: float = 1.0

    @classmethod
    def read(cls, path: Path, block_size: int, vocab_size: int) -> DraftExtras:
        """Raises ConfigError("drafter")."""
        if not path.exists():
            return cls()
        content = read_json(path)
        known = [field.name for field in fields(cls)]
        unknown = sorted(content.keys() - set(known))
        if unknown:
            raise drafter_error(f"{path.name}: unknown keys {', '.join(unknown)}; supported: {', '.join(known)}")
        ids = content.get("draft_token_ids")
        if ids is not None and not _are_token_ids(ids, vocab_size):
            raise drafter_error(
                f"{path.name}: draft_token_ids must be a list of strictly increasing ids below {vocab_size}, not empty"
            )
        temperatures = (
            _read_temperatures(path.name, content["temperatures"], block_size) if "temperatures" in content else ()
        )
        scale = content.get("sampling_scale", 1.0)
        if not is_positive(scale):
            raise drafter_error(f"{path.name}: sampling_scale is {scale!r}; it must be a positive number")
        return cls(content.get("target"), temperatures, None if ids is None else tuple(ids), float(scale))


def shipped_target(path: Path) -> str | None:
    """The model that the drafter with this `dspark.json` was trained for, if it says so. Raises ConfigError("drafter")."""
    target = read_json(path).get("target")
    return target if isinstance(target, str) else None


def _read_temperatures(file: str, given: object, block_size: int) -> tuple[tuple[float, ...], ...]:
    """(greedy, sampled): an object of the two, or one list for both."""
    rows = [given, given]
    if isinstance(given, dict) and given.keys() == {"greedy", "sampled"}:
        rows = [given["greedy"], given["sampled"]]
    read = []
    for row in rows:
        if not isinstance(row, list) or len(row) != block_size or not all(is_positive(one) for one in row):
            raise drafter_error(
                f"{file}: temperatures is {given!r}; it must be {block_size} (block_size) positive numbers, or as many "
                "each under greedy and sampled"
            )
        read.append(tuple(map(float, row)))
    return tuple(read)


def _are_token_ids(ids: object, vocab_size: int) -> bool:
    if not isinstance(ids, list) or not ids or not all(type(one) is int for one in ids):
        return False
    return ids[0] >= 0 and ids[-1] < vocab_size and all(a < b for a, b in pairwise(ids))


@dataclass(frozen=True, slots=True)
class DraftSpec:
    """Sizes and switches of one draft checkpoint. γ = `block_size`.

    target_layer_ids: captured target layers, strictly increasing; -1 is the embedding's output.
    markov: None with `markov_rank` 0.
    temperatures: two of [γ], greedy and sampled, or empty; log-odds of slot k are divided by the k-th (STS).
    draft_token_ids: the ids that are drafted, strictly increasing; None: all.
    sampling_scale: drafts of a sampled request are drawn at its temperature times this. A drafter's distribution is a mean
    over what it does not know, flatter than the target's; a little sharper, its draws meet the target's more often.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeSpec
    attention_bias: bool
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    markov: MarkovKind | None
    markov_rank: int
    confidence_head: bool
    confidence_with_markov: bool
    temperatures: tuple[tuple[float, ...], ...] = ()
    draft_token_ids: tuple[int, ...] | None = None
    sampling_scale: float = 1.0


def read_draft_spec(folder: Path) -> DraftSpec:
    """Read and check `config.json` and, where there is one, `dspark.json`. Raises ConfigError("drafter")."""
    config = CheckpointConfig(folder)
    _check_architecture(config.architecture)
    config.check_switches(_KNOWN_SWITCHES)
    rank = config.integer("markov_rank", minimum=0)
    confidence_head = config.boolean("enable_confidence_head")
    with_markov = confidence_head and config.boolean("confidence_head_with_markov")
    if with_markov and rank == 0:
        raise drafter_error(
            "config.json: confidence_head_with_markov is true but markov_rank is 0; it needs a Markov head"
        )
    block_size = config.integer("block_size")
    vocab_size = config.integer("vocab_size")
    mask_token_id = config.integer("mask_token_id", minimum=0)
    if mask_token_id >= vocab_size:
        raise drafter_error(f"config.json: mask_token_id is {mask_token_id} but the vocabulary has {vocab_size} ids")
    num_heads, num_kv_heads, head_dim = config.heads()
    extras = DraftExtras.read(folder / EXTRAS_FILE, block_size, vocab_size)
    return DraftSpec(
        vocab_size=vocab_size,
        hidden_size=config.integer("hidden_size"),
        intermediate_size=config.integer("intermediate_size"),
        num_layers=config.integer("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=config.positive_number("rms_norm_eps"),
        rope=config.rope(),
        attention_bias=config.boolean("attention_bias"),
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=config.target_layer_ids(),
        num_target_layers=config.integer("num_target_layers"),
        markov=_markov_kind(config) if rank else None,
        markov_rank=rank,
        confidence_head=confidence_head,
        confidence_with_markov=with_markov,
        temperatures=extras.temperatures,
        draft_token_ids=extras.draft_token_ids,
        sampling_scale=extras.sampling_scale,
    )


def check_fits(spec: DraftSpec, target: ModelSpec) -> None:
    """Raise ConfigError("drafter") naming both values where the drafter was made for another target."""
    check_made_for(
        (
            ("vocabulary", spec.vocab_size, target.vocab_size),
            ("hidden size", spec.hidden_size, target.hidden_size),
            ("number of target layers", spec.num_target_layers, target.num_layers),
        )
    )
    # the last layer is left out: training stored its raw output, of which inference libraries give the normed one
    highest = target.num_layers - 2
    for layer in spec.target_layer_ids:
        if not -1 <= layer <= highest:
            raise drafter_error(
                f"target_layer_ids has {layer} but a target of {target.num_layers} layers "
                f"offers -1 (embedding) to {highest}"
            )


def tensor_shapes(spec: DraftSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint must have, and its shape [out, in]; embedding and head may be left out of the file."""
    d, f, v, r = spec.hidden_size, spec.intermediate_size, spec.vocab_size, spec.markov_rank
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (v, d),
        HEAD: (v, d),
        "fc.weight": (d, len(spec.target_layer_ids) * d),
        "hidden_norm.weight": (d,),
        "norm.weight": (d,),
    }
    projections = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
    for i in range(spec.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"layers.{i}.{norm}.weight"] = (d,)
        for name, shape in projections.items():
            shapes[f"layers.{i}.self_attn.{name}.weight"] = shape
            if spec.attention_bias:
                shapes[f"layers.{i}.self_attn.{name}.bias"] = shape[:1]
        for norm in ("q_norm", "k_norm"):
            shapes[f"layers.{i}.self_attn.{norm}.weight"] = (spec.head_dim,)
        for name, shape in {"gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}.items():
            shapes[f"layers.{i}.mlp.{name}.weight"] = shape
    if spec.markov:
        shapes["markov_head.markov_w1.weight"] = (v, r)
        shapes["markov_head.markov_w2.weight"] = (v, r)
    if spec.markov == "gated":
        shapes["markov_head.gate_proj.weight"] = (r, d + r)
        shapes["markov_head.gate_proj.bias"] = (r,)
    if spec.markov == "rnn":
        shapes["markov_head.joint_proj.weight"] = (3 * r, 2 * r + d)
        shapes["markov_head.joint_proj.bias"] = (3 * r,)
    if spec.confidence_head:
        shapes["confidence_head.proj.weight"] = (1, d + r if spec.confidence_with_markov else d)
        shapes["confidence_head.proj.bias"] = (1,)
    return shapes


def load_draft_weights(folder: Path, spec: DraftSpec, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every tensor of the checkpoint, converted to `dtype`, by DeepSpec's names.

    Embedding and head may be absent. Raises ConfigError("drafter"), see `TensorFolder`.
    """
    return TensorFolder(folder, "drafter").load(tensor_shapes(spec), dtype, optional={EMBEDDING, HEAD})


def drop_shared_with_target(weights: Mapping[str, Tensor], embedding: Tensor, head: Tensor) -> dict[str, Tensor]:
    """`weights` without the embedding and head [V, d] that equal the target's, which then serve both models.

    Training freezes copies of them in the checkpoint; for a large vocabulary they are more than half of it.
    """
    shared = {EMBEDDING: embedding, HEAD: head}
    return {
        name: tensor
        for name, tensor in weights.items()
        if name not in shared or not torch.equal(tensor, shared[name].to(tensor))
    }


def _check_architecture(found: str) -> None:
    if found == ARCHITECTURE:
        return
    why = _REFUSED_ARCHITECTURES.get(found, "it is not a known draft architecture")
    raise drafter_error(
        f"config.json: architecture is {found!r}: {why}; supported: {ARCHITECTURE} (DSpark and DFlash by DeepSpec), "
        "and as other kinds Qwen3Eagle3Model and causal language models"
    )


def _markov_kind(config: CheckpointConfig) -> MarkovKind:
    given = config.values.get("markov_head_type")
    kind = str(given).lower()
    if kind not in get_args(MarkovKind):
        raise drafter_error(
            f"config.json: markov_head_type is {given!r}; "
            f"supported: {', '.join(get_args(MarkovKind))} (markov_rank 0 for none)"
        )
    return cast(MarkovKind, kind)

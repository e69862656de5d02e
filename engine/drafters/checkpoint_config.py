"""Reading a draft checkpoint's JSON files: every value is checked, and an error names the key and what it may be.

DeepSpec writes the target's own config with a few keys of the drafter's, so sizes, rope and epsilon are the target's,
while the attention is full in every layer whatever the target's is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Set
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

from dspark.engine.errors import ConfigError
from dspark.engine.models.spec import RopeSpec, parse_config, read_rope

CONFIG_FILE = "config.json"

_HEAD_DIM_MULTIPLE = 32  # kernels/rope_kv_write.py
# Keys of other trainers: each may change the computation, so a file that has one is not what it seems.
_SWITCH_PREFIXES = ("markov_", "confidence_", "enable_", "draft_", "dflash_", "dspark_", "fc_", "block_", "causal")


class CheckpointConfig:
    """The `config.json` of a draft checkpoint. Every method raises ConfigError("drafter") for a value that cannot be."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / CONFIG_FILE
        self.values: Mapping[str, Any] = read_json(self._path)

    @property
    def architecture(self) -> str:
        """The first of `architectures`; empty where there is none."""
        architectures = self.values.get("architectures")
        found = architectures[0] if isinstance(architectures, list) and architectures else architectures
        return found if isinstance(found, str) else ""

    def check_switches(self, known: Set[str]) -> None:
        """Refuse keys beyond `known` that look like a trainer's switches, and what no drafter of DeepSpec's has."""
        unknown = sorted(key for key in self.values if key.startswith(_SWITCH_PREFIXES) and key not in known)
        if unknown:
            raise drafter_error(
                f"config.json: unknown switches {', '.join(unknown)} may change the computation; refused"
            )
        if "quantization_config" in self.values:
            raise drafter_error("config.json: quantization_config: quantised drafters are not supported")
        if self.values.get("hidden_act") != "silu":
            raise drafter_error(f"config.json: hidden_act is {self.values.get('hidden_act')!r}; supported: 'silu'")
        tied = self.values.get("tie_word_embeddings")
        if tied is not False:
            raise drafter_error(f"config.json: tie_word_embeddings is {tied!r}; DeepSpec writes false")
        kinds = self.values.get("layer_types")
        if kinds is not None and kinds != ["full_attention"] * self.integer("num_hidden_layers"):
            raise drafter_error(
                f"config.json: layer_types is {kinds!r}; supported: 'full_attention' for each of num_hidden_layers"
            )

    def integer(self, key: str, minimum: int = 1) -> int:
        value = self.values.get(key)
        if type(value) is not int or value < minimum:
            raise drafter_error(
                f"config.json: {key} is {self._shown(key)}; it must be an integer of at least {minimum}"
            )
        return value

    def boolean(self, key: str) -> bool:
        value = self.values.get(key)
        if type(value) is not bool:
            raise drafter_error(f"config.json: {key} is {self._shown(key)}; it must be true or false")
        return value

    def positive_number(self, key: str) -> float:
        value = self.values.get(key)
        if not is_positive(value):
            raise drafter_error(f"config.json: {key} is {self._shown(key)}; it must be a positive number")
        return float(cast(float, value))

    def heads(self) -> tuple[int, int, int]:
        """(query heads, key/value heads, head dim)."""
        num_heads = self.integer("num_attention_heads")
        num_kv_heads = self.integer("num_key_value_heads")
        if num_heads % num_kv_heads:
            raise drafter_error(
                f"config.json: num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = self.integer("head_dim")
        if head_dim % _HEAD_DIM_MULTIPLE:
            raise drafter_error(f"config.json: head_dim is {head_dim}; supported: multiples of {_HEAD_DIM_MULTIPLE}")
        return num_heads, num_kv_heads, head_dim

    def target_layer_ids(self) -> tuple[int, ...]:
        """The captured target layers, strictly increasing."""
        ids = self.values.get("target_layer_ids")
        if not isinstance(ids, list) or not ids or not all(type(i) is int for i in ids):
            raise drafter_error(f"config.json: target_layer_ids is {ids!r}; it must be a list of layer numbers")
        if any(b <= a for a, b in pairwise(ids)):
            raise drafter_error(f"config.json: target_layer_ids {ids} must be strictly increasing")
        return tuple(ids)

    def rope(self) -> RopeSpec:
        """The target's rope, in transformers 4's or 5's spelling."""
        values = dict(self.values)
        rope = values.get("rope_parameters")
        if isinstance(rope, dict) and "full_attention" in rope:  # per layer type; the draft has full attention only
            values["rope_parameters"] = rope["full_attention"]
        try:
            return read_rope(parse_config("Qwen3ForCausalLM", values, self._path), self._path)
        except ConfigError as error:
            raise as_drafter_error(error) from error

    def _shown(self, key: str) -> str:
        return repr(self.values[key]) if key in self.values else "missing"


def check_made_for(pairs: tuple[tuple[str, int, int], ...]) -> None:
    """pairs: (what, the drafter's, the target's). Raises ConfigError("drafter") naming both where they differ."""
    for what, drafter_value, target_value in pairs:
        if drafter_value != target_value:
            raise drafter_error(
                f"its {what} is {drafter_value} but the target's is {target_value}; give one trained for this target"
            )


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise drafter_error(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # both broken UTF-8 and broken JSON
        raise drafter_error(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise drafter_error(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value)) and cast(float, value) > 0


def drafter_error(message: str) -> ConfigError:
    return ConfigError("drafter", message)


def as_drafter_error(error: ConfigError) -> ConfigError:
    """An error about a model's files, where the model is the drafter."""
    return drafter_error(str(error).removeprefix(f"{error.field}: "))

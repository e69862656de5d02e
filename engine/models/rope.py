"""Rotary position embedding tables, half-split (NeoX) convention: dimension i turns together with i + head_dim/2."""

from __future__ import annotations

import math

import torch

from dspark.engine.models.spec import RopeSpec


def rope_tables(rope: RopeSpec, head_dim: int, max_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for positions 0..max_len-1, each [max_len, head_dim // 2] float32, times the attention factor.

    The order of float32 operations is transformers' own, so that the tables are equal bit for bit.
    Source: Su et al. 2021 (RoFormer), eq. 15; scaling kinds as in transformers' modeling_rope_utils.
    """
    positions = torch.arange(max_len, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(rope, head_dim)
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor


def inverse_frequencies(rope: RopeSpec, head_dim: int) -> torch.Tensor:
    """[head_dim // 2] float32, radians per token, fastest first."""
    wavelengths = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / wavelengths
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        return _yarn(rope, head_dim, wavelengths)
    return plain


def _llama3(rope: RopeSpec, plain: torch.Tensor) -> torch.Tensor:
    """Slow dimensions are interpolated, fast ones kept, those between blended. Source: Llama 3.1 reference code."""
    wavelengths = 2 * math.pi / plain
    longest = rope.original_max_position / rope.low_freq_factor
    shortest = rope.original_max_position / rope.high_freq_factor
    blend = (rope.original_max_position / wavelengths - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - blend) * plain / rope.factor + blend * plain
    scaled = torch.where(wavelengths > longest, plain / rope.factor, plain)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, blended, scaled)


def _yarn(rope: RopeSpec, head_dim: int, wavelengths: torch.Tensor) -> torch.Tensor:
    """Dimensions that turn fewer than beta_slow times in the trained context are interpolated, those that turn more
    than beta_fast times kept, with a linear ramp between. Source: Peng et al. 2023 (YaRN), section 3.2.
    """

    def dimension_turning(rotations: float) -> float:
        span = rope.original_max_position / (rotations * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(rope.theta))

    low, high = dimension_turning(rope.beta_fast), dimension_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # an empty ramp would divide by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept

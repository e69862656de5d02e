"""How many K/V blocks fit into a device's memory."""

from __future__ import annotations

from dataclasses import dataclass

from dspark.engine.errors import ConfigError

RESERVE_SHARE = 0.05
"""Of the device's memory, kept free for fragments, library workspaces and whatever else runs on it."""
SMALLEST_RESERVE = 512 << 20
FEWEST_BLOCKS = 2


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes. total, free: of the device, with the weights on it and nothing else. step: most that steps take besides."""

    total: int
    free: int
    step: int


def plan_blocks(memory: DeviceMemory, block_bytes: int, most: int, asked_bytes: int | None) -> int:
    """Blocks of the K/V pool, `most` at most: what was asked for, or what is free but for a step and the reserve.

    Raises ConfigError("kv_cache_memory") where what is asked for does not fit, or too few blocks do.
    """
    reserve = max(SMALLEST_RESERVE, int(RESERVE_SHARE * memory.total))
    room = memory.free - memory.step - reserve
    if asked_bytes is not None and asked_bytes > room:
        raise ConfigError(
            "kv_cache_memory",
            f"{asked_bytes} bytes, but the device has room for {max(room, 0)}: {memory.free} bytes are free, of which a "
            f"step needs {memory.step} and {reserve} are kept free",
        )
    blocks = min((room if asked_bytes is None else asked_bytes) // block_bytes, most)
    if blocks < FEWEST_BLOCKS:
        raise ConfigError(
            "kv_cache_memory",
            f"{max(room, 0) if asked_bytes is None else asked_bytes} bytes hold {max(blocks, 0)} blocks of {block_bytes} "
            f"bytes; at least {FEWEST_BLOCKS} are needed. {memory.free} bytes of the device are free, of which a step "
            f"needs {memory.step} and {reserve} are kept free",
        )
    return blocks

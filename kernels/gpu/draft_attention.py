"""Attention of draft blocks on the device: each slot sees the whole context and, both ways, its whole block.

What `kernels/draft_attention.py` computes, with its shapes; the tables and lengths are int32 tensors. The kernels are those of
`paged_attention.py`, with its tiles, splits and row invariance: to them a block's slots are positions, which begin at the
first edge of a cache block behind the context and all see the last one. So a block never lies in two splits, and what
there is between the context's end and that edge is no position.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dspark.kernels.gpu import paged_attention
from dspark.kernels.gpu.ahead_of_time import Configuration


def configurations() -> list[Configuration]:
    """None of its own."""
    return []


def bytes_moved(context_lens: Sequence[int], width: int, heads: int, kv_heads: int, dim: int, element: int) -> int:
    """Every query and result once, and K and V of every context and block. element: bytes of one."""
    blocks = [(length, width) for length in context_lens]
    return paged_attention.bytes_moved(blocks, heads, kv_heads, dim, element)


def draft_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scratch_blocks: Tensor,
    width: int,
    scale: float,
) -> Tensor:
    """Launch; the head dimension must be a multiple of 16 up to 256, the block size 16 and `width` at most that."""
    unread = context_lens
    return paged_attention.attend(
        q, k_cache, v_cache, block_tables, unread, context_lens, scratch_blocks, width, scale, 0
    )

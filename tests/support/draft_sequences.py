"""Sequences as a drafter sees them, without a target: random tokens, random features, block tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.engine.drafters.drafter import DraftRow

KV_BLOCK_SIZE = 16


def noise_at(key: int, position: int, vocab_size: int) -> Tensor:
    """Any function of key and position will do: the drafter only has to use it at the right places."""
    generator = torch.Generator().manual_seed(1000 * key + position)
    return -torch.empty(vocab_size).exponential_(generator=generator).log()


def noise_rows(vocab_size: int, keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> Tensor:
    pairs = zip(keys.tolist(), positions.tolist(), strict=True)
    return torch.stack([noise_at(key, position, vocab_size) for key, position in pairs])


@dataclass
class DraftSequence:
    """features: [positions, m * d], of the target; empty for a drafter that wants none. blocks: as the target has them."""

    id: int
    tokens: list[int]
    blocks: list[int]
    features: Tensor
    temperature: float = 0.0
    key: int = 0

    @property
    def position(self) -> int:
        """Of the anchor."""
        return len(self.tokens) - 1

    def row(self) -> DraftRow:
        return DraftRow(
            sequence_id=self.id,
            tokens=np.array(self.tokens, np.int64),
            position=self.position,
            temperature=self.temperature,
            noise_key=self.key,
            block_table=np.array(self.blocks, np.int32),
        )

    def slots(self, start: int, end: int) -> NDArray[np.int64]:
        return np.array(
            [self.blocks[p // KV_BLOCK_SIZE] * KV_BLOCK_SIZE + p % KV_BLOCK_SIZE for p in range(start, end)], np.int64
        )


def blocks_before(position: int) -> int:
    """Blocks that the target has allocated once it has computed all before `position`: not always one for the anchor."""
    return -(-position // KV_BLOCK_SIZE)

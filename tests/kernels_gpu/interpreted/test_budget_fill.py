"""The device fills the budget with the drafts that the host would."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dspark.engine.load_controller import fill_budget as on_the_host
from dspark.kernels.gpu.budget_fill import fill_budget

pytestmark = pytest.mark.usefixtures("nan_filled")


def filled(survival: NDArray[np.float32], caps: NDArray[np.int32], budget: int) -> list[int]:
    lengths = fill_budget(torch.from_numpy(survival), torch.from_numpy(caps), torch.tensor([budget], dtype=torch.int32))
    assert lengths.dtype == torch.int32
    return lengths.tolist()


def blocks(sequences: int, block: int, seed: int, levels: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """Non-increasing survivals of few levels, so that many are equal, and caps from none to more than the block."""
    rng = np.random.default_rng(seed)
    survival = np.cumprod(rng.integers(levels // 2, levels + 1, (sequences, block)) / levels, axis=1)
    return survival.astype(np.float32), rng.integers(-1, block + 3, sequences).astype(np.int32)


@pytest.mark.parametrize(("sequences", "block"), [(1, 7), (5, 1), (21, 7), (10, 16)])
@pytest.mark.parametrize("levels", [2, 50])
def test_equals_the_host_for_every_kind_of_budget_ties_included(sequences: int, block: int, levels: int) -> None:
    survival, caps = blocks(sequences, block, seed=sequences, levels=levels)
    available = int(np.clip(caps, 0, block).sum())
    for budget in sorted({-1, 0, available // 3, available - 1, available + 5}):
        assert filled(survival, caps, budget) == on_the_host(survival, caps, budget).tolist(), budget


def test_ties_go_to_the_lower_row_across_tiles() -> None:
    survival, caps = np.full((18, 2), 0.5, np.float32), np.full(18, 2, np.int32)
    survival[:, 1] = 0.25
    assert filled(survival, caps, 15) == [1] * 15 + [0, 0, 0]
    assert filled(survival, caps, 18 + 16) == [2] * 16 + [1, 1]


def test_drafts_that_cannot_survive_fill_what_is_left() -> None:
    survival = np.array([[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    assert filled(survival, np.array([3, 3], np.int32), 4) == [3, 1]


def test_no_sequences_give_no_lengths() -> None:
    assert filled(np.empty((0, 7), np.float32), np.empty(0, np.int32), 5) == []

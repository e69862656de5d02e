"""Where the K/V of drafted positions go: a sequence's own blocks, and scratch blocks behind what the target has given it.

A sequence's blocks cover what the target computes next, not a whole draft block. Positions from the anchor on lie in
blocks that no other sequence shares (only blocks full of computed tokens are shared), so drafting may write there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dspark.engine.drafters.drafter import DraftRow


def scratch_blocks_per_row(drafted: int, block_size: int) -> int:
    """Blocks that `drafted` positions need at most beyond a sequence's own, which cover all before the anchor."""
    return -(-drafted // block_size)


def drafting_tables(
    rows: Sequence[DraftRow], drafted: int, block_size: int, scratch: NDArray[np.int32]
) -> NDArray[np.int32]:
    """Block tables that reach `drafted` positions from each anchor on, [B, most blocks of a row] int32.

    scratch: [B, at least scratch_blocks_per_row] block ids. Entries past what a row needs are 0 and never read.
    """
    counts = [-(-(row.position + drafted) // block_size) for row in rows]
    tables = np.zeros((len(rows), max(counts)), np.int32)
    for table, row, count, spare in zip(tables, rows, counts, scratch, strict=True):
        own = row.block_table[:count]
        table[: len(own)] = own
        table[len(own) : count] = spare[: count - len(own)]
    return tables


def slots_at(
    tables: NDArray[np.int32], owners: NDArray[np.int64], positions: NDArray[np.int32], block_size: int
) -> NDArray[np.int64]:
    """Slot of position positions[i] of row owners[i] of `tables`, [n] int64: block id · block size + offset."""
    return tables[owners, positions // block_size].astype(np.int64) * block_size + positions % block_size


def flat_positions(starts: NDArray[np.int32], ends: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Positions starts[i] … ends[i]-1 of all rows, one row after another: (owners [n] int64, positions [n] int32)."""
    counts = ends - starts
    owners = np.repeat(np.arange(len(counts)), counts)
    before = np.cumsum(counts) - counts
    positions = np.arange(len(owners), dtype=np.int32) + (starts - before)[owners]
    return owners, positions.astype(np.int32)

"""Draft attention on the device equals its reference, and a sequence's block does not depend on the other sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_inputs import DraftBlocks, draft_blocks, on_tensors
from torch import Tensor

from dspark.kernels.draft_attention import draft_attention_reference
from dspark.kernels.gpu.draft_attention import bytes_moved, draft_attention

CONTEXTS = [0, 1, 15, 16, 17, 47, 48]
LONG = [47, 49, 64, 65, 200, 3]

pytestmark = pytest.mark.usefixtures("nan_filled")


def run(case: DraftBlocks) -> Tensor:
    """The kernel's answer, given a cache without a number wherever no slot looks."""
    return case.with_unseen(torch.nan, torch.nan).run(on_tensors(draft_attention))


def assert_equals_reference(case: DraftBlocks) -> None:
    out = run(case)
    assert out.dtype == case.q.dtype
    wanted = case.as_float().run(draft_attention_reference)
    # weights are rounded to the values' dtype too
    rtol, atol = (2.0**-10, 2.0**-10) if case.q.dtype == torch.float16 else (1e-5, 5e-6)
    torch.testing.assert_close(out.float(), wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "width", "dtype"),
    [
        (1, 1, 16, 7, torch.float32),
        (8, 1, 64, 16, torch.float16),
        (3, 1, 80, 5, torch.float32),
        (4, 2, 128, 7, torch.float16),
        (2, 2, 256, 1, torch.float32),
    ],
)
def test_equals_the_reference_at_the_edges_of_blocks(
    heads: int, kv_heads: int, dim: int, width: int, dtype: torch.dtype
) -> None:
    assert_equals_reference(draft_blocks(heads, kv_heads, dim, CONTEXTS, width, dtype))


@pytest.mark.usefixtures("small_splits")
@pytest.mark.parametrize(("group", "width"), [(3, 7), (8, 4), (8, 5)])
def test_equals_the_reference_over_several_splits(group: int, width: int) -> None:
    assert_equals_reference(draft_blocks(group, 1, 64, LONG, width))


def test_every_slot_sees_the_last_slot_of_its_block() -> None:
    case = draft_blocks(2, 1, 32, [20], 5)
    before = run(case)
    case.v_cache[int(case.scratch_blocks[0]), :, 4] += 1.0
    assert (run(case) != before).any(dim=-1).all()


@pytest.mark.usefixtures("small_splits")
def test_other_sequences_change_no_bit() -> None:
    batch = draft_blocks(3, 1, 80, LONG, 5, torch.float16)
    alone = torch.cat([run(batch.only(s)) for s in range(len(LONG))])
    assert torch.equal(run(batch), alone)


def test_a_padding_sequence_which_has_no_anchor_sees_its_own_block_only() -> None:
    batch = draft_blocks(4, 2, 64, [20, 0], 7)
    padded = replace(batch, context_lens=np.array([20, -1], np.int32))
    assert torch.equal(run(padded), run(batch))


def test_no_sequences_give_no_rows() -> None:
    case = draft_blocks(4, 2, 64, [5], 7)
    none = replace(
        case,
        q=case.q[:0],
        block_tables=case.block_tables[:0],
        context_lens=case.context_lens[:0],
        scratch_blocks=case.scratch_blocks[:0],
    )
    assert run(none).shape == (0, 4, 64)


def test_bytes_moved_counts_context_and_block() -> None:
    assert bytes_moved([100, 20], 7, 8, 2, 64, 2) == 2 * 64 * 2 * (14 * 8 + (107 + 27) * 2)

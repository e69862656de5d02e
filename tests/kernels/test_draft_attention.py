"""Draft attention equals its reference, and a sequence's block does not depend on the other sequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from kernel_inputs import draft_blocks

from dspark.kernels.draft_attention import draft_attention_reference

DTYPES = [torch.float32, torch.bfloat16]
HEAD_SHAPES = [(1, 1, 32), (4, 2, 64), (3, 1, 80), (8, 1, 128), (5, 5, 48), (14, 2, 64)]
CONTEXTS = [[0], [1], [15], [16], [17], [100], [0, 33, 16, 7, 64]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16])
@pytest.mark.parametrize("contexts", CONTEXTS)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), HEAD_SHAPES)
def test_equals_the_reference(
    heads: int, kv_heads: int, dim: int, contexts: list[int], width: int, dtype: torch.dtype
) -> None:
    case = draft_blocks(heads, kv_heads, dim, contexts, width, dtype)
    out = case.run()
    assert out.dtype == dtype
    half_ulp = 2.0**-8 if dtype == torch.bfloat16 else 0.0
    wanted = case.as_float().run(draft_attention_reference)
    torch.testing.assert_close(out.float(), wanted, rtol=half_ulp + 1e-5, atol=5e-6)


def test_every_slot_sees_the_last_slot_of_its_block() -> None:
    case = draft_blocks(2, 1, 32, [20], 5)
    before = case.run()
    case.v_cache[int(case.scratch_blocks[0]), :, 4] += 1.0
    assert (case.run() != before).any(dim=-1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_cache_slots_beyond_context_and_block_have_no_influence(dtype: torch.dtype) -> None:
    case = draft_blocks(6, 2, 80, [0, 33, 16, 7], 5, dtype)
    assert torch.equal(case.with_unseen(3e37, -3e37).run(), case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(3, 1, 80), (4, 4, 32), (14, 2, 64)])
def test_other_sequences_change_no_bit(heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    batch = draft_blocks(heads, kv_heads, dim, [0, 33, 16, 7, 64], 7, dtype)
    alone = torch.cat([batch.only(s).run() for s in range(5)])
    assert torch.equal(batch.run(), alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype: torch.dtype, set_threads: Callable[[int], None]) -> None:
    case = draft_blocks(6, 2, 80, [0, 33, 16, 7, 64], 7, dtype)
    set_threads(1)
    one = case.run()
    set_threads(2)
    assert torch.equal(case.run(), one)


def test_no_sequences_give_no_rows() -> None:
    case = draft_blocks(4, 2, 64, [5], 7)
    none = replace(
        case,
        q=case.q[:0],
        block_tables=case.block_tables[:0],
        context_lens=case.context_lens[:0],
        scratch_blocks=case.scratch_blocks[:0],
    )
    assert none.run().shape == (0, 4, 64)

"""Draft attention equals its reference, and a sequence's block does not depend on the other sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspark.kernels.draft_attention import draft_attention, draft_attention_reference

BLOCK = 16
DTYPES = [torch.float32, torch.bfloat16]
HEAD_SHAPES = [(1, 1, 32), (4, 2, 64), (3, 1, 80), (8, 1, 128), (5, 5, 48), (14, 2, 64)]
CONTEXTS = [[0], [1], [15], [16], [17], [100], [0, 33, 16, 7, 64]]


@dataclass(frozen=True)
class DraftBlocks:
    """One call, over a cache whose every slot holds something."""

    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_tables: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    scratch_blocks: NDArray[np.int32]
    width: int

    def run(self, kernel: Callable[..., Tensor] = draft_attention) -> Tensor:
        scale = self.q.shape[2] ** -0.5
        tables = (self.block_tables, self.context_lens, self.scratch_blocks)
        return kernel(self.q, self.k_cache, self.v_cache, *tables, self.width, scale)

    def as_float(self) -> DraftBlocks:
        return replace(self, q=self.q.float(), k_cache=self.k_cache.float(), v_cache=self.v_cache.float())

    def only(self, s: int) -> DraftBlocks:
        """Sequence s as a call of its own."""
        return replace(
            self,
            q=self.q[s * self.width : (s + 1) * self.width].contiguous(),
            block_tables=self.block_tables[s : s + 1],
            context_lens=self.context_lens[s : s + 1],
            scratch_blocks=self.scratch_blocks[s : s + 1],
        )


def draft_blocks(
    heads: int, kv_heads: int, dim: int, contexts: Sequence[int], width: int, dtype: torch.dtype = torch.float32
) -> DraftBlocks:
    generator = torch.Generator().manual_seed(heads * dim + width)
    columns = max(contexts) // BLOCK + 2
    blocks = len(contexts) * (columns + 1) + 2
    order = np.random.default_rng(width).permutation(blocks).astype(np.int32)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return DraftBlocks(
        q=2 * random(len(contexts) * width, heads, dim),
        k_cache=random(blocks, kv_heads, dim, BLOCK),
        v_cache=random(blocks, kv_heads, BLOCK, dim),
        block_tables=order[: len(contexts) * columns].reshape(len(contexts), columns),
        context_lens=np.array(contexts, np.int32),
        scratch_blocks=order[len(contexts) * columns :][: len(contexts)],
        width=width,
    )


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
    used = torch.zeros(case.k_cache.shape[0], BLOCK, dtype=torch.bool)
    for s, length in enumerate(case.context_lens.tolist()):
        used[case.scratch_blocks[s], : case.width] = True
        for position in range(length):
            used[case.block_tables[s, position // BLOCK], position % BLOCK] = True
    k_cache, v_cache = case.k_cache.clone(), case.v_cache.clone()
    k_cache.permute(0, 3, 1, 2)[~used] = 3e37
    v_cache.permute(0, 2, 1, 3)[~used] = -3e37
    assert torch.equal(replace(case, k_cache=k_cache, v_cache=v_cache).run(), case.run())


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

"""A packed linear layer gives a row the same bits however many rows share the call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.kernels import packed_linear as module
from dspark.kernels.packed_linear import PackedLinear, RowPlan, find_row_plan, packing_works

SHAPES = [(96, 64), (64, 192), (960, 576), (576, 1536), (33, 80), (320, 64)]  # out, in
LONGEST_CALL = 200


def weight_of(out: int, inner: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(out, inner, generator=torch.Generator().manual_seed(out)).to(dtype)


def rows_of(count: int, inner: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, inner, generator=torch.Generator().manual_seed(inner)).to(dtype)


def bias_of(out: int, dtype: torch.dtype) -> Tensor:
    return 10 * torch.randn(out, generator=torch.Generator().manual_seed(out + 1)).to(dtype)


def assert_close_to_exact(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    rtol = 2.0**-7 if got.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=rtol, atol=1e-4 * x.shape[1] ** 0.5)


def assert_rows_are_invariant(layer: PackedLinear, x: Tensor) -> None:
    """Every prefix of x, and stretches from its middle, give the rows that calls of one row give."""
    alone = torch.cat([layer(row) for row in x.split(1)])
    for count in range(1, len(x) + 1):
        assert torch.equal(layer(x[:count]), alone[:count]), f"{count} rows differ from the same rows alone"
    for start, count in [(1, 1), (3, 2), (7, 31), (50, 129), (199, 1)]:
        assert torch.equal(layer(x[start : start + count]), alone[start : start + count])


@pytest.mark.skipif(not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="no bf16 instructions")
def test_the_packing_operators_work_with_this_torch() -> None:
    assert packing_works()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("out", "inner"), SHAPES)
def test_every_row_count_gives_bit_identical_rows(out: int, inner: int, biased: bool) -> None:
    dtype = torch.bfloat16
    weight, bias = weight_of(out, inner, dtype), bias_of(out, dtype) if biased else None
    plan = find_row_plan(weight, packing_works())
    assert plan is not None
    layer = PackedLinear(weight, bias, plan)
    assert layer.row_invariant
    x = rows_of(LONGEST_CALL, inner, dtype)
    assert_rows_are_invariant(layer, x)
    assert_close_to_exact(layer(x), x, weight, bias)


# how calls are cut does not depend on the dtype: from here on float32, for which the operators exist on any processor


@pytest.mark.parametrize("plan", [RowPlan(32, 2, 8), RowPlan(1, 2, 128), RowPlan(0, 2, 16), RowPlan(1, 1, 8)])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 8, 9, 15, 16, 17, 25, 128, 129, 130, 200])
def test_cutting_and_padding_keep_every_row_and_their_order(plan: RowPlan, count: int) -> None:
    weight, bias, x = weight_of(48, 32, torch.float32), bias_of(48, torch.float32), rows_of(count, 32, torch.float32)
    out = PackedLinear(weight, bias, plan)(x)
    assert out.shape == (count, 48)
    assert_close_to_exact(out, x, weight, bias)


@pytest.mark.parametrize(
    ("count", "pieces"),
    [(1, [2]), (2, [2]), (8, [8]), (9, [7, 2]), (10, [8, 2]), (16, [8, 8]), (17, [8, 7, 2]), (18, [8, 8, 2])],
)
def test_calls_have_only_row_counts_that_the_plan_allows(
    count: int, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
        seen.append(x.shape[0])
        return F.linear(x, weight, bias)

    monkeypatch.setattr(module, "_apply", recording)
    PackedLinear(weight_of(48, 32, torch.float32), None, RowPlan(0, 2, 8))(rows_of(count, 32, torch.float32))
    assert seen == pieces


def lone_rows_differ(x: Tensor, weight: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
    """Rounds as oneDNN does on some processors: calls of one row, and of more than 21 rows, in their own ways."""
    factor = {True: 1.0, False: 1.0 + 2.0**-20}[2 <= x.shape[0] <= 21]
    wide = x.double() @ weight.double().T * factor
    return (wide if bias is None else wide + bias).to(x.dtype)


def every_count_differs(x: Tensor, weight: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
    return torch.full((x.shape[0], 48), 1.0 / x.shape[0])


def test_the_plan_starts_at_two_rows_where_one_row_is_computed_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_apply", lone_rows_differ)
    weight = weight_of(48, 32, torch.float32)
    plan = find_row_plan(weight, packing=False)
    assert plan == RowPlan(pack_rows=0, min_rows=2, max_rows=16)
    assert_rows_are_invariant(PackedLinear(weight, None, plan), rows_of(LONGEST_CALL, 32, torch.float32))


@pytest.mark.parametrize("packing", [True, False])
def test_there_is_no_plan_for_an_operator_that_cannot_be_invariant(
    packing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_apply", every_count_differs)
    assert find_row_plan(weight_of(48, 32, torch.float32), packing) is None


def test_without_a_plan_the_layer_says_so_and_is_plain_linear() -> None:
    dtype = torch.bfloat16
    weight, bias, x = weight_of(48, 32, dtype), bias_of(48, dtype), rows_of(5, 32, dtype)
    layer = PackedLinear(weight, bias)
    assert not layer.row_invariant
    assert torch.equal(layer(x), F.linear(x, weight, bias))


def test_a_vocabulary_head_is_tried_with_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    longest = []

    def recording(x: Tensor, weight: Tensor, bias: Tensor | None, plan: RowPlan) -> Tensor:
        longest.append(x.shape[0])
        return torch.zeros(x.shape[0], 1)

    monkeypatch.setattr(module, "_apply", recording)
    assert find_row_plan(torch.zeros(16385, 1), packing=False) == RowPlan(0, 1, 32)
    assert max(longest) == 32

"""A panel linear layer: float32 results, weights kept in bfloat16 where they are, each row the same bits in any call."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dspark.kernels.panel_linear import BLOCK_BYTES, PanelLinear

SHAPES = [(96, 64), (64, 192), (960, 576), (576, 1536), (33, 80), (1, 16), (16, 48)]  # out, in


@pytest.fixture(params=[1, 2], ids=["serial", "threads"])
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def random(*shape: int, narrow: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(shape[0]))
    return values.bfloat16().float() if narrow else values


def in_order(x: Tensor, weight: Tensor) -> Tensor:
    """One fma a term, from the first to the last: float64 holds a product of two floats exactly, and the sum is rounded."""
    total = torch.zeros(len(x), len(weight))
    for k in range(x.shape[1]):
        total = (total.double() + x[:, k, None].double() * weight[:, k].double()).float()
    return total


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("out", "size"), SHAPES)
def test_every_row_count_gives_bit_identical_rows(out: int, size: int, biased: bool, narrow: bool) -> None:
    weight, bias = random(out, size, narrow=narrow), random(out) if biased else None
    layer, x = PanelLinear(weight, bias), random(2 * BLOCK_BYTES // (4 * size) if size == 1536 else 40, size)
    alone = torch.cat([layer(row) for row in x.split(1)])
    for count in [*range(1, 20), len(x) // 2, len(x)]:
        assert torch.equal(layer(x[:count]), alone[:count]), f"{count} rows differ from the same rows alone"
        assert torch.equal(layer(x[3 : 3 + count]), alone[3 : 3 + count])
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(alone.double(), exact, rtol=1e-5, atol=1e-5 * size**0.5)


def test_terms_are_summed_in_order() -> None:
    x, weight = random(5, 32), random(48, 32)
    # float64 rounds the sum a second time, which is different from one fma in a case of a million: these have none
    assert torch.equal(PanelLinear(weight)(x), in_order(x, weight))


def test_weights_in_bfloat16_are_kept_so_and_give_the_bits_of_their_float32_copy() -> None:
    narrow = random(64, 48, narrow=True)
    wide = narrow.clone()
    wide[63, 47] += 2.0**-20  # one weight that bfloat16 cannot hold: the whole layer stays float32
    assert PanelLinear(narrow).weight_bytes == 64 * 48 * 2
    assert PanelLinear(wide).weight_bytes == 64 * 48 * 4
    x = random(9, 48)
    assert torch.equal(PanelLinear(narrow)(x)[:, :63], PanelLinear(wide)(x)[:, :63])


def test_no_rows_rows_with_gaps_and_values_that_are_not_finite() -> None:
    layer = PanelLinear(random(20, 32))
    assert layer(torch.empty(0, 32)).shape == (0, 20)
    apart = random(6, 64)[:, ::2]
    assert torch.equal(layer(apart), layer(apart.contiguous()))
    x = random(3, 32)
    before = layer(x)
    x[1, 5] = torch.nan
    after = layer(x)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])

"""The gated activation equals its reference also where e^x leaves the range of fp32, and no row sees another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dspark.kernels.gpu.silu_mul import silu_mul
from dspark.kernels.silu_mul import silu_mul_reference

pytestmark = pytest.mark.usefixtures("nan_filled")


def gate_up(rows: int, width: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rows * width)
    return (6 * torch.randn(rows, 2 * width, generator=generator)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 7), (2, 1023), (2, 1024), (2, 2050)])
def test_equals_the_reference(rows: int, width: int, dtype: torch.dtype) -> None:
    x = gate_up(rows, width, dtype)
    out = silu_mul(x)
    assert out.shape == (rows, width)
    assert out.dtype == dtype
    half_ulp, smallest = (2.0**-11, 2.0**-25) if dtype == torch.float16 else (0.0, 1e-30)
    torch.testing.assert_close(out.float(), silu_mul_reference(x.float()), rtol=half_ulp + 1e-6, atol=smallest)


def test_is_finite_and_right_at_the_ends_of_the_range() -> None:
    gate = torch.tensor([[0.0, 200.0, -200.0, 3e38, -1e5, -87.5, -88.5, 87.5]])
    x = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(silu_mul(x), silu_mul_reference(x), atol=1e-30, rtol=1e-6)


def test_a_row_alone_has_the_bits_of_the_row_in_the_batch() -> None:
    x = gate_up(5, 1030, torch.float16)
    assert torch.equal(torch.cat([silu_mul(row) for row in x.split(1)]), silu_mul(x))


def test_no_rows_give_no_rows() -> None:
    assert silu_mul(torch.zeros(0, 64)).shape == (0, 32)

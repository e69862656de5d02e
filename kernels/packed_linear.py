"""Linear layers in bfloat16 on a CPU, whose result for a row does not depend on how many rows share the call.

    x: [rows, in] bfloat16; weight: [out, in] bfloat16; bias: [out] or None → [rows, out] bfloat16

oneDNN chooses its loop order by the number of rows, and with it the rounding; which numbers round alike depends on the
processor, the shape and how the weight was packed. So the plan is found by trial when a layer
is made: pack the weight for some number of rows, and look for the longest run of row counts, from 1 or 2 up, whose
rows all equal those computed alone. Calls are then cut into pieces of at most that many rows (and a single row is
padded to two where one row is computed differently). Weights are packed once: `F.linear` would reorder them at every
call.

Moves out·in weight elements once per piece: memory bound up to about 32 rows (128 with AMX).
The packing uses two private operators of torch; `packing_works` proves at start that they exist and are right.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

MAX_PIECE = 128
"""Rows of the longest piece tried; beyond it the weights are cheap next to the arithmetic."""

_HEAD_OUT = 16384
"""Layers with more outputs (vocabulary heads) get shorter pieces: each trial is a pass over their weights."""


@dataclass(frozen=True, slots=True)
class RowPlan:
    """How calls are shaped. pack_rows: rows the packing was optimised for; 0: not packed, plain `F.linear`."""

    pack_rows: int
    min_rows: int
    max_rows: int


def packing_works() -> bool:
    """The processor has bf16 instructions, and the private packing operators exist here and agree with `F.linear`."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if not hasattr(torch.ops.mkldnn, "_reorder_linear_weight") or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    weight, x = torch.eye(32, dtype=torch.bfloat16), torch.arange(64, dtype=torch.bfloat16).reshape(2, 32)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return torch.equal(torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""), x)


def _apply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: RowPlan) -> torch.Tensor:
    if plan.pack_rows:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _pack(weight: torch.Tensor, plan: RowPlan) -> torch.Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight, plan.pack_rows) if plan.pack_rows else weight


def _invariant_rows(weight: torch.Tensor, plan: RowPlan) -> int:
    """The largest m ≤ plan.max_rows such that calls of min_rows … m rows give the rows that calls of min_rows give."""
    packed = _pack(weight, plan)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(plan.max_rows, weight.shape[1], generator=generator).to(weight.dtype)
    alone = torch.cat(
        [_apply(x[i : i + plan.min_rows], packed, None, plan) for i in range(0, plan.max_rows, plan.min_rows)]
    )
    for rows in range(plan.min_rows, plan.max_rows + 1):
        if not torch.equal(_apply(x[:rows], packed, None, plan), alone[:rows]):
            return rows - 1
    return plan.max_rows


def find_row_plan(weight: torch.Tensor, packing: bool) -> RowPlan | None:
    """The first plan that is row-invariant over at least 8 rows, preferring long pieces; None if there is none.

    packing: `packing_works()`.
    """
    longest = 32 if weight.shape[0] > _HEAD_OUT else MAX_PIECE
    pack_choices = [1, 32] if packing else [0]
    best: RowPlan | None = None
    for min_rows in (1, 2):
        for pack_rows in pack_choices:
            plan = RowPlan(pack_rows, min_rows, longest)
            rows = _invariant_rows(weight, plan) // 8 * 8
            if rows == longest:
                return plan
            if rows >= 8 and (best is None or rows > best.max_rows):
                best = RowPlan(pack_rows, min_rows, rows)
    return best


class PackedLinear:
    """One linear layer on the CPU. `row_invariant` is False when no plan was found (then plain `F.linear` is used)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, plan: RowPlan | None = None) -> None:
        """`plan`: from `find_row_plan` for a weight of the same shape and dtype; None: no invariance, any row count."""
        self.row_invariant = plan is not None
        self._plan = plan or RowPlan(pack_rows=0, min_rows=1, max_rows=1 << 30)
        self._weight = _pack(weight, self._plan)
        self._bias = bias
        self.weight_bytes = weight.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        plan, rows = self._plan, x.shape[0]
        if plan.min_rows <= rows <= plan.max_rows:
            return _apply(x, self._weight, self._bias, plan)
        if rows < plan.min_rows:
            return _apply(F.pad(x, (0, 0, 0, plan.min_rows - rows)), self._weight, self._bias, plan)[:rows]
        pieces = list(x.split(plan.max_rows))
        if pieces[-1].shape[0] < plan.min_rows:  # one row left where the plan wants two: shorten the piece before it
            tail = torch.cat(pieces[-2:])
            pieces[-2:] = [tail[: -plan.min_rows], tail[-plan.min_rows :]]
        return torch.cat([_apply(piece, self._weight, self._bias, plan) for piece in pieces])

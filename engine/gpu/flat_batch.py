"""From a plan and the state on the device to the flat batch of a target pass, on the device.

The host does not know how many drafts a sequence has or how long it is by now (the last step may still be running), so
it gives bounds, and the sizes T (rows), R (sampled rows) and N (sequences) are padded. Nothing here waits for the device.

Decodes come first, then prefill chunks, as in `engine/runner.py`. Padding sequences are empty and behind all others. Padding
rows belong to no sequence; their K/V go to a spare block. Padding of the sampled rows repeats row 0; nobody reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.gpu.state import DeviceState
from dspark.engine.kv_cache import BLOCK_SIZE
from dspark.engine.models.decoder import DeviceBatch

FillBudget = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(survival [N, γ] float32, caps [N] int32, budget [1] int32) → drafts verified [N] int32; kernels/gpu/budget_fill.py."""


@dataclass(frozen=True, slots=True)
class SampledRows:
    """The rows whose tokens are wanted: all rows of decodes, the last of each prefill that ends. R of them, padded.

    rows: [R] int64, in the flat batch.        starts: [N + 1] int32, those of sequence s: starts[s] … starts[s+1]-1.
    slots: [R] int64, of their sequences.      positions: [R] int64, of the tokens that are sampled.
    fed: [R] int64, the tokens that the rows were fed: each sequence's anchor, then the drafts that are verified.
    """

    rows: Tensor
    starts: Tensor
    slots: Tensor
    positions: Tensor
    fed: Tensor


def flatten(
    state: DeviceState,
    plan: Mapping[str, Tensor],
    fill_budget: FillBudget,
    rows: int,
    sampled_rows: int,
    sequences: int,
    spare_block: int,
) -> tuple[DeviceBatch, SampledRows]:
    """plan: fields of `step_plan.UPLOAD`, of which the first `sequences` count. rows, sampled_rows, sequences: T, R and N.

    A sequence that has ended, as the device knows and the host perhaps does not, gets no rows.
    """
    slots = plan["slots"][:sequences]
    chunk, decodes = plan["prefill_counts"][:sequences], plan["decodes"][:sequences] > 0
    going = decodes & ~state.ended[slots]
    length = state.length[slots]
    left = state.max_length[slots] - length - 1
    caps = torch.minimum(torch.minimum(plan["caps"][:sequences], state.draft_count[slots]), left)
    caps = torch.where(going, caps.clamp(min=0), 0)
    drafts = fill_budget(state.survival[slots], caps, plan["budget"])
    counts = torch.where(decodes, going * (1 + drafts), chunk).to(torch.int32)
    firsts = torch.where(decodes, length - 1, plan["prefill_firsts"][:sequences])
    starts = _starts(counts)
    owner, offset = _owners(starts, rows)
    real = torch.arange(rows, device=slots.device) < starts[-1]
    drafted = state.drafts[slots[owner], (offset - 1).clamp(0, state.drafts.shape[1] - 1)]
    decoded = torch.where(offset == 0, state.anchor[slots[owner]], drafted)
    at = (plan["prefill_offsets"][:sequences][owner] + offset).clamp(0, len(plan["prefill_tokens"]) - 1)
    tokens = torch.where(decodes[owner], decoded, plan["prefill_tokens"][at])
    positions = torch.where(real, firsts[owner] + offset, 0).to(torch.int32)
    tables = state.block_tables[slots]
    block = torch.where(real, tables[owner, (positions // BLOCK_SIZE).long()], spare_block)
    batch = DeviceBatch(
        token_ids=torch.where(real, tokens, 0),
        positions=positions,
        slots=block.long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        block_tables=tables,
        row_starts=starts,
        first_positions=firsts.to(torch.int32),
    )
    ends = plan["prefill_ends"][:sequences]
    sampled_starts = _starts(torch.where(decodes, counts, ends).to(torch.int32))
    owner, offset = _owners(sampled_starts, sampled_rows)
    row = torch.where(decodes[owner], starts[owner] + offset, starts[owner + 1] - 1)
    row = torch.where(torch.arange(sampled_rows, device=slots.device) < sampled_starts[-1], row, 0).long()
    return batch, SampledRows(
        rows=row,
        starts=sampled_starts,
        slots=slots[owner],
        positions=batch.positions[row].long() + 1,
        fed=batch.token_ids[row],
    )


def _starts(counts: Tensor) -> Tensor:
    """[n] int32 → [n + 1] int32: where each begins, and the end."""
    starts = torch.zeros(len(counts) + 1, dtype=torch.int32, device=counts.device)
    torch.cumsum(counts, 0, dtype=torch.int32, out=starts[1:])
    return starts


def _owners(starts: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """For each of `rows` rows the part it belongs to [rows] int64 and its place in it [rows] int64; of padding, the last's."""
    row = torch.arange(rows, dtype=torch.int32, device=starts.device)
    owner = torch.searchsorted(starts[1:], row, right=True).clamp(max=len(starts) - 2)
    return owner, row.long() - starts[owner]

"""What the device knows of each running sequence, in slots: enough to run its next round without asking the host.

S slots (`max_num_seqs`) and one more, which padding reads and never changes. γ: drafts of a block. Letters as elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspark.engine.errors import EngineFailedError

MOST_STOP_IDS = 32
"""Stop tokens that the device looks for. Of a request with more it learns from the host, one round later, that it ended."""


@dataclass(frozen=True, slots=True)
class DeviceState:
    """One row per slot, S + 1 rows. length counts prompt and output tokens, the last of them the anchor.

    length, draft_count, longest_draft, max_length: [S + 1] int32; anchor, noise_key, top_k: [S + 1] int64;
    temperature, top_p, min_p: [S + 1] float32; drafts: [S + 1, γ] int64; survival: [S + 1, γ] float32;
    stop_ids: [S + 1, MOST_STOP_IDS] int64, filled up with -1; ended: [S + 1] bool, no token follows;
    block_tables: [S + 1, blocks of the longest sequence] int32.
    """

    length: Tensor
    anchor: Tensor
    drafts: Tensor
    draft_count: Tensor
    survival: Tensor
    noise_key: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    stop_ids: Tensor
    longest_draft: Tensor
    max_length: Tensor
    ended: Tensor
    block_tables: Tensor

    @classmethod
    def empty(cls, device: torch.device, slots: int, block_size: int, table_blocks: int) -> DeviceState:
        rows = slots + 1

        def zeros(dtype: torch.dtype, *width: int) -> Tensor:
            return torch.zeros((rows, *width), dtype=dtype, device=device)

        return cls(
            length=torch.ones(rows, dtype=torch.int32, device=device),  # padding's anchor is at position 0
            anchor=zeros(torch.int64),
            drafts=zeros(torch.int64, block_size),
            draft_count=zeros(torch.int32),
            survival=zeros(torch.float32, block_size),
            noise_key=zeros(torch.int64),
            temperature=zeros(torch.float32),
            top_k=zeros(torch.int64),
            top_p=torch.ones(rows, dtype=torch.float32, device=device),
            min_p=zeros(torch.float32),
            stop_ids=zeros(torch.int64, MOST_STOP_IDS) - 1,
            longest_draft=zeros(torch.int32),
            max_length=zeros(torch.int32),
            ended=zeros(torch.bool),
            block_tables=zeros(torch.int32, table_blocks),
        )

    @property
    def padding_slot(self) -> int:
        return len(self.length) - 1

    def start(self, fields: Mapping[str, Tensor], count: int) -> None:
        """Put `count` sequences into their slots. fields: of `step_plan.UPLOAD`, those whose names begin with `new_`."""
        slots = fields["new_slots"][:count]
        for name in ("length", "anchor", "noise_key", "temperature", "top_k", "top_p", "min_p"):
            getattr(self, name)[slots] = fields[f"new_{name}"][:count]
        self.stop_ids[slots] = fields["new_stop_ids"][:count]
        self.longest_draft[slots] = fields["new_longest_draft"][:count]
        self.max_length[slots] = fields["new_max_length"][:count]
        self.draft_count.index_fill_(0, slots, 0)
        self.ended.index_fill_(0, slots, False)

    def edit_tables(self, edits: Tensor) -> None:
        """edits: [n, 2] int64, places in the flattened block tables and the blocks that belong there."""
        self.block_tables.view(-1).index_copy_(0, edits[:, 0], edits[:, 1].to(torch.int32))

    def end(self, slot: int) -> None:
        """No further round is computed for it."""
        self.ended[slot] = True

    def take_in(self, slots: Tensor, tokens: Tensor, counts: Tensor) -> None:
        """Append a round's tokens and drop the drafts. tokens: [n, γ + 1] int64, of which counts [n] int32 are given.

        Nothing changes where the count is 0, so that padding, all of it in one slot, writes what is there already.
        """
        given = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
        grown = counts > 0
        last = tokens.gather(1, (counts - 1).clamp(min=0).long()[:, None])[:, 0]
        stopped = ((tokens[:, :, None] == self.stop_ids[slots][:, None]).any(-1) & given).any(-1)
        length = self.length[slots] + counts
        full = grown & (length >= self.max_length[slots])
        self.ended[slots] |= stopped | full
        self.length[slots] = length
        self.anchor[slots] = torch.where(grown, last, self.anchor[slots])
        self.draft_count.index_fill_(0, slots, 0)


class SlotMap:
    """Which sequence has which slot; on the host."""

    def __init__(self, slots: int) -> None:
        self._free = list(range(slots - 1, -1, -1))
        self._slot: dict[int, int] = {}

    def __contains__(self, sequence_id: int) -> bool:
        return sequence_id in self._slot

    def take(self, sequence_id: int) -> int:
        """A slot for a sequence, the one it has if it has one. Raises EngineFailedError when all are taken."""
        if sequence_id not in self._slot:
            if not self._free:
                raise EngineFailedError(f"all {len(self._slot)} slots of the device are taken")
            self._slot[sequence_id] = self._free.pop()
        return self._slot[sequence_id]

    def release(self, sequence_id: int) -> None:
        """A step that failed may have released it before."""
        slot = self._slot.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def of(self, sequence_ids: Sequence[int]) -> list[int]:
        return [self._slot[one] for one in sequence_ids]

"""A step's plan as the device wants it: what the host knows, and nothing of what only the device knows by now."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspark.engine.calibration import CalibrationTable
from dspark.engine.gpu.state import MOST_STOP_IDS, DeviceState, SlotMap
from dspark.engine.gpu.transfer import Array, Field, PackedBuffer
from dspark.engine.load_controller import Allocation
from dspark.engine.sequence import Batch, Sequence

EDIT_BYTES = 16
"""Of one change of a block table: two int64."""


@dataclass(frozen=True, slots=True)
class StepSizes:
    """What a step needs at most, before padding. rows: of the pass.  sampled: of them with a token.  drafting: sequences."""

    rows: int
    sampled: int
    sequences: int
    drafting: int


class StepPlans:
    """Fills and uploads the plans of all steps.

    slots, decodes, prefill_…, caps: by sequence of the batch, decodes first; those behind are padding: no decode, no rows.
    prefill_offsets: where a chunk's tokens begin in prefill_tokens.  budget: drafts in total.  draft_slots: drafted for next.
    slope, bias: of the calibration.  new_…: of sequences that enter their slots.  table_edits: see `DeviceState.edit_tables`.
    """

    def __init__(
        self, state: DeviceState, block_size: int, max_batched_tokens: int, turns: int, stop_ids: frozenset[int]
    ) -> None:
        """block_size: γ. turns: steps in flight at most. stop_ids: the model's own ends of text."""
        self._state = state
        self._block_size = block_size
        self._model_stops = stop_ids
        self._slot_map = SlotMap(state.padding_slot)
        self._blocks_known = np.zeros(state.padding_slot, np.int64)
        self._buffer = PackedBuffer(state.length.device, _upload_fields(state, block_size, max_batched_tokens), turns)

    @property
    def device(self) -> Mapping[str, Tensor]:
        """The fields of the plan that was uploaded last."""
        return self._buffer.device

    def slots_of(self, sequences: Items[Sequence]) -> list[int]:
        return self._slot_map.of([sequence.id for sequence in sequences])

    def upload(
        self,
        turn: int,
        batch: Batch,
        allocation: Allocation,
        calibration: CalibrationTable,
        caps: Items[int],
        drafting: Items[Sequence],
        longest_draft: Items[int],
    ) -> StepSizes:
        """Bring a step's plan and what is new of its sequences to the device.

        caps: of the decodes. drafting: who is drafted for next. longest_draft: drafts kept, of the sequences that start.
        """
        for sequence_id in batch.ended:
            self._slot_map.release(sequence_id)
        host = self._buffer.host(turn)
        self._fill_started(host, batch.started, longest_draft)
        edits = self._fill_edits(host, batch.sequences)
        self._fill_batch(host, batch, caps)
        host["budget"][0] = allocation.budget
        host["slope"][:], host["bias"][:] = calibration.slope, calibration.bias
        host["draft_slots"][:] = self._state.padding_slot
        host["draft_slots"][: len(drafting)] = self.slots_of(drafting)
        self._buffer.upload(turn, "table_edits", edits * EDIT_BYTES)
        if batch.started:
            self._state.start(self.device, len(batch.started))
        if edits:
            self._state.edit_tables(self.device["table_edits"][:edits])
        sampled = len(batch.decodes) + min(allocation.budget, sum(caps))
        return StepSizes(
            rows=sampled + batch.prefill_rows,
            sampled=sampled + sum(prefill.ends for prefill in batch.prefills),
            sequences=len(batch.sequences),
            drafting=len(drafting),
        )

    def chunks(self, rows: int, context_tokens: int, chunk: int) -> StepSizes:
        """Upload a plan for measuring: prefill chunks of at most `chunk` rows, all in the pool's first block.

        None of them ends, so that no state changes; the sizes say that they do, and the head is computed for it.
        """
        host, sequences = self._buffer.host(0), -(-rows // chunk)
        starts = np.arange(sequences) * chunk
        for name in ("slots", "decodes", "caps", "budget", "draft_slots", "prefill_tokens", "prefill_ends"):
            host[name][:] = 0
        host["prefill_counts"][:] = 0
        host["prefill_counts"][:sequences] = np.minimum(chunk, rows - starts)
        host["prefill_offsets"][:sequences] = starts
        host["prefill_firsts"][:] = context_tokens
        self._buffer.upload(0, "table_edits", 0)
        return StepSizes(rows, sequences, sequences, 0)

    def _fill_started(self, host: Mapping[str, Array], started: Items[Sequence], longest_draft: Items[int]) -> None:
        for i, (sequence, longest) in enumerate(zip(started, longest_draft, strict=True)):
            params = sequence.record.request.sampling
            slot = host["new_slots"][i] = self._slot_map.take(sequence.id)
            self._blocks_known[slot] = 0
            host["new_length"][i] = len(sequence.tokens)
            host["new_anchor"][i] = sequence.tokens[-1]
            host["new_noise_key"].view(np.uint64)[i] = sequence.noise_key
            host["new_temperature"][i] = 0.0 if params.greedy else params.temperature
            host["new_top_k"][i], host["new_top_p"][i], host["new_min_p"][i] = params.top_k, params.top_p, params.min_p
            model_stops = () if params.ignore_eos else sorted(self._model_stops)
            stops = [*model_stops, *params.stop_token_ids][:MOST_STOP_IDS]
            host["new_stop_ids"][i] = -1
            host["new_stop_ids"][i, : len(stops)] = stops
            host["new_longest_draft"][i] = longest
            host["new_max_length"][i] = sequence.prompt_len + sequence.max_tokens

    def _fill_edits(self, host: Mapping[str, Array], sequences: Items[Sequence]) -> int:
        """The blocks that sequences got since their tables were last uploaded; returns how many."""
        edits, width = 0, self._state.block_tables.shape[1]
        for sequence, slot in zip(sequences, self.slots_of(sequences), strict=True):
            known = int(self._blocks_known[slot])
            fresh = sequence.blocks[known:]
            host["table_edits"][edits : edits + len(fresh), 0] = slot * width + known + np.arange(len(fresh))
            host["table_edits"][edits : edits + len(fresh), 1] = fresh
            self._blocks_known[slot] += len(fresh)
            edits += len(fresh)
        return edits

    def _fill_batch(self, host: Mapping[str, Array], batch: Batch, caps: Items[int]) -> None:
        decodes, count = len(batch.decodes), len(batch.sequences)
        host["slots"][:count] = self.slots_of(batch.sequences)
        host["slots"][count:] = self._state.padding_slot
        host["decodes"][:decodes], host["decodes"][decodes:] = 1, 0
        host["caps"][:decodes], host["caps"][decodes:] = caps, 0
        for name in ("prefill_counts", "prefill_firsts", "prefill_offsets", "prefill_ends"):
            host[name][:] = 0
        offset = 0
        for i, prefill in enumerate(batch.prefills, decodes):
            host["prefill_counts"][i], host["prefill_firsts"][i] = prefill.count, prefill.start
            host["prefill_offsets"][i], host["prefill_ends"][i] = offset, prefill.ends
            tokens = prefill.sequence.tokens[prefill.start : prefill.start + prefill.count]
            host["prefill_tokens"][offset : offset + prefill.count] = tokens
            offset += prefill.count


def _upload_fields(state: DeviceState, block_size: int, max_batched_tokens: int) -> dict[str, Field]:
    sequences, table_blocks = state.padding_slot, state.block_tables.shape[1]
    long, short, real = torch.int64, torch.int32, torch.float32
    fields = {"budget": Field(short, (1,)), "slope": Field(real, (2, block_size)), "bias": Field(real, (2, block_size))}
    fields |= {name: Field(long, (sequences,)) for name in ("slots", "draft_slots")}
    counts = ("decodes", "caps", "prefill_counts", "prefill_firsts", "prefill_offsets", "prefill_ends")
    fields |= {name: Field(short, (sequences,)) for name in counts}
    for name, dtype in (
        ("slots", long),
        ("length", short),
        ("anchor", long),
        ("noise_key", long),
        ("temperature", real),
        ("top_k", long),
        ("top_p", real),
        ("min_p", real),
        ("longest_draft", short),
        ("max_length", short),
    ):
        fields[f"new_{name}"] = Field(dtype, (sequences,))
    fields["new_stop_ids"] = Field(long, (sequences, MOST_STOP_IDS))
    fields["prefill_tokens"] = Field(long, (max_batched_tokens,))
    fields["table_edits"] = Field(long, (sequences * table_blocks, 2))
    return fields

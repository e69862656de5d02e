"""The flat batch that the device makes of a plan is the CPU runner's, for random plans; and padding is harmless."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dspark.benchmarks.host_device import host_fill_budget
from dspark.engine import Request, SamplingParams
from dspark.engine.calibration import CalibrationTable
from dspark.engine.facts import RequestFacts
from dspark.engine.gpu.flat_batch import flatten
from dspark.engine.gpu.state import DeviceState
from dspark.engine.gpu.step_plan import StepPlans
from dspark.engine.kv_cache import BLOCK_SIZE, blocks_for
from dspark.engine.load_controller import fill_budget
from dspark.engine.noise import NoiseCache
from dspark.engine.runner import Runner
from dspark.engine.sequence import Batch, Decode, Prefill, RequestRecord, Sequence

GAMMA, SLOTS, MAX_LEN, BLOCKS = 4, 12, 100, 90
VOCAB_SIZE = 50
SPARE = BLOCKS


@dataclass
class Case:
    """A plan, what the CPU's runner makes of it, and the state and plan on the device."""

    batch: Batch
    cpu: Any
    lengths: np.ndarray[Any, Any]
    state: DeviceState
    plans: StepPlans
    rows: int
    sampled: int


def random_case(seed: int) -> Case:
    random = np.random.default_rng(seed)
    runner = Runner(
        SimpleNamespace(head_weight=torch.zeros(1, 16)),  # type: ignore[arg-type]
        SimpleNamespace(block_size=GAMMA, forget=lambda _: None),  # type: ignore[arg-type]
        NoiseCache(VOCAB_SIZE),
        frozenset({2}),
        "coupled",
        GAMMA,
    )
    free = random.permutation(BLOCKS).tolist()
    sequences = []
    for number in range(int(random.integers(1, SLOTS + 1))):
        length = int(random.integers(2, 60))
        request = Request(
            tuple(random.integers(3, VOCAB_SIZE, length).tolist()), SamplingParams(temperature=number % 2)
        )
        record = RequestRecord(request, RequestFacts(length, 0.0))
        sequence = Sequence(number, record, 0, 2**63 + number, 30, None, list(request.prompt_token_ids), length, b"")
        sequence.blocks = [free.pop() for _ in range(blocks_for(length + GAMMA + 1))]
        sequences.append(sequence)
    decoding = [sequence for sequence in sequences if random.random() < 0.7]
    decodes = [Decode(s, None, int(random.integers(0, GAMMA + 1)), None) for s in decoding]
    prefills = [random_chunk(random, s) for s in sequences if s not in decoding]
    batch = Batch(decodes, prefills, sequences, [], 0, 0, 0)
    budget = int(random.integers(0, sum(decode.cap for decode in decodes) + 2))
    state = DeviceState.empty(torch.device("cpu"), SLOTS, GAMMA, blocks_for(MAX_LEN))
    plans = StepPlans(state, GAMMA, 1000, 2, frozenset({2}))
    table = CalibrationTable(np.ones((2, GAMMA), np.float32), np.zeros((2, GAMMA), np.float32))
    caps = [decode.cap for decode in decodes]
    allocation: Any = SimpleNamespace(budget=budget)
    sizes = plans.upload(0, batch, allocation, table, caps, [], [GAMMA] * len(sequences))
    runner._update_states(batch)
    survival = np.zeros((len(decodes), GAMMA), np.float32)
    for i, slot in enumerate(plans.slots_of([decode.sequence for decode in decodes])):
        drafts = random.integers(3, VOCAB_SIZE, GAMMA)
        survival[i] = np.sort(random.choice([0.1, 0.3, 0.5, 0.9], GAMMA))[::-1]
        runner._states[decodes[i].sequence.id].drafts = drafts
        state.drafts[slot], state.draft_count[slot] = torch.from_numpy(drafts), GAMMA
        state.survival[slot] = torch.from_numpy(survival[i])
    lengths = fill_budget(survival, np.array(caps, np.int32), budget)
    return Case(batch, runner._flatten(batch, lengths), lengths, state, plans, sizes.rows, sizes.sampled)


def random_chunk(random: np.random.Generator, sequence: Sequence) -> Prefill:
    start = int(random.integers(0, sequence.prompt_len))
    count = int(random.integers(1, sequence.prompt_len - start + 1))
    return Prefill(sequence, start, count, start + count == sequence.prompt_len)


def on_device(case: Case, rows: int, sampled: int, sequences: int) -> Any:
    return flatten(case.state, case.plans.device, host_fill_budget, rows, sampled, sequences, SPARE)


@pytest.mark.parametrize("seed", range(40))
def test_the_device_makes_the_same_batch(seed: int) -> None:
    case = random_case(seed)
    count, rows = len(case.batch.sequences), len(case.cpu.token_ids)
    flat, sampled = on_device(case, case.rows + seed % 3, case.sampled + seed % 2, count)
    for name in ("token_ids", "positions", "slots"):
        np.testing.assert_array_equal(getattr(flat, name)[:rows], getattr(case.cpu, name))
    np.testing.assert_array_equal(flat.row_starts, case.cpu.row_starts)
    np.testing.assert_array_equal(flat.first_positions, case.cpu.first_positions)
    for sequence, table in zip(case.batch.sequences, flat.block_tables, strict=True):
        assert table[: len(sequence.blocks)].tolist() == sequence.blocks
    counts = [*(case.lengths + 1).tolist(), *(int(prefill.ends) for prefill in case.batch.prefills)]
    np.testing.assert_array_equal(sampled.starts, np.cumsum([0, *counts]))
    expected = wanted_rows(case)
    np.testing.assert_array_equal(sampled.rows[: len(expected)], expected)
    np.testing.assert_array_equal(sampled.positions[: len(expected)], case.cpu.positions[expected] + 1)
    np.testing.assert_array_equal(sampled.fed[: len(expected)], case.cpu.token_ids[expected])


def wanted_rows(case: Case) -> list[int]:
    starts = case.cpu.row_starts.tolist()
    decodes = len(case.batch.decodes)
    ends = [starts[i + 1] - 1 for i, prefill in enumerate(case.batch.prefills, decodes) if prefill.ends]
    return [*range(starts[decodes]), *ends]


def test_the_plans_hold_decodes_and_chunks_with_and_without_an_end() -> None:
    batches = [random_case(seed).batch for seed in range(40)]
    assert any(batch.decodes and batch.prefills for batch in batches)
    assert any(not batch.prefills for batch in batches)
    assert {prefill.ends for batch in batches for prefill in batch.prefills} == {True, False}


@pytest.mark.parametrize("seed", range(5))
def test_padding_changes_nothing_and_writes_to_the_spare_block_only(seed: int) -> None:
    case = random_case(seed)
    rows, count = len(case.cpu.token_ids), len(case.batch.sequences)
    flat, sampled = on_device(case, case.rows + 9, case.sampled + 9, SLOTS)
    np.testing.assert_array_equal(flat.token_ids[:rows], case.cpu.token_ids)
    assert (flat.slots[rows:] // BLOCK_SIZE == SPARE).all()
    assert (flat.slots[:rows] // BLOCK_SIZE != SPARE).all()
    assert (flat.positions[rows:] == 0).all()
    assert (flat.row_starts[count:] == rows).all()
    assert (sampled.starts[count:] == len(wanted_rows(case))).all()


def test_what_the_device_knows_better_cuts_the_plan() -> None:
    case = random_case(3)
    decodes = case.batch.decodes
    assert len(decodes) >= 3
    ended, short, undrafted = case.plans.slots_of([decode.sequence for decode in decodes[:3]])
    case.state.ended[ended] = True
    case.state.max_length[short] = case.state.length[short] + 2  # one draft and the token behind it
    case.state.draft_count[undrafted] = 0
    case.plans.device["caps"][:3] = GAMMA
    case.plans.device["budget"][0] = 100
    flat, sampled = on_device(case, 200, 200, len(case.batch.sequences))
    assert (flat.row_starts[1:4] - flat.row_starts[:3]).tolist() == [0, 2, 1]
    assert (sampled.starts[1:4] - sampled.starts[:3]).tolist() == [0, 2, 1]

from __future__ import annotations

import pytest
import torch

from dspark.engine.errors import EngineFailedError
from dspark.engine.gpu.state import DeviceState, SlotMap

CPU = torch.device("cpu")
GAMMA = 3


def two_sequences() -> DeviceState:
    """Slot 0 is 5 tokens long and ends with token 9 or at 8 tokens, slot 1 is 7 long and has no end near."""
    state = DeviceState.empty(CPU, 2, GAMMA, 4)
    state.length[:2] = torch.tensor([5, 7], dtype=torch.int32)
    state.max_length[:2] = torch.tensor([8, 100], dtype=torch.int32)
    state.stop_ids[0, :2] = torch.tensor([4, 9])
    state.draft_count[:2] = GAMMA
    return state


def take_in(state: DeviceState, tokens: list[list[int]]) -> None:
    """The rounds of slots 0 and 1, and of a padding sequence."""
    padded = [[*round_, *[0] * (GAMMA + 1 - len(round_))] for round_ in (*tokens, [])]
    counts = torch.tensor([len(round_) for round_ in (*tokens, [])], dtype=torch.int32)
    state.take_in(torch.tensor([0, 1, state.padding_slot]), torch.tensor(padded), counts)


def test_a_round_makes_a_sequence_longer_and_leaves_it_without_drafts() -> None:
    state = two_sequences()
    take_in(state, [[7], [3, 5, 6]])
    assert state.length.tolist() == [6, 10, 1]
    assert state.anchor.tolist() == [7, 6, 0]
    assert state.draft_count.tolist() == [0, 0, 0]
    assert state.ended.tolist() == [False, False, False]


def test_a_sequence_without_a_round_and_padding_stay_as_they_are() -> None:
    state = two_sequences()
    take_in(state, [[], [3]])
    assert state.length.tolist() == [5, 8, 1]
    assert state.anchor.tolist() == [0, 3, 0]
    assert not state.ended.any()


@pytest.mark.parametrize("tokens", [[9], [3, 9, 5], [1, 1, 4], [1, 2, 3]], ids=str)
def test_a_stop_token_anywhere_in_the_round_or_the_longest_length_ends_it(tokens: list[int]) -> None:
    state = two_sequences()
    take_in(state, [tokens, [9]])
    assert state.ended.tolist() == [True, False, False]


def test_tokens_behind_those_given_do_not_end_it() -> None:
    state = two_sequences()
    state.take_in(torch.tensor([0]), torch.tensor([[1, 9, 4, 0]]), torch.tensor([1], dtype=torch.int32))
    assert not state.ended[0]


def test_block_tables_are_changed_where_the_host_says() -> None:
    state = two_sequences()
    state.edit_tables(torch.tensor([[1, 5], [4, 7]]))
    assert state.block_tables.tolist() == [[0, 5, 0, 0], [7, 0, 0, 0], [0, 0, 0, 0]]


def test_a_sequence_keeps_its_slot_until_it_leaves() -> None:
    slots = SlotMap(2)
    first, second = slots.take(10), slots.take(11)
    assert {first, second} == {0, 1}
    assert slots.take(10) == first
    with pytest.raises(EngineFailedError, match="all 2 slots"):
        slots.take(12)
    slots.release(10)
    slots.release(10)
    assert slots.take(12) == first
    assert slots.of([12, 11]) == [first, second]

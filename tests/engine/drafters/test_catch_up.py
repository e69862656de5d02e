"""Context validity by content: what may be taken as computed, what is computed next, and in what order."""

from __future__ import annotations

import numpy as np
import pytest
from draft_sequences import KV_BLOCK_SIZE, DraftSequence, blocks_before
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import empty

from dspark.engine.drafters.catch_up import CatchUp
from dspark.engine.kv_cache import KVCache, block_name

BUDGET, ROUND = 40, 4


def sequence(id: int, tokens: list[int], blocks: list[int]) -> DraftSequence:
    return DraftSequence(id, tokens, blocks, empty(0, 0))


def a_text(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


@pytest.fixture
def catch_up() -> CatchUp:
    made = CatchUp(BUDGET, ROUND)
    made.allocate(KV_BLOCK_SIZE)
    return made


def compute(catch_up: CatchUp, *sequences: DraftSequence) -> list[tuple[int, int, bool]]:
    """One call: (start, end, ready) of each sequence."""
    rows = [s.row() for s in sequences]
    chunks = catch_up.plan(rows)
    catch_up.computed(rows, chunks)
    return list(zip(chunks.starts.tolist(), chunks.ends.tolist(), chunks.ready.tolist(), strict=True))


def compute_all(catch_up: CatchUp, *sequences: DraftSequence) -> None:
    while not all(ready for _, _, ready in compute(catch_up, *sequences)):
        pass


def test_a_long_context_is_computed_in_chunks_of_the_budget_and_then_kept(catch_up: CatchUp) -> None:
    s = sequence(0, a_text(101), [3, 1, 4, 5, 9, 2, 6])
    assert [compute(catch_up, s)[0] for _ in range(4)] == [
        (0, 40, False),
        (40, 80, False),
        (80, 100, True),
        (100, 100, True),
    ]


def test_the_oldest_sequence_gets_the_budget_and_the_others_a_rounds_worth(catch_up: CatchUp) -> None:
    young, old = sequence(8, a_text(101), [0, 1, 2, 3, 4, 5, 6]), sequence(5, a_text(61, 500), [10, 11, 12, 13])
    assert compute(catch_up, young, old) == [(0, 4, False), (0, 36, False)]
    assert compute(catch_up, young, old) == [(4, 20, False), (36, 60, True)]


def test_sequences_that_lag_by_a_round_are_all_ready_however_many_they_are(catch_up: CatchUp) -> None:
    many = [sequence(i, a_text(20, 100 * i), [2 * i, 2 * i + 1]) for i in range(30)]
    compute_all(catch_up, *many)
    for s in many:
        s.tokens += [1, 2, 3, 4]
    assert compute(catch_up, *many) == [(19, 23, True)] * 30


def test_a_drafted_token_that_came_true_is_not_computed_again(catch_up: CatchUp) -> None:
    s = sequence(0, a_text(21), [0, 1])
    compute_all(catch_up, s)
    catch_up.drafted(s.row(), np.array([20, 21, 22, 99], np.int64))  # the anchor is 20
    s.tokens += [21, 22, 23, 24]
    assert compute(catch_up, s) == [(23, 24, True)]


def test_a_rejected_draft_is_computed_again_and_so_is_all_behind_it(catch_up: CatchUp) -> None:
    s = sequence(0, a_text(21), [0, 1])
    compute_all(catch_up, s)
    catch_up.drafted(s.row(), np.array([20, 99, 22, 23], np.int64))
    s.tokens += [21, 22, 23]
    assert compute(catch_up, s) == [(21, 23, True)]


def test_drafts_behind_the_sequences_own_blocks_are_computed_again(catch_up: CatchUp) -> None:
    s = sequence(0, a_text(31), [0, 1])
    compute_all(catch_up, s)
    catch_up.drafted(s.row(), np.array([30, 31, 32, 33], np.int64))
    s.tokens += [31, 32, 33, 34]
    s.blocks += [2]
    assert compute(catch_up, s) == [(32, 34, True)]


def test_an_anchor_that_was_drafted_is_still_read_anew(catch_up: CatchUp) -> None:
    """Its K/V would be there, but its logits are wanted."""
    s = sequence(0, a_text(21), [0, 1])
    compute_all(catch_up, s)
    catch_up.drafted(s.row(), np.array([20, 21, 22, 23], np.int64))
    s.tokens += [21]  # the target's own token was the first draft, of which none was verified
    assert compute(catch_up, s) == [(21, 21, True)]


def test_a_prefix_that_another_sequence_computed_is_valid(catch_up: CatchUp) -> None:
    compute_all(catch_up, sequence(0, a_text(50), [0, 1, 2, 3]))
    assert compute(catch_up, sequence(1, [*a_text(40), 7, 7], [0, 1, 9])) == [(32, 41, True)]


def test_a_shared_prefix_that_nobody_computed_is_not(catch_up: CatchUp) -> None:
    assert compute(catch_up, sequence(1, a_text(34), [0, 1, 9])) == [(0, 33, True)]


def test_a_preempted_sequence_finds_its_full_blocks_again_where_they_are_still_its_own(catch_up: CatchUp) -> None:
    compute_all(catch_up, sequence(0, a_text(50), [0, 1, 2, 3]))
    catch_up.forget(0)
    compute_all(catch_up, sequence(1, a_text(20, 900), [2, 5]))  # took block 2 meanwhile
    assert compute(catch_up, sequence(0, a_text(50), [0, 1, 8, 9])) == [(32, 49, True)]


def test_a_reused_block_is_not_taken_for_what_it_held(catch_up: CatchUp) -> None:
    compute_all(catch_up, sequence(0, a_text(33), [0, 1, 2]))
    catch_up.forget(0)
    assert compute(catch_up, sequence(1, a_text(33, 700), [0, 1, 2])) == [(0, 32, True)]


def test_the_same_tokens_behind_another_prefix_are_another_block(catch_up: CatchUp) -> None:
    same = a_text(16, 300)
    compute_all(catch_up, sequence(0, [*a_text(16), *same, 5], [0, 1, 2]))
    assert compute(catch_up, sequence(1, [*a_text(16, 100), *same, 5], [4, 1, 6])) == [(0, 32, True)]


def test_a_block_that_is_only_partly_rewritten_is_valid_for_nobody(catch_up: CatchUp) -> None:
    first = sequence(0, a_text(33), [0, 1, 2])
    compute_all(catch_up, first)
    catch_up.forget(0)
    assert compute(catch_up, sequence(1, a_text(60, 700), [5, 6, 1, 7])) == [(0, 40, False)]
    catch_up.forget(1)
    assert compute(catch_up, first) == [(16, 32, True)]


def test_a_block_that_drafting_wrote_into_is_valid_for_nobody(catch_up: CatchUp) -> None:
    first = sequence(0, a_text(33), [0, 1, 2])
    compute_all(catch_up, first)
    catch_up.forget(0)
    drafting = sequence(1, a_text(17, 700), [7, 1])  # block 1 is where its anchor is
    compute_all(catch_up, drafting)
    catch_up.drafted(drafting.row(), np.array([716, 1, 2], np.int64))
    catch_up.forget(1)
    assert compute(catch_up, first) == [(16, 32, True)]


def test_an_overwritten_block_is_computed_again(catch_up: CatchUp) -> None:
    s = sequence(0, a_text(49), [0, 1, 2, 3])
    compute_all(catch_up, s)
    catch_up.forget(0)
    catch_up.overwrite([1])
    assert compute(catch_up, s) == [(16, 48, True)]


class Pool:
    """A real block pool, and of each slot the tokens that its K/V were computed from."""

    def __init__(self) -> None:
        self.cache = KVCache(6)
        self.held: dict[int, tuple[int, ...]] = {}

    def start(self, id: int, tokens: list[int]) -> DraftSequence | None:
        """A sequence whose tokens but the last are computed by the target, its prefix shared where it is cached."""
        shared = self.cache.find(self.names(tokens, (len(tokens) - 1) // KV_BLOCK_SIZE))
        self.cache.share(shared)
        started = sequence(id, tokens, list(shared))
        return started if self.cover(started) else None

    def cover(self, s: DraftSequence) -> bool:
        """Blocks for all before the anchor, the full ones published; False, and all given back, without enough."""
        fresh = self.cache.allocate(max(0, blocks_before(s.position) - len(s.blocks)))
        if fresh is None:
            self.stop(s)
            return False
        s.blocks += fresh
        for block, name in zip(s.blocks, self.names(s.tokens, s.position // KV_BLOCK_SIZE), strict=False):
            self.cache.publish(block, name)
        return True

    def stop(self, s: DraftSequence) -> None:
        self.cache.release(s.blocks)

    def write(self, s: DraftSequence, text: list[int], start: int, end: int) -> None:
        for slot, p in zip(s.slots(start, end).tolist(), range(start, end), strict=True):
            self.held[slot] = tuple(text[: p + 1])

    @staticmethod
    def names(tokens: list[int], count: int) -> list[bytes]:
        names = [b""]
        for start in range(0, count * KV_BLOCK_SIZE, KV_BLOCK_SIZE):
            names.append(block_name(names[-1], np.array(tokens[start : start + KV_BLOCK_SIZE], np.int64)))
        return names[1:]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_every_position_before_a_ready_anchor_holds_the_sequences_own_kv(data: st.DataObject) -> None:
    """However sequences come, go, share, are drafted for or not, and blocks are evicted and used again."""
    catch_up, pool = CatchUp(BUDGET, ROUND), Pool()
    catch_up.allocate(KV_BLOCK_SIZE)
    running: list[DraftSequence] = []
    for step in range(data.draw(st.integers(5, 25), label="steps")):
        if running and data.draw(st.booleans(), label="one stops"):
            gone = running.pop(data.draw(st.integers(0, len(running) - 1)))
            catch_up.forget(gone.id)
            pool.stop(gone)
        # few texts, so that prefixes come again; they part at the first token of a block
        length = data.draw(st.integers(2, 50), label="length")
        tokens = [data.draw(st.sampled_from([0, 1])) if p % KV_BLOCK_SIZE == 0 else p for p in range(length)]
        started = pool.start(step, tokens)
        running += [started] if started else []
        drafting = [s for s in running if data.draw(st.booleans(), label="is drafted for")]
        rows = [s.row() for s in drafting]
        chunks = catch_up.plan(rows)
        for s, start, end in zip(drafting, chunks.starts.tolist(), chunks.ends.tolist(), strict=True):
            pool.write(s, s.tokens, start, end)
        catch_up.computed(rows, chunks)
        for s, row, ready in zip(drafting, rows, chunks.ready.tolist(), strict=True):
            if ready:
                own = [pool.held[slot] for slot in s.slots(0, s.position).tolist()]
                assert own == [tuple(s.tokens[: p + 1]) for p in range(s.position)]
                drafts = [3, 4]
                end = min(s.position + 1 + len(drafts), len(s.blocks) * KV_BLOCK_SIZE)
                pool.write(s, s.tokens + drafts, s.position, end)
                catch_up.drafted(row, np.array([s.tokens[-1], *drafts], np.int64))
        for s in list(running):
            s.tokens += data.draw(st.sampled_from([[3], [3, 4], [3, 4, 5], [9], [3, 9]]), label="goes on with")
            if not pool.cover(s):
                catch_up.forget(s.id)
                running.remove(s)

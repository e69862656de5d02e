"""Every block is used, cached or free; nothing leaks, and cached blocks go oldest first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dspark.engine.kv_cache import BLOCK_SIZE, KVCache, block_name, blocks_for

NUM_BLOCKS = 8
NAMES = [f"name {i}".encode() for i in range(6)]


def take(cache: KVCache, count: int) -> list[int]:
    blocks = cache.allocate(count)
    assert blocks is not None
    return blocks


def cached_chain(cache: KVCache, names: list[bytes]) -> list[int]:
    """Blocks that a finished sequence left behind, one for each name."""
    blocks = take(cache, len(names))
    for block, name in zip(blocks, names, strict=True):
        cache.publish(block, name)
    cache.release(blocks)
    return blocks


def test_a_block_holds_sixteen_positions() -> None:
    assert BLOCK_SIZE == 16
    assert [blocks_for(tokens) for tokens in (0, 1, 15, 16, 17, 32, 33)] == [0, 1, 1, 1, 2, 2, 3]


def test_a_name_depends_on_the_tokens_and_on_everything_before_them() -> None:
    tokens = np.arange(BLOCK_SIZE, dtype=np.int64)
    name = block_name(b"tenant", tokens)
    assert name == block_name(b"tenant", tokens.copy())
    assert len({name, block_name(b"other", tokens), block_name(b"tenant", tokens[::-1]), block_name(name, tokens)}) == 4


def test_a_new_cache_is_free() -> None:
    cache = KVCache(NUM_BLOCKS)
    assert (cache.used, cache.cached, cache.free, cache.available) == (0, 0, NUM_BLOCKS, NUM_BLOCKS)
    cache.check()


def test_too_large_a_request_takes_and_evicts_nothing() -> None:
    cache = KVCache(NUM_BLOCKS)
    cached_chain(cache, NAMES[:3])
    held = take(cache, 2)
    assert cache.allocate(NUM_BLOCKS - 1) is None
    assert (cache.used, cache.cached, cache.evicted_total) == (2, 3, 0)
    assert len(cache.find(NAMES[:3])) == 3
    cache.check([held])


def test_free_blocks_are_taken_before_cached_ones() -> None:
    cache = KVCache(NUM_BLOCKS)
    kept = cached_chain(cache, NAMES[:3])
    take(cache, NUM_BLOCKS - 3)
    assert cache.evicted_total == 0
    assert cache.find(NAMES[:3]) == kept


def test_the_longest_unused_chain_is_evicted_first_and_its_end_before_its_beginning() -> None:
    cache = KVCache(4)
    first, second = cached_chain(cache, NAMES[:2]), cached_chain(cache, NAMES[2:4])
    assert [take(cache, 1)[0] for _ in range(4)] == [first[1], first[0], second[1], second[0]]
    assert cache.evicted_total == 4
    assert cache.find(NAMES[:1]) == []


def test_use_makes_a_cached_block_young_again() -> None:
    cache = KVCache(4)
    first, second = cached_chain(cache, NAMES[:2]), cached_chain(cache, NAMES[2:4])
    cache.share(first)
    cache.release(first)
    assert take(cache, 2) == [second[1], second[0]]


def test_a_shared_block_cannot_be_evicted_and_outlives_either_owner() -> None:
    cache = KVCache(2)
    blocks = take(cache, 1)
    cache.publish(blocks[0], NAMES[0])
    cache.share(cache.find(NAMES[:1]))
    cache.release(blocks)
    assert cache.allocate(2) is None
    cache.check([blocks])
    cache.release(blocks)
    assert cache.cached == 1


def test_finding_stops_at_the_first_name_that_is_not_here() -> None:
    cache = KVCache(NUM_BLOCKS)
    blocks = cached_chain(cache, NAMES[:3])
    assert cache.find(NAMES) == blocks
    assert cache.find([NAMES[0], NAMES[5], NAMES[1]]) == blocks[:1]
    assert cache.find(NAMES[5:]) == []


def test_finding_takes_nothing() -> None:
    cache = KVCache(NUM_BLOCKS)
    cached_chain(cache, NAMES[:3])
    cache.find(NAMES[:3])
    assert (cache.used, cache.cached) == (0, 3)


def test_cached_among_counts_what_sharing_would_take_from_the_available() -> None:
    cache = KVCache(NUM_BLOCKS)
    blocks = cached_chain(cache, NAMES[:3])
    cache.share(blocks[:1])
    before = cache.available
    assert cache.cached_among(blocks) == 2
    cache.share(blocks)
    assert before - cache.available == 2


def test_a_second_block_of_a_name_stays_unnamed_and_becomes_free() -> None:
    cache = KVCache(NUM_BLOCKS)
    first, second = take(cache, 2)
    cache.publish(first, NAMES[0])
    cache.publish(second, NAMES[0])
    assert cache.find(NAMES[:1]) == [first]
    cache.release([first, second])
    assert (cache.cached, cache.free) == (1, NUM_BLOCKS - 1)


def test_check_notices_a_leak_and_a_block_freed_too_early() -> None:
    cache = KVCache(NUM_BLOCKS)
    held = take(cache, 2)
    with pytest.raises(AssertionError, match="reference counts"):
        cache.check()
    cache.release(held[:1])
    with pytest.raises(AssertionError, match="reference counts"):
        cache.check([held])


class Histories(RuleBasedStateMachine):
    """Any history of sequences that grow, publish, share and end, beside a model made of plain lists."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = KVCache(NUM_BLOCKS)
        self.tables: list[list[int]] = []
        self.names: dict[int, bytes] = {}
        self.cached: list[int] = []  # oldest first
        self.evicted = 0

    def used(self) -> set[int]:
        return {block for table in self.tables for block in table}

    @rule(count=st.integers(0, NUM_BLOCKS + 1), which=st.integers(0, 3))
    def allocate(self, count: int, which: int) -> None:
        """For sequence `which`, or for a new one when there is none of that number."""
        used = self.used()
        blocks = self.cache.allocate(count)
        if count > NUM_BLOCKS - len(used):
            assert blocks is None
            return
        assert blocks is not None
        assert len(set(blocks)) == len(blocks) == count
        assert not used & set(blocks)
        evictions = max(0, count - (NUM_BLOCKS - len(used) - len(self.cached)))
        evicted, self.cached = self.cached[:evictions], self.cached[evictions:]
        assert set(blocks) & (set(evicted) | set(self.cached)) == set(evicted)
        for block in evicted:
            del self.names[block]
        self.evicted += evictions
        if which < len(self.tables):
            self.tables[which].extend(blocks)
        else:
            self.tables.append(blocks)

    @precondition(lambda self: self.used())
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def publish(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from(sorted(self.used())))
        self.cache.publish(block, name)
        if name not in self.names.values():
            self.names.setdefault(block, name)

    @rule(names=st.permutations(NAMES))
    def start_with_a_shared_prefix(self, names: list[bytes]) -> None:
        by_name = {name: block for block, name in self.names.items()}
        known = next((i for i, name in enumerate(names) if name not in by_name), len(names))
        found = self.cache.find(names)
        assert found == [by_name[name] for name in names[:known]]
        assert self.cache.cached_among(found) == len(set(found) & set(self.cached))
        self.cache.share(found)
        self.cached = [block for block in self.cached if block not in found]
        self.tables.append(found)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.cache.release(table)
        self.cached += [block for block in reversed(table) if block in self.names and block not in self.used()]

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def give_back_the_last_block(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from([table for table in self.tables if table]))
        block = table.pop()
        self.cache.release([block])
        if block in self.names and block not in self.used():
            self.cached.append(block)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.cache.check(self.tables)
        assert self.cache.used == len(self.used())
        assert self.cache.cached == len(self.cached)
        assert self.cache.free == NUM_BLOCKS - len(self.used()) - len(self.cached)
        assert self.cache.available == self.cache.free + self.cache.cached
        assert self.cache.evicted_total == self.evicted


TestHistories = Histories.TestCase
TestHistories.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)

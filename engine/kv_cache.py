"""Who owns which KV block, and which full blocks can be shared.

A block holds BLOCK_SIZE positions of one or more sequences. It is in exactly one state:
    used    referenced by at least one running sequence
    cached  full, referenced by none, kept for a later prompt with the same prefix; evicted oldest first
    free
A full block of committed tokens is named by the hash chain of its token ids from the tenant's salt on, so equal names
mean equal K/V, the drafter's context K/V included (they live under the same block ids).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

BLOCK_SIZE = 16
"""Positions of one block; the kernels' vector width."""


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def block_name(parent: bytes, token_ids: NDArray[np.int64]) -> bytes:
    """Name of a full block: its token ids after a `parent` (the salt's hash for the first)."""
    return hashlib.blake2b(parent + token_ids.tobytes(), digest_size=16).digest()


class KVCache:
    """Block accounting only; no tensor. One thread."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.evicted_total = 0
        self._references = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._by_name: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # named blocks without a reference, oldest use first

    @property
    def used(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def cached(self) -> int:
        return len(self._cached)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def available(self) -> int:
        """Blocks that `allocate` can give."""
        return len(self._free) + len(self._cached)

    def allocate(self, count: int) -> list[int] | None:
        """Take `count` blocks, evicting cached ones as needed; None, and nothing taken, when there are too few."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            del self._by_name[self._names.pop(block)]
            self.evicted_total += 1
        self._references[block] = 1
        return block

    def find(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of `names` that is here; nothing is taken."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def cached_among(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are cached, so that sharing them lowers `available`."""
        return sum(block in self._cached for block in blocks)

    def share(self, blocks: Sequence[int]) -> None:
        """Add a reference to each."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def publish(self, block: int, name: bytes) -> None:
        """The used block is full and committed: later prompts may share it. A second block of a name stays unnamed."""
        if name not in self._by_name and block not in self._names:
            self._by_name[name] = block
            self._names[block] = name

    def unnamed(self, blocks: Sequence[int]) -> list[int]:
        """Those of `blocks` that no prompt can find."""
        return [block for block in blocks if block not in self._names]

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a reference to each; the last one makes a block cached (named) or free. The end is evicted first."""
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._names:
                    self._cached[block] = None
                else:
                    self._free.append(block)

    def check(self, held: Sequence[Sequence[int]] = ()) -> None:
        """Raise AssertionError unless every block is in one state and references are exactly those of `held` tables."""
        expected = [0] * self.num_blocks
        for table in held:
            for block in table:
                expected[block] += 1
        idle = [block for block, count in enumerate(expected) if count == 0]
        promises = {
            "reference counts differ from the sequences' block tables": self._references == expected,
            "a block without references is neither free nor cached": sorted([*self._free, *self._cached]) == idle,
            "names do not match": self._by_name == {name: block for block, name in self._names.items()},
            "two blocks have one name": len(self._by_name) == len(self._names),
            "a cached block has no name": self._names.keys() >= self._cached.keys(),
        }
        for broken, kept in promises.items():
            if not kept:  # no assert statement: the pool is checked after a failed step, also under `python -O`
                raise AssertionError(broken)

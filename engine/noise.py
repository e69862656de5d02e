"""The Gumbel noise of a sequence at a position, shared by target and drafter, and kept while it may be asked for again.

A rejected position is sampled again in the next round with the same noise, and the drafter draws with the noise that
the target will use; so each row is made once and dropped when its position is behind the sequence.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from dspark.kernels.gumbel_noise import gumbel_noise


class Stream(IntEnum):
    """Independent noises of one sequence and position."""

    COUPLED = 0
    DRAFT = 1  # rejection mode: the drafter's draws
    ACCEPT = 2  # rejection mode: accept or reject
    RESIDUAL = 3  # rejection mode: the token in place of a rejected draft


def sequence_key(seed: int, choice: int, prompt: NDArray[np.int64]) -> int:
    """64-bit key H(seed, choice index, prompt ids): choices differ, and so do prompts under one seed."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update((seed & 0xFFFFFFFFFFFFFFFF).to_bytes(8, "little") + choice.to_bytes(4, "little"))
    digest.update(prompt.tobytes())
    return int.from_bytes(digest.digest(), "little")


class NoiseCache:
    """Rows of coupled noise by (key, position)."""

    def __init__(self, vocab_size: int, max_bytes: int = 256 << 20) -> None:
        """Rows beyond `max_bytes` are made anew each time they are asked for."""
        self.vocab_size = vocab_size
        self._max_rows = max_bytes // (4 * vocab_size)
        self._rows: dict[int, dict[int, NDArray[np.float32]]] = {}
        self._count = 0

    def rows(self, keys: NDArray[np.uint64], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """keys, positions: [n] → [n, vocab] float32."""
        wanted = list(zip(keys.tolist(), positions.tolist(), strict=True))
        missing = [i for i, (key, position) in enumerate(wanted) if position not in self._rows.get(key, {})]
        made = gumbel_noise(keys[missing], positions[missing], np.zeros(len(missing), np.int64), self.vocab_size)
        if len(missing) == len(wanted):
            out = made
        else:
            out = np.empty((len(wanted), self.vocab_size), np.float32)
            out[missing] = made
            fresh = set(missing)
            for i, (key, position) in enumerate(wanted):
                if i not in fresh:
                    out[i] = self._rows[key][position]
        for i, row in zip(missing, made, strict=True):
            key, position = wanted[i]
            if self._count < self._max_rows and position not in self._rows.get(key, {}):  # equal requests share a key
                self._rows.setdefault(key, {})[position] = row.copy()
                self._count += 1
        return out

    def drop_before(self, key: int, position: int) -> None:
        """The sequence has passed everything below `position`."""
        kept = self._rows.get(key)
        if kept is not None:
            for old in [p for p in kept if p < position]:
                del kept[old]
                self._count -= 1

    def forget(self, key: int) -> None:
        self._count -= len(self._rows.pop(key, {}))

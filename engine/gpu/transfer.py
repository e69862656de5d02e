"""One copy to the device and one back per step: named fields that share one buffer.

The host's side is page-locked, so that a copy does not hold the host up; there are several of it, since a copy of an
earlier step may not have been made yet when the next step's fields are filled. The device's side is one buffer at one
address, as CUDA graphs want it: work on a stream is in order, so a step is done with it before the next is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ALIGNMENT = 8
"""Bytes; of the largest element."""

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Field:
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


class PackedBuffer:
    """`device[name]` are tensors, `host(turn)[name]` numpy arrays of the same fields."""

    def __init__(self, device: torch.device, fields: Mapping[str, Field], turns: int) -> None:
        """turns: host sides, used one after another. Only the last field may be copied in part."""
        self._starts: dict[str, int] = {}
        size = 0
        for name, field in fields.items():
            self._starts[name] = size
            size += -(-field.nbytes // ALIGNMENT) * ALIGNMENT
        self._size = size
        self._bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        self.device: Mapping[str, Tensor] = self._views(self._bytes, fields)
        pinned = device.type == "cuda"
        self._host_bytes = [torch.zeros(size, dtype=torch.uint8, pin_memory=pinned) for _ in range(turns)]
        self._hosts: list[Mapping[str, Array]] = [
            {name: view.numpy() for name, view in self._views(one, fields).items()} for one in self._host_bytes
        ]

    def _views(self, data: Tensor, fields: Mapping[str, Field]) -> dict[str, Tensor]:
        return {
            name: data[self._starts[name] : self._starts[name] + field.nbytes].view(field.dtype).view(field.shape)
            for name, field in fields.items()
        }

    def host(self, turn: int) -> Mapping[str, Array]:
        return self._hosts[turn % len(self._hosts)]

    def upload(self, turn: int, last: str, used_bytes: int) -> None:
        """Enqueue the copy to the device: all fields up to `last`, of which so many bytes."""
        end = self._starts[last] + used_bytes
        self._bytes[:end].copy_(self._host_bytes[turn % len(self._host_bytes)][:end], non_blocking=True)

    def download(self, turn: int) -> None:
        """Enqueue the copy of all fields from the device; whoever reads `host(turn)` waits for it first."""
        self._host_bytes[turn % len(self._host_bytes)].copy_(self._bytes, non_blocking=True)

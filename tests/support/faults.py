"""Target passes that raise, for engines that must live with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fakes import RunningEngine
from torch import Tensor

from dspark.engine.kv_cache import BLOCK_SIZE
from dspark.engine.models.decoder import Decoder, FlatBatch

Fault = Callable[[int, int], Exception | None]
"""(number of the pass, its rows) -> what it raises."""


class FaultyDecoder:
    """The real one, but a pass that raises has first made garbage of all that it was to write."""

    def __init__(self, decoder: Decoder, fault: Fault) -> None:
        self.fault = fault
        self.passes = 0
        self._decoder = decoder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._decoder, name)

    def forward(self, batch: FlatBatch, feature_layers: Sequence[int] = ()) -> tuple[Tensor, Tensor | None]:
        self.passes += 1
        error = self.fault(self.passes, len(batch.token_ids))
        if error is None:
            return self._decoder.forward(batch, feature_layers)
        blocks, offsets = torch.from_numpy(batch.slots // BLOCK_SIZE), torch.from_numpy(batch.slots % BLOCK_SIZE)
        for k_cache, v_cache in zip(self._decoder._k_caches, self._decoder._v_caches, strict=True):
            k_cache[blocks, :, :, offsets] = torch.nan
            v_cache[blocks, :, offsets] = torch.nan
        raise error


def with_faults(engine: RunningEngine, fault: Fault) -> FaultyDecoder:
    faulty = FaultyDecoder(engine.parts.runner.decoder, fault)
    engine.parts.runner.decoder = faulty  # type: ignore[assignment]
    return faulty


def at(*passes: int) -> Fault:
    return lambda number, rows: ArithmeticError("a pass is broken") if number in passes else None

"""Work that is captured once per size as a CUDA graph and replayed: one launch instead of hundreds.

A captured piece of work reads its inputs and leaves its results at fixed addresses, on the device: the plan's buffer,
the state and the download buffer. How rows divide among sequences is data there, so one graph serves every division.
Where nothing is captured for a size, or the device has no graphs, the same function runs as it is.

Never run: no CUDA device was at hand. What runs in the tests is the function.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None  # a handle whose type torch does not export

    def capture(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work` once as it is, which compiles what is not compiled yet, then capture it under `key`."""
        work()
        if self._device.type != "cuda":
            return
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            work()
        self._pool = graph.pool()  # one pool for all: only one runs at a time, and none leaves a result in it
        self._graphs[key] = graph

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Replay what was captured under `key`, or run `work`."""
        graph = self._graphs.get(key)
        if graph is None:
            work()
        else:
            graph.replay()

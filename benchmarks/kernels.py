"""Is every Triton kernel right on this card, and how far is it from the bytes that it has to move?

    python -m dspark.benchmarks.kernels [--model Qwen3-8B] [--repeats 50] [--json OUT]
    python -m dspark.benchmarks.kernels --computed

Test first, then time: at each shape of a step the kernel is held against its PyTorch reference on the same inputs; the first
that differs ends the run. Only then is anything timed: captured in a CUDA graph, as the server runs it, with CUDA events around
each replay and the L2 cache overwritten before it. The byte floor of a launch is `bytes_moved` of the kernel's file over the
bandwidth at which this card copied a gigabyte just before.

With --computed, and wherever torch sees no GPU, no kernel runs: it prints what each moves, and the least time of a step on some
cards from their published bandwidths.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from dspark.benchmarks.byte_floor import CARDS, CONTEXT_TOKENS, ELEMENT, floor_steps, floor_table
from dspark.benchmarks.kernel_cases import SHAPES, Inputs, KernelCase, Shape
from dspark.benchmarks.load import align, positive
from dspark.benchmarks.machine import describe_machine
from dspark.benchmarks.model_kernel_cases import MODEL_KERNELS
from dspark.benchmarks.overhead import Spread
from dspark.benchmarks.qwen3 import MODELS, Model
from dspark.benchmarks.step_kernel_cases import STEP_KERNELS

KERNELS = (*MODEL_KERNELS, *STEP_KERNELS)
COPIED_BYTES = 1 << 30
WARM_UPS = 3


class KernelDiffersError(Exception):
    """A kernel does not give what its reference gives."""


def check(model: Model, kernel: KernelCase, shape: Shape, inputs: Inputs) -> None:
    """Raises KernelDiffersError naming kernel, shape and what differs."""
    try:
        kernel.prepare(model, shape, inputs).check()
    except AssertionError as difference:
        raise KernelDiffersError(
            f"{kernel.name} at {shape.name}: not what its reference gives on {inputs.device}; nothing was timed\n"
            f"{difference}"
        ) from difference


def pairs() -> Iterator[tuple[KernelCase, Shape]]:
    return ((kernel, shape) for kernel in KERNELS for shape in SHAPES if kernel.takes(shape))


class Stopwatch:
    """Times captured launches on a CUDA device, the L2 cache cold."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._repeats = repeats
        cache_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._evict = torch.empty(max(4 * cache_bytes, 256 << 20), dtype=torch.uint8, device=device)

    def us(self, run: Callable[[], object]) -> Spread:
        """Microseconds of one run: median, least and most."""
        for _ in range(WARM_UPS):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        times = []
        for _ in range(WARM_UPS + self._repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._evict.zero_()
            begin.record()
            graph.replay()
            end.record()
            times.append((begin, end))
        torch.cuda.synchronize()
        return Spread.of([1e3 * begin.elapsed_time(end) for begin, end in times[WARM_UPS:]])

    def copy_gb_per_s(self) -> float:
        """Bytes read and written per second by a copy of a gigabyte."""
        source = torch.empty(COPIED_BYTES, dtype=torch.uint8, device=self._evict.device)
        target = torch.empty_like(source)
        return 2 * COPIED_BYTES / self.us(lambda: target.copy_(source)).median / 1e3


@dataclass(frozen=True, slots=True)
class Timing:
    """bytes_moved: 0 where bytes are not what it waits for."""

    kernel: str
    shape: str
    bytes_moved: int
    us: Spread

    def floor_us(self, gb_per_s: float) -> float:
        return self.bytes_moved / gb_per_s / 1e3


def timing_table(timings: list[Timing], gb_per_s: float) -> str:
    rows = [["kernel", "shape", "MB", "us (min-max)", "floor us", "÷ floor"]]
    for one in timings:
        floor_us = one.floor_us(gb_per_s)
        share = [f"{floor_us:.2f}", f"{one.us.median / floor_us:.2f}"] if one.bytes_moved else ["-", "-"]
        rows.append([one.kernel, one.shape, f"{one.bytes_moved / 1e6:.3f}", str(one.us), *share])
    return align(rows)


def bytes_table(model: Model) -> str:
    """Megabytes of one launch, by kernel and shape."""
    rows = [["MB a launch", *(shape.name for shape in SHAPES)]]
    for kernel in KERNELS:
        if kernel.bytes_moved is not None:
            cells = [
                f"{kernel.bytes_moved(model, shape, ELEMENT) / 1e6:.4g}" if kernel.takes(shape) else "-"
                for shape in SHAPES
            ]
            rows.append([kernel.name, *cells])
    return align(rows)


def computed(model: Model) -> tuple[str, dict[str, object]]:
    steps = floor_steps()
    bandwidths = ", ".join(f"{card.name} {card.gb_per_s:,.0f} GB/s and {card.gb:g} GB" for card in CARDS)
    text = (
        f"Computed, not measured: what each kernel moves at {model.name}'s shapes in bfloat16, {SHAPES[0].context} tokens of "
        "context;\n"
        f"draft_attention, markov_block and fill_budget for as many sequences, blocks of {model.draft.block_size}.\n\n"
        f"{bytes_table(model)}\n\n"
        f"Computed, not measured: the least time of a step in bfloat16, {CONTEXT_TOKENS} tokens of context, bytes ÷ published "
        "bandwidth\n"
        f"({bandwidths}, 1e9 bytes).\n"
        "held: weights and K/V that must be in memory; no room: they do not fit, activations and graphs not counted.\n\n"
        f"{floor_table(steps)}"
    )
    moved = {
        kernel.name: {s.name: kernel.bytes_moved(model, s, ELEMENT) for s in SHAPES if kernel.takes(s)}
        for kernel in KERNELS
        if kernel.bytes_moved is not None
    }
    facts: dict[str, object] = {"kind": "computed, not measured", "model": model.name, "bytes": moved}
    facts |= {
        "cards": [asdict(card) for card in CARDS],
        "steps": [asdict(s) | {"floor_ms": {c.name: s.floor_ms(c.gb_per_s) for c in CARDS}} for s in steps],
    }
    return text, facts


def check_all(model: Model, device: torch.device) -> None:
    """Raises KernelDiffersError."""
    for kernel, shape in pairs():
        check(model, kernel, shape, Inputs(device, torch.bfloat16))
        print(f"{kernel.name} at {shape.name}: as its reference", flush=True)


def time_all(model: Model, device: torch.device, us: Callable[[Callable[[], object]], Spread]) -> list[Timing]:
    """us: `Stopwatch.us`."""
    timings = []
    for kernel, shape in pairs():
        launch = kernel.prepare(model, shape, Inputs(device, torch.bfloat16))
        moved = 0 if kernel.bytes_moved is None else kernel.bytes_moved(model, shape, ELEMENT)
        timings.append(Timing(kernel.name, shape.name, moved, us(launch.run)))
    return timings


def measured(model: Model, device: torch.device, repeats: int) -> tuple[str, dict[str, object]]:
    """Raises KernelDiffersError."""
    check_all(model, device)
    watch = Stopwatch(device, repeats)
    gb_per_s = watch.copy_gb_per_s()
    timings = time_all(model, device, watch.us)
    name = torch.cuda.get_device_name(device)
    text = (
        f"{name}, {gb_per_s:.0f} GB/s copied (read + written); {model.name}'s shapes in bfloat16; medians of {repeats} "
        f"replays\n\n{timing_table(timings, gb_per_s)}"
    )
    facts = {"kind": "measured", "model": model.name, "gpu": name, "copy_gb_per_s": gb_per_s}
    return text, facts | {"timings": [asdict(one) for one in timings]}


def main(given: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="Qwen3-8B")
    parser.add_argument("--computed", action="store_true", help="run no kernel: bytes, and floors of some cards")
    parser.add_argument("--repeats", type=positive(int), default=50)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(given)
    model = MODELS[args.model]
    if args.computed or not torch.cuda.is_available():
        if not args.computed:
            print(f"torch {torch.__version__} sees no CUDA device: no kernel was run or timed.\n")
        text, facts = computed(model)
    else:
        torch.set_grad_enabled(False)
        machine = describe_machine()
        try:
            text, facts = measured(model, torch.device("cuda"), args.repeats)
        except KernelDiffersError as error:
            raise SystemExit(str(error)) from error
        text = f"{machine.line()}\n{text}"
        facts |= {"machine": machine.as_dict()}
    print(text)
    if args.json:
        date = datetime.now(UTC).isoformat(timespec="seconds")
        args.json.write_text(json.dumps({"date": date} | facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

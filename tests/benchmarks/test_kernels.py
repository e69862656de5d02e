"""The kernels' benchmark where there is no GPU: what it computes, and that it tests before it times."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dspark.benchmarks import kernels
from dspark.benchmarks.byte_floor import floor_steps, floor_table
from dspark.benchmarks.kernel_cases import SHAPES, Inputs, KernelCase, Launch, Shape
from dspark.benchmarks.kernels import (
    KERNELS,
    KernelDiffersError,
    Stopwatch,
    Timing,
    bytes_table,
    check_all,
    measured,
    time_all,
    timing_table,
)
from dspark.benchmarks.overhead import Spread
from dspark.benchmarks.qwen3 import MODELS, Model
from dspark.engine.gpu.kernels import StepKernels
from dspark.kernels.dispatch import Kernels

CPU, TINY = torch.device("cpu"), MODELS["tiny"]


@pytest.fixture(autouse=True)
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_kernel_that_a_step_launches_is_there() -> None:
    launchers = {*Kernels.__dataclass_fields__, *StepKernels.__dataclass_fields__} - {"name"}
    assert {kernel.name.split(",")[0] for kernel in KERNELS} == launchers | {"gumbel_noise"}


def test_without_a_gpu_nothing_is_timed_and_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main([]) == 0
    printed = capsys.readouterr().out
    assert "sees no CUDA device: no kernel was run or timed" in printed
    assert printed.count("Computed, not measured") == 2


def test_computed_tables_come_from_the_kernels_own_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--computed", "--json", str(tmp_path / "out.json")]) == 0
    facts = json.loads((tmp_path / "out.json").read_text())
    assert facts["kind"] == "computed, not measured"
    assert facts["bytes"]["silu_mul"]["verify 32 × 8"] == 3 * 256 * 12_288 * 2
    assert facts["bytes"]["add_rms_norm"]["decode 1"] == 4096 * (2 * 2 + 8 + 2)
    assert "draft_attention" in facts["bytes"]
    assert "prefill 512" not in facts["bytes"]["sample_rows"]
    step = next(s for s in facts["steps"] if (s["model"], s["sequences"], s["drafts"]) == ("Qwen3-8B", 1, 0))
    assert step["floor_ms"]["H100 SXM"] == (step["weights"] + step["kv"]) / 3350 / 1e6
    printed = capsys.readouterr().out
    assert f"{step['floor_ms']['RTX 4090']:.2f}" in printed
    assert "no room" in printed


def test_the_readme_shows_what_is_computed() -> None:
    readme = (Path(kernels.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert bytes_table(MODELS["Qwen3-8B"]) in readme
    assert floor_table(floor_steps()) in readme


def scripted(name: str, events: list[str], wrong_at: str = "") -> KernelCase:
    """A kernel that notes when it is checked and when it runs."""

    def prepare(model: Model, shape: Shape, inputs: Inputs) -> Launch:
        def check() -> None:
            events.append(f"check {shape.name}")
            torch.testing.assert_close(torch.ones(2), torch.ones(2) + (shape.name == wrong_at))

        return Launch(lambda: events.append(f"run {shape.name}"), check)

    return KernelCase(name, lambda model, shape, element: 1_000_000 * shape.total, prepare, prompts=False)


def test_a_kernel_that_differs_is_named_with_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(kernels, "KERNELS", (scripted("silu_mul", events, wrong_at="decode 8"),))
    with pytest.raises(
        KernelDiffersError, match=r"silu_mul at decode 8.*nothing was timed\nTensor-likes are not close"
    ):
        check_all(TINY, CPU)
    assert events == ["check decode 1", "check decode 8"]


def test_every_kernel_is_timed_at_every_shape_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(kernels, "KERNELS", (scripted("silu_mul", events),))

    def us(run: Callable[[], object]) -> Spread:
        run()
        return Spread(20.0, 19.0, 30.0)

    timings = time_all(TINY, CPU, us)
    assert events == [f"run {shape.name}" for shape in SHAPES if shape.rows < 512]
    first = timing_table(timings, gb_per_s=100.0).splitlines()[2]
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "silu_mul",
        "decode 1",
        "1.000",
        "20.000 (19.000-30.000)",
        "10.00",
        "2.00",
    ]


@dataclass
class Device:
    """Stands in for torch.cuda: notes what is enqueued. An event's time is how many times something was replayed before it."""

    enqueued: list[str] = field(default_factory=list)
    capturing: bool = False

    def replace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.enqueued.append("event")
                self.at = device.enqueued.count("replay") ** 2

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def replay(self) -> None:
                device.enqueued.append("replay")

        @contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            device.enqueued.append("capture")
            yield

        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": capture,
            "synchronize": lambda: device.enqueued.append("wait"),
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=1024),
            "get_device_name": lambda _: "a card",
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(torch.Tensor, "zero_", lambda _: device.enqueued.append("evict"))


def test_a_captured_launch_is_timed_alone_with_the_cache_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    device.replace(monkeypatch)
    spread = Stopwatch(CPU, repeats=3).us(lambda: device.enqueued.append("run"))
    timed = ["evict", "event", "replay", "event"]
    assert device.enqueued == ["run"] * 3 + ["wait", "capture", "run"] + timed * 6 + ["wait"]
    assert spread == Spread(9e3, 7e3, 11e3), "the first three do not count; milliseconds become microseconds"


def test_a_run_on_a_card_tests_everything_before_it_times_anything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    device, events = Device(), list[str]()
    device.replace(monkeypatch)
    monkeypatch.setattr(kernels, "KERNELS", (scripted("silu_mul", events),))
    monkeypatch.setattr(Stopwatch, "copy_gb_per_s", lambda _: 2000.0)
    text, facts = measured(TINY, CPU, repeats=2)
    checked = [event for event in events if event.startswith("check")]
    assert events[: len(checked)] == checked
    assert len(checked) == 6
    assert "a card, 2000 GB/s copied (read + written); tiny's shapes in bfloat16; medians of 2 replays" in text
    assert (facts["kind"], facts["gpu"], facts["copy_gb_per_s"]) == ("measured", "a card", 2000.0)
    assert capsys.readouterr().out.count("as its reference") == 6


def test_a_kernel_that_moves_next_to_nothing_has_no_floor() -> None:
    row = timing_table([Timing("accept_drafts", "decode 1", 0, Spread(3.0, 3.0, 3.0))], 100.0).splitlines()[2]
    assert [cell.strip() for cell in row.split("|")[-3:-1]] == ["-", "-"]

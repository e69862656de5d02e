"""What a training run tells while it runs: a progress bar, and the lines from which its loss curve is drawn."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

REPORTED_STEPS = 20
"""Steps that one line is the mean of."""


class LossReport:
    """One line of JSON for every REPORTED_STEPS steps: the means of their facts, `step` (steps done) and `s` (of this run).

    Called with (step from 0, its facts). The first call of a resumed run takes back the lines that the run it goes on
    with had written after its last saved state.
    """

    def __init__(self, path: Path, steps: int) -> None:
        self._path = path
        self._steps = steps
        self._bar = tqdm(total=steps, desc="training", unit="step")
        self._started_s = time.monotonic()
        self._sums: Counter[str] = Counter()
        self._lines_checked = False

    def __call__(self, step: int, facts: dict[str, float]) -> None:
        if not self._lines_checked:
            self._take_back(step)
            self._lines_checked = True
        self._bar.update(step + 1 - self._bar.n)
        self._sums.update(facts)
        self._sums["steps"] += 1
        if (step + 1) % REPORTED_STEPS == 0 or step + 1 == self._steps:
            self._write(step + 1)
        if step + 1 == self._steps:
            self._bar.close()

    def _write(self, done: int) -> None:
        count = self._sums.pop("steps")
        means = {name: total / count for name, total in self._sums.items()}
        self._sums.clear()
        self._bar.set_postfix({name: f"{means[name]:.3f}" for name in ("loss", "accept_1")})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": done, "s": time.monotonic() - self._started_s} | means) + "\n")

    def _take_back(self, done: int) -> None:
        """Keep the lines, whole ones, of the first `done` steps."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= done]
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(kept), encoding="utf-8")
            partial.replace(self._path)

"""What a step costs: measured once on a ladder of sizes, then kept true while the engine runs.

    verify_s(rows, context) = drift * (curve(rows) * residual(rows) + per_context_token * context
                                       + per_draft_context_token * context of the draft rows)
    draft_s(slots)          = drift * curve(slots) * residual(slots)
    host_s(sequences)       = running mean of what a step took outside both

`drift` follows the machine as a whole (a busy neighbour, a lower clock); the residuals, bounded and decaying, follow what
the ladder got wrong at the sizes that are visited. Every curve is monotone. All times in seconds, sizes in rows (tokens
of one target pass), slots (tokens drafted) or sequences.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

FORMAT = 5
DRIFT_RATE = 0.2
DRIFT_LIMITS = (0.02, 50.0)
OUTLIER_WINDOW = 5
"""Drift follows the median of this many steps: fewer than half of them stalled do not move it."""
RESIDUAL_RATE = 0.1
MOST_VISITS_MISSED = 5.0
"""A size not visited for so many steps or more learns from its next visit as from that many beside it."""
RESIDUAL_CLIP = 0.2
"""Log-ratio of one step that a residual takes in at most, so that a stalled step moves it by 2 %, or 9 % where visits are
rare."""
LATELY_STEPS = 128
FILL_RATE = 0.02
"""Share by which, each step, the residuals of sizes not visited lately follow those of the visited ones around them."""
RESIDUAL_LIMIT = math.log(4.0)
RESIDUAL_DECAY = 1e-3
HOST_RATE = 0.05
ERROR_RATE = 0.05
SHORTEST_S = 1e-7
JUMP_RATIO = 0.04
"""A midpoint further than this share from the straight line between its neighbours is a jump to be narrowed down."""
SMALL = 8
"""Sizes up to here, a sequence with its drafts, are all measured, and oftenest: how long a block pays turns on single rows."""


class PassTimer(Protocol):
    """Runs real passes of given sizes and returns how long each took."""

    rows_per_sequence: int
    block_size: int
    """γ, slots of a draft block."""

    def verify_s(self, rows: int, context_tokens: int) -> float:
        """Seconds of one target pass over `rows` rows reading `context_tokens` K/V entries, sampling included."""

    def draft_s(self, slots: int) -> float:
        """Seconds of drafting so many slots, in as few blocks as they fit in; without context injection."""


def ladder(largest: int) -> list[int]:
    """Sizes 1, 2, ... 8, 12, 16, 24, 32, ... up to and including `largest`."""
    sizes = {*range(1, min(SMALL, largest) + 1), largest}
    power = SMALL
    while power < largest:
        sizes |= {power, min(power * 3 // 2, largest)}
        power *= 2
    return sorted(sizes)


class SizeCurve:
    """Seconds by size: knots, residuals at the knots, and the dense monotone curve made of both."""

    def __init__(self, sizes: Sequence[int], seconds: Sequence[float], residual: Sequence[float] | None = None) -> None:
        """sizes: ascending, from 1; seconds: as measured. A time above that of a larger size is taken as noise.

        Raises ValueError on sizes that do not ascend from 1 or times that are not positive numbers.
        """
        self.sizes = np.asarray(sizes, dtype=np.int64)
        measured = np.asarray(seconds, dtype=np.float64)
        if self.sizes.size == 0 or self.sizes[0] != 1 or np.any(np.diff(self.sizes) <= 0):
            raise ValueError(f"sizes must ascend from 1, given {list(sizes)}")
        if measured.shape != self.sizes.shape or not np.isfinite(measured).all() or (measured <= 0).any():
            raise ValueError(f"seconds must be {self.sizes.size} positive numbers, given {list(seconds)}")
        self.seconds = np.minimum.accumulate(measured[::-1])[::-1]
        self.residual = np.zeros(self.sizes.size) if residual is None else np.asarray(residual, dtype=np.float64)
        if self.residual.shape != self.sizes.shape or not (np.abs(self.residual) <= RESIDUAL_LIMIT).all():
            raise ValueError(f"residual must be {self.sizes.size} numbers within ±{RESIDUAL_LIMIT:.2f}")
        self._log_seconds = np.log(self.seconds)
        self._log_sizes = np.log(self.sizes)
        self._steps_unvisited = np.full(self.sizes.size, np.inf)
        self._every_size = np.arange(self.sizes[-1] + 1)
        self._refresh()

    def at(self, size: NDArray[np.int64]) -> NDArray[np.float64]:
        """Seconds at each size; beyond the largest measured one, along the line of the last two knots' slope."""
        beyond = np.maximum(size - self.sizes[-1], 0)
        return self.dense[np.minimum(size, self.sizes[-1])] + beyond * self._last_slope

    def one(self, size: int) -> float:
        """`at` for a single size, without the cost of an array."""
        last = self.dense.size - 1
        if size <= last:
            return float(self.dense[size])
        return float(self.dense[last]) + (size - last) * self._last_slope

    def correct(self, size: int, log_ratio: float) -> None:
        """Take in the log of observed / predicted seconds at one size."""
        right = min(int(np.searchsorted(self.sizes, size)), self.sizes.size - 1)
        left = max(right - 1, 0)
        near = left if size - self.sizes[left] < self.sizes[right] - size else right
        # a size that is rarely visited must learn from few visits
        rate = 1.0 - (1.0 - RESIDUAL_RATE) ** (1.0 + min(float(self._steps_unvisited[near]), MOST_VISITS_MISSED))
        self._steps_unvisited += 1.0
        self._steps_unvisited[near] = 0.0
        step = rate * min(max(log_ratio, -RESIDUAL_CLIP), RESIDUAL_CLIP)
        share = float(size - self.sizes[left]) / float(self.sizes[right] - self.sizes[left]) if right else 1.0
        share = min(share, 1.0)
        log_s = self._log_seconds + self.residual * (1.0 - RESIDUAL_DECAY)
        log_s[right] += step * share
        log_s[left] += step * (1.0 - share)
        # what was just seen wins: smaller sizes cannot cost more, nor larger ones less
        if step < 0.0:
            np.minimum(log_s[:right], log_s[right], out=log_s[:right])
            np.minimum(log_s[:left], log_s[left], out=log_s[:left])
        else:
            np.maximum(log_s[left + 1 :], log_s[left], out=log_s[left + 1 :])
            np.maximum(log_s[right + 1 :], log_s[right], out=log_s[right + 1 :])
        residual = np.minimum(np.maximum(log_s - self._log_seconds, -RESIDUAL_LIMIT), RESIDUAL_LIMIT)
        self.residual = self._fill_unvisited(residual)
        self._refresh()

    def _fill_unvisited(self, residual: NDArray[np.float64]) -> NDArray[np.float64]:
        """Move knots not visited lately towards what lies between (beyond: at) those that were, so that no jump is
        believed in where nobody has looked."""
        visited = self._steps_unvisited < LATELY_STEPS
        between = np.interp(self._log_sizes, self._log_sizes[visited], residual[visited])
        filled = np.where(visited, residual, residual + FILL_RATE * (between - residual))
        return np.maximum.accumulate(self._log_seconds + filled) - self._log_seconds

    def _refresh(self) -> None:
        knots = np.exp(self._log_seconds + self.residual)
        self.dense: NDArray[np.float64] = np.interp(self._every_size, self.sizes, knots)
        """[largest + 1] float64, seconds by size; entry 0 is that of size 1."""
        if self.sizes.size > 1:
            last, before = int(self.sizes[-1]), int(self.sizes[-2])
            self._last_slope = float(self.dense[last] - self.dense[before]) / (last - before)
        else:
            self._last_slope = float(self.dense[-1])


class CostModel:
    """Predicts step times; see the module's docstring for the formula."""

    def __init__(
        self,
        verify: SizeCurve,
        draft: SizeCurve,
        context_s: float = 0.0,
        host_s: float = 0.0,
        draft_context_s: float = 0.0,
    ) -> None:
        """context_s: seconds per K/V entry that attention reads; draft_context_s: the same for each further row of a sequence.

        host_s: first guess of a step's time outside both passes.
        """
        self._verify = verify
        self._draft = draft
        self._context_s = context_s
        self._draft_context_s = draft_context_s
        self._host: dict[int, float] = {}
        self._first_host_s = host_s
        self.drift = 1.0
        self.error_ratio = 0.0
        """Running mean of |log(observed / predicted)| of verify times; about the relative error."""
        self._recent: deque[float] = deque(maxlen=OUTLIER_WINDOW)

    @classmethod
    def profile(
        cls, measure: PassTimer, max_rows: int, max_sequences: int, context_tokens: int = 0, budget_s: float = 3.0
    ) -> Self:
        """Measure the ladders.

        max_rows: rows of the largest target pass; max_sequences: of the largest batch. context_tokens: K/V entries of
        the pass that tells what context costs (0: do not measure it). budget_s: measured seconds that the target's
        ladder may take, the drafter's half of it; what was not reached is extrapolated. As far as the largest batch with a
        draft for each it is measured on any machine: an extrapolated slope there would decide whether a crowd is drafted for.
        """
        rows, verify_s = _climb(lambda size: measure.verify_s(size, 0), max_rows, budget_s, 2 * max_sequences)
        slots, draft_s = _climb(measure.draft_s, max_sequences * measure.block_size, budget_s / 2)
        context_s = draft_context_s = 0.0
        if context_tokens:
            block = measure.rows_per_sequence
            first, whole = (
                statistics.median(measure.verify_s(size, context_tokens) - measure.verify_s(size, 0) for _ in range(5))
                for size in (1, block)
            )
            context_s = max(0.0, first) / context_tokens
            draft_context_s = max(0.0, whole - first) / (context_tokens * (block - 1))
        return cls(SizeCurve(rows, verify_s), SizeCurve(slots, draft_s), context_s, draft_context_s=draft_context_s)

    @property
    def max_rows(self) -> int:
        return self._verify.dense.size - 1

    def verify_curve(self, context_tokens: int, anchors: int = 0, draft_context: float = 0.0) -> NDArray[np.float64]:
        """[max_rows + 1] float64, predicted seconds of a target pass by rows; entry 0 is that of one row.

        context_tokens: K/V entries read, once per sequence. Each row beyond `anchors` reads `draft_context` entries once more,
        which are in the processor's cache by then.
        """
        again = np.maximum(np.arange(self._verify.dense.size) - anchors, 0) * draft_context
        return self.drift * (self._verify.dense + self._context_s * context_tokens + self._draft_context_s * again)

    def verify_s(self, rows: int | NDArray[np.int64], context_tokens: int = 0) -> NDArray[np.float64]:
        """Predicted seconds of a target pass of `rows` rows (>= 1, an array or a scalar): monotone in rows."""
        return self.drift * (self._verify.at(np.asarray(rows)) + self._context_s * context_tokens)

    def draft_curve(self, sequences: int, width: int) -> NDArray[np.float64]:
        """[sequences + 1] float64, predicted seconds of drafting `width` slots for 0..sequences sequences; entry 0 is 0."""
        last = sequences * width
        if last < self._draft.dense.size:
            seconds = self.drift * self._draft.dense[: last + 1 : width]
        else:
            seconds = self.drift * self._draft.at(np.arange(0, last + 1, width))
        seconds[0] = 0.0
        return seconds

    def draft_s(self, slots: int) -> float:
        """Predicted seconds of drafting so many slots; 0 for none."""
        return self.drift * self._draft.one(slots) if slots else 0.0

    def host_s(self, sequences: int) -> float:
        """Predicted seconds of a step outside target pass and drafting; from the nearest batch size seen."""
        if not self._host:
            return self._first_host_s
        bucket = sequences.bit_length()
        return self._host[min(self._host, key=lambda seen: (abs(seen - bucket), seen))]

    def observe_verify(self, rows: int, context_tokens: int, seconds: float, draft_context_tokens: int = 0) -> float:
        """A target pass of `rows` rows took `seconds`; draft_context_tokens: K/V entries read again, by draft rows.

        Returns log(observed / predicted).
        """
        if rows < 1 or seconds <= 0:
            return 0.0
        context_s = self._context_s * context_tokens + self._draft_context_s * draft_context_tokens
        log_ratio = math.log(seconds / (self.drift * (self._verify.one(rows) + context_s)))
        self.error_ratio += ERROR_RATE * (min(abs(log_ratio), 1.0) - self.error_ratio)
        before = math.log(self.drift)
        # each entry is the drift that this step alone would ask for
        self._recent.append(before + log_ratio)
        common = statistics.median_low(self._recent)
        self.drift = min(max(math.exp(before + DRIFT_RATE * (common - before)), DRIFT_LIMITS[0]), DRIFT_LIMITS[1])
        # the residual learns only what recent steps of other sizes do not share, or it would take part of the drift
        self._verify.correct(rows, before + log_ratio - common)
        return log_ratio

    def observe_draft(self, slots: int, seconds: float) -> None:
        """Drafting so many slots took `seconds`."""
        if slots:
            seconds = max(seconds, SHORTEST_S)
            self._draft.correct(slots, math.log(seconds / max(self.draft_s(slots), SHORTEST_S)))

    def observe_host(self, sequences: int, seconds: float) -> None:
        """A step of `sequences` sequences took `seconds` outside target pass and drafting."""
        bucket = sequences.bit_length()
        known = self._host.get(bucket)
        # a stall must not count in full: at most twice the running mean is taken in
        self._host[bucket] = seconds if known is None else known + HOST_RATE * (min(seconds, 2 * known + 1e-4) - known)

    def save(self, path: Path, key: str) -> None:
        """Write the model as JSON, whole or not at all. key: names device, target, drafter and versions."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "format": FORMAT,
            "key": key,
            "verify": _curve_state(self._verify),
            "draft": _curve_state(self._draft),
            "context_s": self._context_s,
            "draft_context_s": self._draft_context_s,
            "host": {str(bucket): seconds for bucket, seconds in self._host.items()},
            "drift": self.drift,
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, key: str) -> Self | None:
        """The saved model, or None when there is none to use; a corrupt or foreign file is logged."""
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            if state["format"] != FORMAT or state["key"] != key:
                logger.info("cost model %s was measured for something else (%s); measuring again", path, state["key"])
                return None
            model = cls(
                _curve(state["verify"]),
                _curve(state["draft"]),
                _positive("context_s", state["context_s"]),
                draft_context_s=_positive("draft_context_s", state["draft_context_s"]),
            )
            model._host = {int(bucket): _positive("host", seconds) for bucket, seconds in state["host"].items()}
            model.drift = min(max(_positive("drift", state["drift"]), DRIFT_LIMITS[0]), DRIFT_LIMITS[1])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("cost model %s cannot be used (%s); measuring again", path, error)
            return None
        return model


def _climb(
    measure: Callable[[int], float], largest: int, budget_s: float, needed: int = 0
) -> tuple[list[int], list[float]]:
    """Sizes, ascending, and the median of their passes, in three rounds within `budget_s` of measured time.

    Half of it: the rungs of the ladder once each; those not reached are extrapolated from the last two. Rungs up to `needed`
    are reached in any case, and the budget is then twice what that took, if that is more. To three
    quarters: one row more than each rung (that is where hardware of fixed tile sizes jumps) and, between neighbours
    that a straight line does not explain, the middle. The rest: passes again, small sizes up to five and then all up to three.
    """
    passes: dict[int, list[float]] = {}
    spent_s = 0.0

    def time(size: int) -> float:
        nonlocal spent_s
        passes.setdefault(size, []).append(max(measure(size), SHORTEST_S))
        spent_s += passes[size][-1]
        return passes[size][-1]

    for size in ladder(largest):
        if spent_s >= budget_s / 2 and len(passes) >= 2 and size > needed:
            break
        time(size)
    reached = max(passes)
    budget_s = max(budget_s, 2.0 * spent_s)
    for size in ladder(reached):
        if SMALL <= size < reached and size + 1 not in passes and spent_s < budget_s * 0.75:
            time(size + 1)
    between = deque(itertools.pairwise(sorted(passes)))
    while between and spent_s < budget_s * 0.75:
        left, right = between.popleft()
        middle = (left + right) // 2
        if middle == left or passes[right][0] < passes[left][0] * (1.0 + JUMP_RATIO):
            continue
        straight = passes[left][0] + (passes[right][0] - passes[left][0]) * (middle - left) / (right - left)
        if abs(time(middle) - straight) > JUMP_RATIO * straight:
            between += [(left, middle), (middle, right)]
    sizes = sorted(passes)
    for size in [size for size in sizes if size <= SMALL] * 2 + sizes * 2:
        if spent_s < budget_s:
            time(size)
    seconds = [statistics.median_low(passes[size]) for size in sizes]
    if sizes[-1] < largest:
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        seconds.append(max(seconds[-1] + slope * (largest - sizes[-1]), seconds[-1]))
        sizes.append(largest)
    return sizes, seconds


def _positive(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be a number >= 0, is {value}")
    return number


def _curve_state(curve: SizeCurve) -> dict[str, list[float]]:
    return {
        "sizes": curve.sizes.tolist(),
        "seconds": curve.seconds.tolist(),
        "residual": curve.residual.tolist(),
    }


def _curve(state: Mapping[str, Any]) -> SizeCurve:
    return SizeCurve(state["sizes"], state["seconds"], state["residual"])

"""What speculation was worth lately: gauges over a window that moves, where counters would need a query over history."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

SPEEDUP_WINDOW_S = 60
CALIBRATION_WINDOW_TOKENS = 10_000
CALIBRATION_PART_TOKENS = 500
"""The window moves on by so many tokens at a time, so that it holds a few sums and not every token."""


class RecentSpeedup:
    """Time of plain decoding, as the cost model has it, over the time that decoding took, in the last minute."""

    def __init__(self) -> None:
        self._seconds: deque[tuple[int, float, float]] = deque()  # (second, decode_s, plain_s)

    def add(self, now_s: float, decode_s: float, plain_s: float) -> None:
        """now_s: of a clock that never goes back. decode_s: what a step took; plain_s: what its tokens would have."""
        self._forget(now_s)
        second = int(now_s)
        if self._seconds and self._seconds[-1][0] == second:
            _, decode_before_s, plain_before_s = self._seconds.pop()
            decode_s, plain_s = decode_s + decode_before_s, plain_s + plain_before_s
        self._seconds.append((second, decode_s, plain_s))

    def ratio(self, now_s: float) -> float:
        """Above 1: speculation pays. NaN when nothing was decoded."""
        self._forget(now_s)
        decode_s = sum(decode_s for _, decode_s, _ in self._seconds)
        return sum(plain_s for _, _, plain_s in self._seconds) / decode_s if decode_s else math.nan

    def _forget(self, now_s: float) -> None:
        while self._seconds and self._seconds[0][0] <= now_s - SPEEDUP_WINDOW_S:
            self._seconds.popleft()


class _Judged:
    """Sums over drafts that were accepted or rejected, each by confidence bin."""

    def __init__(self, bins: int) -> None:
        self.counts = [0] * bins
        self.accepted = [0] * bins
        self.confidences = [0.0] * bins
        self.tokens = 0

    def add(self, counts: Sequence[int], accepted: Sequence[int], confidences: Sequence[float]) -> None:
        for bin_, count in enumerate(counts):
            if count:
                self.counts[bin_] += count
                self.accepted[bin_] += accepted[bin_]
                self.confidences[bin_] += confidences[bin_]
                self.tokens += count


class RecentCalibration:
    """Expected calibration error of the last 10,000 drafts that were judged, up to a part of the window more."""

    def __init__(self) -> None:
        self._parts: deque[_Judged] = deque()
        self._tokens = 0

    def add(self, counts: Sequence[int], accepted: Sequence[int], confidences: Sequence[float]) -> None:
        """counts: drafts judged; accepted: of those; confidences: their sum; each by bin."""
        if not self._parts or self._parts[-1].tokens >= CALIBRATION_PART_TOKENS:
            self._parts.append(_Judged(len(counts)))
        self._parts[-1].add(counts, accepted, confidences)
        self._tokens += sum(counts)
        while self._tokens - self._parts[0].tokens >= CALIBRATION_WINDOW_TOKENS:
            self._tokens -= self._parts.popleft().tokens

    def error(self) -> float:
        """Σ |sum of confidences - accepted| / tokens over bins, less what perfect confidences would show by chance.

        Around 0, also below, for a calibrated drafter; NaN when nothing was judged. A bin's chance part is the mean absolute
        deviation of a binomial (De Moivre): 2 v C(n, v) p^v (1 - p)^(n - v + 1), v = ⌊n p⌋ + 1.
        """
        if not self._tokens:
            return math.nan
        total = _Judged(len(self._parts[0].counts))
        for part in self._parts:
            total.add(part.counts, part.accepted, part.confidences)
        surplus = sum(
            abs(confidence - accepted) - _mean_deviation(count, confidence / count)
            for count, accepted, confidence in zip(total.counts, total.accepted, total.confidences, strict=True)
            if count
        )
        return surplus / self._tokens


def _mean_deviation(n: int, p: float) -> float:
    """E |X - n p| of X ~ Binomial(n, p)."""
    if not 0 < p < 1:
        return 0.0
    v = min(math.floor(n * p) + 1, n)
    log_choose = math.lgamma(n + 1) - math.lgamma(v + 1) - math.lgamma(n - v + 1)
    return 2 * v * math.exp(log_choose + v * math.log(p) + (n - v + 1) * math.log1p(-p))

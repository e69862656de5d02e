"""From a drafter's raw confidence to the probability that the target accepts: learned online, per kind and position.

The kind of a block is its source (which of several drafters proposed it) and whether its request is greedy or sampled.

A drafter says, for draft k of a block, how sure it is (log-odds c) that the target accepts it given that it accepted
drafts < k. Here `p = sigmoid(slope * c / temperature_k + bias)`, with slope and bias per (kind, position).
A drafter without a confidence head gives constant log-odds; the bias alone then is the acceptance rate.

The fit is online logistic regression: each label is linearised at the current parameters (one iteratively reweighted
least-squares step) and added to decayed normal equations. Every cell is pulled to the value pooled over all cells, and
that to slope 1 and bias 0, by priors of fixed strength, so thin data cannot carry a cell far.
Only conditional labels are used: draft k was verified and drafts < k were accepted. Truncation by survival then cannot
bias the fit, for it selects on the input of the regression, not on its label.
Starting point: sequential temperature scaling (DSpark paper), `temperature_k`, when the checkpoint came with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Source = int | NDArray[np.int8]
MEMORY_LABELS = 1000.0
"""Labels after which an old one counts 1/e, per cell."""
POOL_MEMORY_LABELS = 2000.0
CELL_PRIOR = (32.0, 8.0)
"""Precision of (slope, bias) of a cell around the pooled value; a label at p = 0.5 brings 0.25 to that of the bias."""
POOL_PRIOR = (8.0, 2.0)
"""The same of the pooled value around (1, 0)."""
SMALLEST_WEIGHT = 0.1
"""Floor of a label's weight p (1 - p): without it one surprise at p near 0 or 1 would carry a thin cell far away."""
SLOPE_LIMITS = (0.05, 4.0)
BIAS_LIMITS = (-8.0, 8.0)
CONFIDENCE_LIMIT = 20.0
"""Log-odds beyond ± this are cut: float32 confidences of an untrained head can be anything."""
SMALLEST_SURVIVAL = np.float32(1e-6)
LARGEST_SURVIVAL = np.float32(1.0 - 1e-6)


@dataclass(frozen=True, slots=True)
class CalibrationTable:
    """An immutable picture of a calibration, to be read by any thread.

    slope, bias: [2 · sources, γ] float32, applied to the raw log-odds; row 2·source + sampled.
    """

    slope: NDArray[np.float32]
    bias: NDArray[np.float32]

    def survival(
        self, confidence: NDArray[np.float32], sampled: NDArray[np.bool_], source: Source = 0
    ) -> NDArray[np.float32]:
        """Probability that drafts 0..j are all accepted, [B, γ] float32, in (0, 1) and non-increasing in j.

        confidence: [B, γ] float32 raw log-odds; sampled: [B] bool, temperature above 0; source: [B], or of all.
        """
        survival = np.cumprod(self.conditional(confidence, sampled, source), axis=1, dtype=np.float32)
        return np.clip(survival, SMALLEST_SURVIVAL, LARGEST_SURVIVAL)

    def conditional(
        self, confidence: NDArray[np.float32], sampled: NDArray[np.bool_], source: Source = 0
    ) -> NDArray[np.float32]:
        """Probability that draft j is accepted if all before it were, [B, γ] float32; arguments as for `survival`."""
        kind = _kind(sampled, source)
        logits = self.slope[kind] * _bounded(confidence) + self.bias[kind]
        return (1.0 / (1.0 + np.exp(-logits))).astype(np.float32)


class Calibration:
    """Learns from verified drafts; one thread calls `observe`, any may hold a `table()`."""

    def __init__(self, block_size: int, temperatures: ArrayLike | None = None, sources: int = 1) -> None:
        """block_size: γ. temperatures: stored sequential temperatures of source 0, [2, γ] (greedy, sampled) or [γ] for both;

        None: 1, as of all others. Raises ValueError for another shape or a value that is not positive.
        """
        given = np.ones(block_size) if temperatures is None else np.asarray(temperatures, np.float64)
        if given.shape not in ((block_size,), (2, block_size)):
            raise ValueError(
                f"temperatures: shape {list(given.shape)}, but must be [{block_size}] or [2, {block_size}] for a block "
                f"of {block_size} drafts"
            )
        if not (np.isfinite(given) & (given > 0)).all():
            raise ValueError(f"temperatures: each must be a positive number, given {given.tolist()}")
        self.block_size = block_size
        self._temperatures = np.ones((2 * sources, block_size))
        self._temperatures[:2] = given
        self._position = np.arange(block_size)
        # decayed sums of the normal equations of (slope, bias): weight times x², x, 1, x·z, z with z the working response
        self._cells = np.zeros((5, 2 * sources, block_size))
        self._pool = np.zeros(5)
        self._refresh()

    def observe(
        self,
        confidence: NDArray[np.float32],
        sampled: NDArray[np.bool_],
        verified_lengths: NDArray[np.int32],
        accepted_lengths: NDArray[np.int32],
        source: Source = 0,
    ) -> None:
        """Learn from one verified step.

        confidence: [B, γ] raw log-odds; sampled: [B]; verified_lengths, accepted_lengths: [B] drafts, accepted <=
        verified; source: [B], or of all.
        """
        labelled = self._position <= np.minimum(accepted_lengths, verified_lengths - 1)[:, None]
        if not labelled.any():
            return
        accepted = self._position < accepted_lengths[:, None]
        kind = _kind(sampled, source)
        x = _bounded(confidence) / self._temperatures[kind]
        eta = self._slope[kind] * x + self._bias[kind]
        p = 1.0 / (1.0 + np.exp(-eta))
        terms = np.empty((5, *x.shape))
        np.maximum(p * (1.0 - p), SMALLEST_WEIGHT, out=terms[2])
        np.multiply(terms[2], x, out=terms[1])
        np.multiply(terms[1], x, out=terms[0])
        np.add(terms[2] * eta, accepted - p, out=terms[4])
        np.multiply(terms[4], x, out=terms[3])
        terms *= labelled
        of_kind = (np.arange(len(self._temperatures))[:, None] == kind).astype(np.float64)
        added = of_kind @ terms
        self._cells *= np.exp((of_kind @ labelled) * (-1.0 / MEMORY_LABELS))
        self._cells += added
        self._pool *= math.exp(-float(np.count_nonzero(labelled)) / POOL_MEMORY_LABELS)
        self._pool += added.sum(axis=(1, 2))
        self._refresh()

    def survival(
        self, confidence: NDArray[np.float32], sampled: NDArray[np.bool_], source: Source = 0
    ) -> NDArray[np.float32]:
        """As `CalibrationTable.survival`, with the newest parameters."""
        return self._table.survival(confidence, sampled, source)

    def table(self) -> CalibrationTable:
        """The parameters now; later calls of `observe` do not change it."""
        return self._table

    def _refresh(self) -> None:
        pooled = _solve(self._pool, (1.0, 0.0), POOL_PRIOR)
        self._slope, self._bias = _solve(self._cells, (float(pooled[0]), float(pooled[1])), CELL_PRIOR)
        slope = (self._slope / self._temperatures).astype(np.float32)
        bias = self._bias.astype(np.float32)
        slope.flags.writeable = False
        bias.flags.writeable = False
        self._table = CalibrationTable(slope, bias)


def _kind(sampled: NDArray[np.bool_], source: Source) -> NDArray[np.intp]:
    return sampled.astype(np.intp) + 2 * np.asarray(source, np.intp)


def _bounded(confidence: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.minimum(np.maximum(confidence, -CONFIDENCE_LIMIT), CONFIDENCE_LIMIT)


def _solve(
    sums: NDArray[np.float64], prior: tuple[float, float], precision: tuple[float, float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ridge solution (slope, bias), each [...], of normal equations [5, ...], shrunk to `prior`."""
    xx, x, one, xz, z = sums
    xx = xx + precision[0]
    one = one + precision[1]
    xz = xz + precision[0] * prior[0]
    z = z + precision[1] * prior[1]
    slope = (xz * one - z * x) / (xx * one - x * x)
    slope = np.minimum(np.maximum(slope, SLOPE_LIMITS[0]), SLOPE_LIMITS[1])
    # the bias that is best for the slope after its bound, not before
    bias = np.minimum(np.maximum((z - x * slope) / one, BIAS_LIMITS[0]), BIAS_LIMITS[1])
    return slope, bias

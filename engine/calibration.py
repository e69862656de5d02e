"""From a drafter's raw confidence to the probability that the target accepts: learned online, per kind and position.

A drafter says, for draft k of a block, how sure it is (log-odds c) that the target accepts it given that it accepted
drafts < k. Here `p = sigmoid(slope * c / temperature_k + bias)`, with slope and bias per (greedy | sampled, position).
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GREEDY, SAMPLED = 0, 1
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

    slope, bias: [2, γ] float32, applied to the raw log-odds; row 0 greedy, row 1 sampled.
    """

    slope: NDArray[np.float32]
    bias: NDArray[np.float32]

    def survival(self, confidence: NDArray[np.float32], sampled: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Probability that drafts 0..j are all accepted, [B, γ] float32, in (0, 1) and non-increasing in j.

        confidence: [B, γ] float32 raw log-odds; sampled: [B] bool, temperature above 0.
        """
        kind = sampled.astype(np.intp)
        logits = self.slope[kind] * _bounded(confidence) + self.bias[kind]
        survival = np.cumprod(1.0 / (1.0 + np.exp(-logits)), axis=1, dtype=np.float32)
        return np.clip(survival, SMALLEST_SURVIVAL, LARGEST_SURVIVAL)


class Calibration:
    """Learns from verified drafts; one thread calls `observe`, any may hold a `table()`."""

    def __init__(self, block_size: int, temperatures: Sequence[float] | None = None) -> None:
        """block_size: γ. temperatures: [γ] stored sequential temperatures; None: 1.

        Raises ValueError when `temperatures` has another length or a value that is not positive.
        """
        if temperatures is None:
            temperatures = [1.0] * block_size
        if len(temperatures) != block_size:
            raise ValueError(f"temperatures: {len(temperatures)} given, but a block has {block_size} drafts")
        if not all(math.isfinite(t) and t > 0 for t in temperatures):
            raise ValueError(f"temperatures: each must be a positive number, given {list(temperatures)}")
        self.block_size = block_size
        self._temperatures = np.asarray(temperatures, dtype=np.float64)
        self._position = np.arange(block_size)
        # decayed sums of the normal equations of (slope, bias): weight times x², x, 1, x·z, z with z the working response
        self._cells = np.zeros((5, 2, block_size))
        self._pool = np.zeros(5)
        self._refresh()

    def observe(
        self,
        confidence: NDArray[np.float32],
        sampled: NDArray[np.bool_],
        verified_lengths: NDArray[np.int32],
        accepted_lengths: NDArray[np.int32],
    ) -> None:
        """Learn from one verified step.

        confidence: [B, γ] raw log-odds; sampled: [B]; verified_lengths, accepted_lengths: [B] drafts, accepted <=
        verified.
        """
        labelled = self._position <= np.minimum(accepted_lengths, verified_lengths - 1)[:, None]
        if not labelled.any():
            return
        accepted = self._position < accepted_lengths[:, None]
        x = _bounded(confidence) / self._temperatures
        kind = sampled.astype(np.intp)
        eta = self._slope[kind] * x + self._bias[kind]
        p = 1.0 / (1.0 + np.exp(-eta))
        terms = np.empty((5, *x.shape))
        np.maximum(p * (1.0 - p), SMALLEST_WEIGHT, out=terms[2])
        np.multiply(terms[2], x, out=terms[1])
        np.multiply(terms[1], x, out=terms[0])
        np.add(terms[2] * eta, accepted - p, out=terms[4])
        np.multiply(terms[4], x, out=terms[3])
        terms *= labelled
        of_kind = np.stack((~sampled, sampled)).astype(np.float64)
        added = of_kind @ terms
        self._cells *= np.exp((of_kind @ labelled) * (-1.0 / MEMORY_LABELS))
        self._cells += added
        self._pool *= math.exp(-float(np.count_nonzero(labelled)) / POOL_MEMORY_LABELS)
        self._pool += added.sum(axis=(1, 2))
        self._refresh()

    def survival(self, confidence: NDArray[np.float32], sampled: NDArray[np.bool_]) -> NDArray[np.float32]:
        """As `CalibrationTable.survival`, with the newest parameters."""
        return self._table.survival(confidence, sampled)

    def table(self) -> CalibrationTable:
        """The parameters now; later calls of `observe` do not change it."""
        return self._table

    def to_dict(self) -> dict[str, Any]:
        """Everything learned, as JSON types."""
        return {
            "block_size": self.block_size,
            "temperatures": self._temperatures.tolist(),
            "cells": self._cells.tolist(),
            "pool": self._pool.tolist(),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Calibration:
        """The inverse of `to_dict`. Raises ValueError naming what is missing or misshapen."""
        missing = {"block_size", "temperatures", "cells", "pool"} - set(state)
        if missing:
            raise ValueError(f"calibration: missing {', '.join(sorted(missing))}")
        calibration = cls(int(state["block_size"]), [float(t) for t in state["temperatures"]])
        for name, held in (("cells", calibration._cells), ("pool", calibration._pool)):
            stored = np.asarray(state[name], dtype=np.float64)
            if stored.shape != held.shape or not np.isfinite(stored).all():
                raise ValueError(f"calibration: {name} must be finite numbers of shape {held.shape}, is {stored.shape}")
            held[:] = stored
        calibration._refresh()
        return calibration

    def _refresh(self) -> None:
        pooled = _solve(self._pool, (1.0, 0.0), POOL_PRIOR)
        self._slope, self._bias = _solve(self._cells, (float(pooled[0]), float(pooled[1])), CELL_PRIOR)
        slope = (self._slope / self._temperatures).astype(np.float32)
        bias = self._bias.astype(np.float32)
        slope.flags.writeable = False
        bias.flags.writeable = False
        self._table = CalibrationTable(slope, bias)


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

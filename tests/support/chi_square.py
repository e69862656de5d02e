"""Do counts follow a known distribution?"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import chisquare


def p_value(counts: NDArray[Any], exact: NDArray[np.float64]) -> float:
    """Of a chi-square test. counts, exact: the same shape; exact sums to 1.

    Cells expected less than 5 times are taken together. What is impossible must not occur.
    """
    assert counts[exact == 0.0].sum() == 0
    expected = exact * counts.sum()
    rare = expected < 5
    seen = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    kept = wanted > 0
    assert kept.sum() > 1, "one cell proves nothing"
    return float(chisquare(seen[kept], wanted[kept]).pvalue)

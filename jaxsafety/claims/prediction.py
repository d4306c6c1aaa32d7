"""Is an outcome of models predicted by a quantity of theirs, beyond what others predict already?

The unit is whatever differs in what is asked: of defences, a defence, in which seeds and strengths are nested and
averaged. With some 15 of them only a strong correlation can be seen: :func:`detectable` says how strong.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import scipy  # its parts, most of a second, are imported where one is first used
from jaxtyping import Float


class Prediction(NamedTuple):
    """How one quantity predicts an outcome of n units.

    Attributes:
        correlation: Spearman's rank correlation of the two, in [-1, 1]; NaN where either is constant.
        partial: that of what the other predictors leave of their ranks.
        low, high: 95 % interval of ``partial``, by Fisher's z.
        p: two-sided, of ``partial`` being 0, by Student's t with n - 2 - controls degrees of freedom.
        gain: by how much the error of predicting a unit that was left out falls once the quantity stands beside the
            other predictors: 1 - error with / error without, in (-inf, 1]; at or below 0 it helps nothing.
        n: units.
    """

    correlation: float
    partial: float
    low: float
    high: float
    p: float
    gain: float
    n: int


def predicted(
    outcome: Float[np.ndarray, " n"], quantity: Float[np.ndarray, " n"], *, others: Float[np.ndarray, "n k"]
) -> Prediction:
    """Returns how a quantity predicts an outcome beyond ``others``, k columns, maybe none.

    Units with a value that is not finite are left out.

    Raises:
        ValueError: fewer than k + 4 units are left.

    References: a partial rank correlation has Spearman's standard error with as many units fewer as there are controls
        (Kendall and Stuart, vol. 2, on partial correlation); Fieller, Hartley and Pearson 1957, Biometrika 44, have the
        factor 1.03 for ranks.
    """
    kept = np.isfinite(np.column_stack([outcome, quantity, others])).all(axis=1)
    outcome, quantity, others = outcome[kept], quantity[kept], others[kept]
    count, controls = len(outcome), others.shape[1]
    if count < controls + 4:
        raise ValueError(f"outcome: got {count} units with all values, expected at least {controls + 4}")
    ranks = [scipy.stats.rankdata(values) for values in (outcome, quantity, *others.T)]
    y, x = (_rest(one, np.column_stack([np.ones(count), *ranks[2:]])) for one in ranks[:2])
    partial = _correlation(x, y)
    freedom = count - 2 - controls
    t = partial * math.sqrt(freedom / max(1 - partial**2, 1e-12))
    reach = scipy.stats.norm.ppf(0.975) * math.sqrt(1.06 / (count - controls - 3))
    low, high = (math.tanh(math.atanh(min(max(partial, -1 + 1e-12), 1 - 1e-12)) + side) for side in (-reach, reach))
    without, with_it = (_left_out(outcome, columns) for columns in (others, np.column_stack([others, quantity])))
    return Prediction(
        _correlation(ranks[0], ranks[1]), partial, low, high, float(2 * scipy.stats.t.sf(abs(t), freedom)),
        1 - with_it / without if without > 0 else 0.0, count,
    )  # fmt: skip


def detectable(count: int, *, controls: int = 0, power: float = 0.8, level: float = 0.05) -> float:
    """Returns the smallest partial rank correlation in [0, 1] that so many units decide with a probability ``power``.

    By Fisher's z, two-sided at ``level``.

    Raises:
        ValueError: fewer than controls + 4 units.
    """
    if count < controls + 4:
        raise ValueError(f"count: got {count}, expected at least {controls + 4}")
    reach = scipy.stats.norm.ppf(1 - level / 2) + scipy.stats.norm.ppf(power)
    return math.tanh(reach * math.sqrt(1.06 / (count - controls - 3)))


def _rest(values: Float[np.ndarray, " n"], columns: Float[np.ndarray, "n k"]) -> Float[np.ndarray, " n"]:
    """What a linear fit of the columns leaves."""
    return values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0]


def _correlation(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"]) -> float:
    # What a fit leaves of a column that it has is rounding.
    if min(np.std(x), np.std(y)) < 1e-9 * len(x):
        return math.nan
    return float(np.clip(np.corrcoef(x, y)[0, 1], -1, 1))


def _left_out(outcome: Float[np.ndarray, " n"], columns: Float[np.ndarray, "n k"]) -> float:
    """Mean squared error of predicting each unit by a linear fit to the others."""
    design = np.column_stack([np.ones(len(outcome)), columns])
    errors = []
    for unit in range(len(outcome)):
        rest = np.arange(len(outcome)) != unit
        fit = np.linalg.lstsq(design[rest], outcome[rest], rcond=None)[0]
        errors.append((outcome[unit] - design[unit] @ fit) ** 2)
    return float(np.mean(errors))

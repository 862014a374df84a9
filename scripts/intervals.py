"""Bootstrap intervals over prompts or repetitions, and the gate that judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SEED = 164
RESAMPLES = 10_000

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def draws(n: int, *, resamples: int = RESAMPLES, seed: int = SEED) -> npt.NDArray[np.int64]:
    """Which of ``n`` prompts each resample consists of, int64 ``[resamples, n]``; the same for the same arguments."""
    return np.random.default_rng(seed).integers(0, n, (resamples, n))


def ratio(numerators: Sequence[float], denominators: Sequence[float], scale: float = 1.0) -> Interval:
    """Sum of numerators / sum of denominators over prompts, times ``scale``."""
    return ratio_difference((numerators, denominators), ([0.0] * len(numerators), [1.0] * len(numerators)), scale)


def ratio_difference(
    a: tuple[Sequence[float], Sequence[float]], b: tuple[Sequence[float], Sequence[float]], scale: float = 1.0
) -> Interval:
    """Ratio of sums of ``a`` less that of ``b``, paired: each resample takes the same prompts on both sides."""
    columns = [np.asarray(column, np.float64) for pair in (a, b) for column in pair]
    n = len(columns[0])
    if n == 0 or any(len(column) != n for column in columns):
        raise ValueError(f"columns of {[len(column) for column in columns]} prompts; equal numbers, and one at least")
    chosen = draws(n)

    def difference(x: Numbers, y: Numbers, u: Numbers, v: Numbers) -> Numbers:
        # A sum of denominators is 0 only where nothing was drafted at all: the ratio is then 0.
        with np.errstate(divide="ignore", invalid="ignore"):
            left, right = np.where(y > 0, x / y, 0.0), np.where(v > 0, u / v, 0.0)
        return scale * (left - right)

    value = float(difference(*(column.sum() for column in columns)))
    low, high = np.percentile(difference(*(column[chosen].sum(axis=1) for column in columns)), [2.5, 97.5])
    return Interval(value, float(low), float(high))


def median_interval(values: npt.ArrayLike) -> Interval:
    """The median of one-dimensional ``values``, one at least."""
    column = np.asarray(values, np.float64)
    if column.ndim != 1 or not column.size:
        raise ValueError(f"values of shape {column.shape}; one dimension with one value at least was expected")
    low, high = np.percentile(np.median(column[draws(len(column))], axis=1), [2.5, 97.5])
    return Interval(float(np.median(column)), float(low), float(high))


PASS, OPEN, FAIL = "pass", "open", "FAIL"


def gate(difference: Interval, limit: float) -> str:
    """Judge a loss, ``difference`` to the reference (negative: worse), against the largest that is allowed.

    FAIL: the loss and its whole interval lie beyond the limit. "pass": the whole interval lies within it. "open": the limit lies inside
    the interval; more prompts would tell, and the gate does not fail.
    """
    if difference.high < -limit:
        return FAIL
    return PASS if difference.low >= -limit else OPEN

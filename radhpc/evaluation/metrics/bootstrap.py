"""Computes confidence intervals and comparisons by resampling patients: one patient's studies are correlated.

    f1 = Sums(rows, lambda sums: 2 * sums[..., 0] / sums[..., 1])      # rows: (n, 2), what each row adds
    value(f1)                                                          # over all rows
    interval(f1, patients)                                             # 95%, over patients
    compare(f1, f1_of_another_run, patients)                           # on the same rows

Enters: a statistic, which can be evaluated for any weights of its rows. Leaves: numbers. The percentile
bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993) draws patients with replacement, each with all
of its rows; a draw is a weight for each row, so that a thousand of them are a few matrix products.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

REPLICATES = 1000
_BLOCK = 100  # replicates at a time: their weights take BLOCK times the rows times eight bytes

Array = npt.NDArray[np.float64]


class Statistic(Protocol):
    """A number computed from n rows, each of which may count more than once or not at all."""

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def at(self, weights: Array) -> Array:
        """Return its values, shape (replicates,), for weights of shape (replicates, n); NaN where it is undefined."""
        ...


@dataclass(frozen=True)
class Sums:
    """A statistic that is a function of sums over rows: means, ratios, BLEU, every F1."""

    rows: Array  # (n, k): what each row adds
    finish: Callable[[Array], Any]  # sums of shape (..., k) -> values of shape (...)

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, weights: Array) -> Array:
        return np.asarray(self.finish(weights @ self.rows), np.float64)


def mean(values: Sequence[float] | Array) -> Sums:
    """Return the mean of one number per row."""
    column = np.asarray(values, np.float64)
    return Sums(np.stack([column, np.ones_like(column)], 1), ratio)


def ratio(sums: Array) -> Array:
    """Divide the first sum by the second; zero where that is zero."""
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] != 0)


def value(statistic: Statistic) -> float:
    """Return the statistic over all rows, each counted once."""
    return float(statistic.at(np.ones((1, len(statistic))))[0])


def interval(
    statistic: Statistic, patients: Sequence[str], replicates: int = REPLICATES, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Return (low, high), a function of rows and seed; None if no replicate has a value."""
    values = np.concatenate([statistic.at(weights) for weights in draws(patients, replicates, seed)])
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def compare(
    left: Statistic, right: Statistic, patients: Sequence[str], replicates: int = REPLICATES, seed: int = 0
) -> dict[str, float]:
    """Compare two systems on the same rows by the paired bootstrap over patients (Koehn, EMNLP 2004).

    difference: left minus right; low, high: its 95% interval; p: two-sided, twice the smaller share of the
    replicates on either side of zero, one added to both so that it is never zero.
    """
    assert len(left) == len(right) == len(patients)
    differences = np.concatenate(
        [left.at(weights) - right.at(weights) for weights in draws(patients, replicates, seed)]
    )
    differences = differences[np.isfinite(differences)]
    difference = value(left) - value(right)
    if not len(differences):
        return {"difference": difference, "low": difference, "high": difference, "p": 1.0}
    low, high = np.quantile(differences, [0.025, 0.975])
    tail = (1 + min(int((differences <= 0).sum()), int((differences >= 0).sum()))) / (1 + len(differences))
    return {"difference": difference, "low": float(low), "high": float(high), "p": min(1.0, 2 * tail)}


def draws(patients: Sequence[str], replicates: int, seed: int) -> Iterator[Array]:
    """Yield blocks of weights, (block, rows): how often each row's patient was drawn."""
    names, which = np.unique(np.asarray(patients, str), return_inverse=True)
    random = np.random.default_rng(seed)
    for start in range(0, replicates, _BLOCK):
        block = min(_BLOCK, replicates - start)
        drawn = random.multinomial(len(names), np.full(len(names), 1 / len(names)), size=block)
        yield drawn[:, which].astype(np.float64)

"""Confidence intervals that respect that one patient's studies are alike."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

Row = TypeVar("Row")


def interval(
    rows: Sequence[Row],
    patients: Sequence[str],
    statistic: Callable[[list[Row]], float],
    replicates: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile bootstrap over patients (Efron and Tibshirani, 1993): patients are drawn with replacement, each with
    all of its rows. Returns (low, high).
    """
    groups: dict[str, list[Row]] = defaultdict(list)
    for row, patient in zip(rows, patients, strict=True):
        groups[patient].append(row)
    drawn_from = list(groups.values())
    random = np.random.default_rng(seed)
    values = [
        statistic(
            [row for group in random.integers(len(drawn_from), size=len(drawn_from)) for row in drawn_from[group]]
        )
        for _ in range(replicates)
    ]
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

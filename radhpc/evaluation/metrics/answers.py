"""Scores answers by exact match, and findings by how well their probabilities separate present from absent.

    exact_match("Yes.", "yes")                                  # True: words in lower case, without punctuation
    value(auroc(probabilities, truth))                          # truth: 1, 0, or NaN if unknown

All are statistics of bootstrap.py, so each has an interval by patient.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from radhpc.evaluation.metrics.bootstrap import Array, Statistic, Sums
from radhpc.evaluation.metrics.text import words


def exact_match(generated: str, reference: str) -> bool:
    """Return whether both have the same words, in lower case and without punctuation."""
    return words(generated) == words(reference)


@dataclass(frozen=True)
class Ranked:
    """A statistic of how probabilities rank present findings before absent ones."""

    probabilities: Array  # (n,)
    truth: Array  # (n,): 1, 0, NaN
    of_curve: Callable[[Array, Array], Array]  # true and false positives at each threshold, (replicates, thresholds)

    def __len__(self) -> int:
        return len(self.truth)

    def at(self, weights: Array) -> Array:
        known = np.flatnonzero(np.isfinite(self.truth) & np.isfinite(self.probabilities))
        falling = known[np.argsort(-self.probabilities[known], kind="stable")]
        if not len(falling):
            return np.full(len(weights), np.nan)
        # Equal probabilities share a threshold: only the last of each is a point of the curve.
        last = np.append(np.flatnonzero(np.diff(self.probabilities[falling])), len(falling) - 1)
        true = np.cumsum(weights[:, falling] * self.truth[falling], 1)[:, last]
        false = np.cumsum(weights[:, falling] * (1 - self.truth[falling]), 1)[:, last]
        return self.of_curve(true, false)


def auroc(probabilities: Array, truth: Array) -> Ranked:
    """The area under the receiver operating characteristic (Hanley and McNeil, 1982); NaN without both classes."""
    return Ranked(probabilities, truth, _auroc)


def auprc(probabilities: Array, truth: Array) -> Ranked:
    """Average precision, as scikit-learn estimates the area under precision and recall; NaN without a positive."""
    return Ranked(probabilities, truth, _average_precision)


def _auroc(true: Array, false: Array) -> Array:
    zero = np.zeros((len(true), 1))
    rises, steps = np.concatenate([zero, true], 1), np.diff(np.concatenate([zero, false], 1), axis=1)
    area = (steps * (rises[:, :-1] + rises[:, 1:]) / 2).sum(1)
    pairs = true[:, -1] * false[:, -1]
    return np.asarray(np.divide(area, pairs, out=np.full(len(true), np.nan), where=pairs > 0))


def _average_precision(true: Array, false: Array) -> Array:
    drawn = true + false
    precision = np.divide(true, drawn, out=np.zeros_like(true), where=drawn > 0)
    gained = np.diff(np.concatenate([np.zeros((len(true), 1)), true], 1), axis=1)
    area, positives = (gained * precision).sum(1), true[:, -1]
    return np.asarray(np.divide(area, positives, out=np.full(len(true), np.nan), where=positives > 0))


@dataclass(frozen=True)
class Mean:
    """The mean of several statistics of the same rows, over those that have a value."""

    parts: tuple[Statistic, ...]

    def __len__(self) -> int:
        return len(self.parts[0])

    def at(self, weights: Array) -> Array:
        values = np.stack([part.at(weights) for part in self.parts])
        count = np.isfinite(values).sum(0)
        total = np.where(np.isfinite(values), values, 0.0).sum(0)
        return np.asarray(np.divide(total, count, out=np.full(len(weights), np.nan), where=count > 0))


def label_counts(predicted: Sequence[set[str]], reference: Sequence[set[str]], names: Sequence[str]) -> Array:
    """Return (rows, names, 3): whether both have a name, how many of the two have it, whether the reference has it."""
    rows = np.zeros((len(predicted), len(names), 3))
    for row, own, expected in zip(rows, predicted, reference, strict=True):
        for cell, name in zip(row, names, strict=True):
            cell[:] = name in own and name in expected, (name in own) + (name in expected), name in expected
    return rows


def label_f1(counts: Array, average: str) -> Sums:
    """F1 over label_counts(): "micro"; "macro", over the names that the references have; "all", over all the names."""
    rows, names, _ = counts.shape

    def finish(sums: Array) -> Array:
        both, either, present = np.moveaxis(sums.reshape(*sums.shape[:-1], names, 3), -1, 0)
        if average == "micro":
            both, either = both.sum(-1), either.sum(-1)
        each = np.divide(2 * both, either, out=np.zeros_like(both), where=either > 0)
        if average == "micro":
            return np.asarray(each)
        counted = np.ones_like(present) if average == "all" else (present > 0).astype(float)
        count = counted.sum(-1)
        return np.asarray(np.divide((each * counted).sum(-1), count, out=np.zeros_like(count), where=count > 0))

    return Sums(counts.reshape(rows, -1), finish)

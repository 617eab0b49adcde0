"""Rows of an evaluation to scores: the model beside trivial baselines and other runs, with intervals by patient.

    measured = Scoring(settings).measures(rows)          # name -> Measure, as far as these rows allow
    scores(measured, rows)                               # name -> {value, low, high, convention, weights}
    compare(rows, rows_of_another_run, ...)              # name -> {difference, low, high, p}

Enters: what was generated, beside what it should be. Leaves: numbers, each with the words that say what it is. Nothing
here touches the model that is evaluated.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radhpc.core.errors import UserError
from radhpc.core.files import read_json, read_lines
from radhpc.core.recipe import EvaluationSettings
from radhpc.evaluation.metrics import answers, bootstrap, conventions, findings, text
from radhpc.evaluation.metrics.conventions import Measure
from radhpc.evaluation.metrics.scorers import ModelScorers

Scores = dict[str, dict[str, Any]]
Floats = npt.NDArray[np.float64]
# Classifiers of findings: the field of a Row, the prefix of its scores' names, and a description.
CLASSIFIERS = {
    "likelihoods": ("", "likelihood of 'yes' against 'no'"),
    "head": ("head_", "probability by the multi-label head"),
}
RULE = "findings read back from the text by rule"
NORMAL_NAMES = (*findings.NAMES, findings.NORMAL)


@dataclass(frozen=True)
class Row:
    """One study, answered. What `reports.jsonl` holds, but for the picture."""

    key: str
    patient: str
    study: str
    dataset: str
    question: str | None
    reference: str
    generated: str
    labels: dict[str, dict[str, int | None]]
    likelihoods: dict[str, float] | None = None  # of yes, by finding, where Evaluation.findings_question asks
    thumbnail: str = ""  # see retrieval.py
    head: dict[str, float] | None = None  # probabilities by finding, of the multi-label head, where a stage trains one

    @property
    def findings(self) -> frozenset[str] | None:
        """The findings a phantom was drawn with; None where they are not known."""
        drawn = self.labels.get("phantom")
        return None if drawn is None else frozenset(name for name, value in drawn.items() if value == 1)

    @property
    def closed(self) -> bool:
        """Return whether the question is closed: by its dataset's own label, or because the answer is yes or no."""
        known = self.labels.get("answer type")
        return bool(known["closed"]) if known and "closed" in known else text.words(self.reference) in (["yes"], ["no"])

    def public(self) -> dict[str, Any]:
        """Return the row as reports.jsonl holds it."""
        data = asdict(self)
        del data["thumbnail"]
        return {**data, "findings": sorted(self.findings or ())}


class Scoring:
    """The scores of an evaluation's settings, and what is missing to compute them."""

    def __init__(self, settings: EvaluationSettings, every_convention: bool = False, device: str = "cpu") -> None:
        """`every_convention`: all that papers use, and METEOR; otherwise those of the settings."""
        self.settings = settings
        self.conventions = tuple(conventions.CONVENTIONS) if every_convention else settings.conventions
        self.meteor = every_convention
        self.model_scorers = ModelScorers(settings.scorers.folders(), settings.scorers.sha256, device)

    def measures(self, rows: Sequence[Row], model: bool = True) -> dict[str, Measure]:
        """Compute every score that these rows allow. `model`: False for a baseline, which gets no slow scores."""
        result = {"token_f1": _token_f1(rows, "words as bags, lower case")}
        reports = [row for row in rows if row.question is None]
        if reports:
            result |= self._texts(rows, model)
        result |= _by_rule(rows)
        if len(reports) < len(rows):
            result |= _questions(rows)
        if model:
            for kind in CLASSIFIERS:
                result |= _classified(rows, kind)
        return result

    def _texts(self, rows: Sequence[Row], model: bool) -> dict[str, Measure]:
        """Score the rows without a question, as statistics over all rows: all are resampled together."""
        reports = [n for n, row in enumerate(rows) if row.question is None]
        generated, references = [rows[n].generated for n in reports], [rows[n].reference for n in reports]
        result: dict[str, Measure] = {}
        for name in self.conventions:
            if conventions.missing(name) is None:
                measured = conventions.measures(name, generated, references)
                result |= {f"{name}/{kind}": measure for kind, measure in measured.items()}
        if self.meteor and model:
            available = [name for name in self.conventions if conventions.missing(name, meteor=True) is None]
            by_name = conventions.meteor(dict.fromkeys(available, (generated, references))) if available else {}
            result |= {f"{name}/meteor": measure for name, measure in by_name.items()}
        result |= self.model_scorers.measures(generated, references)
        return {
            name: replace(measure, statistic=_Some(measure.statistic, reports, len(rows)))
            for name, measure in result.items()
        }

    def missing(self) -> dict[str, str]:
        """Return by score, or group of scores, what has to be installed or put where."""
        result = {f"{name}/*": why for name in self.conventions if (why := conventions.missing(name))}
        if self.meteor:
            lacks = {name: conventions.missing(name, meteor=True) for name in self.conventions}
            result |= {f"{name}/meteor": why for name, why in lacks.items() if why and f"{name}/*" not in result}
        return result | {f"{name}/*": why for name, why in self.model_scorers.missing().items()}


@dataclass(frozen=True)
class _Some:
    """A statistic of some of the rows, resampled with all of them."""

    inner: bootstrap.Statistic
    rows: list[int]
    count: int

    def __len__(self) -> int:
        return self.count

    def at(self, weights: bootstrap.Array) -> bootstrap.Array:
        return self.inner.at(weights[:, self.rows])


def scores(measured: Mapping[str, Measure], rows: Sequence[Row], limits: bool = True) -> Scores:
    """Return values with 95% intervals over patients, without undefined scores such as the AUROC of one class."""
    patients = [row.patient for row in rows]
    result: Scores = {}
    for name, measure in measured.items():
        value = bootstrap.value(measure.statistic)
        if not np.isfinite(value):
            continue
        low, high = (limits and bootstrap.interval(measure.statistic, patients)) or (None, None)
        result[name] = {"value": value, "low": low, "high": high, "convention": measure.convention}
        if measure.weights is not None:
            result[name]["weights"] = measure.weights
    return result


def _token_f1(rows: Sequence[Row], about: str, some: Sequence[int] | None = None) -> Measure:
    each = [text.token_f1(row.generated, row.reference) for row in rows]
    return Measure(_mean_of(each, some), about)


def _mean_of(values: Sequence[float], some: Sequence[int] | None) -> bootstrap.Statistic:
    """Return the mean over all rows, or over some of them."""
    mean = bootstrap.mean(values)
    if some is None:
        return mean
    kept = np.zeros((len(values), 1))
    kept[list(some)] = 1
    return bootstrap.Sums(mean.rows * kept, mean.finish)


def _by_rule(rows: Sequence[Row]) -> dict[str, Measure]:
    """Score the findings of phantoms, which are read back from the text by rule."""
    known = [n for n, row in enumerate(rows) if row.findings is not None and row.question is None]
    if not known:
        return {}
    predicted = [findings.read(rows[n].generated) or {findings.NORMAL} for n in known]
    expected = [set(rows[n].findings or ()) or {findings.NORMAL} for n in known]
    counts = np.zeros((len(rows), len(NORMAL_NAMES), 3))
    counts[known] = answers.label_counts(predicted, expected, NORMAL_NAMES)
    return {
        "findings_macro_f1": Measure(answers.label_f1(counts, "macro"), f"{RULE}, macro over the labels present"),
        **{
            f"findings_f1/{name}": Measure(answers.label_f1(counts[:, [n]], "micro"), RULE)
            for n, name in enumerate(NORMAL_NAMES)
        },
        "findings_f1/micro": Measure(answers.label_f1(counts, "micro"), RULE),
    }


def _questions(rows: Sequence[Row]) -> dict[str, Measure]:
    """Compute exact match and token F1 over all questions, the open ones and the closed ones."""
    groups = {
        "": [n for n, row in enumerate(rows) if row.question is not None],
        "open_": [n for n, row in enumerate(rows) if row.question is not None and not row.closed],
        "closed_": [n for n, row in enumerate(rows) if row.question is not None and row.closed],
    }
    match = [float(answers.exact_match(row.generated, row.reference)) for row in rows]
    result = {}
    for name, some in groups.items():
        if some:
            about = f"{len(some)} {name.replace('_', ' ')}questions; lower case, no punctuation"
            result[f"vqa/{name}exact_match"] = Measure(_mean_of(match, some), f"share of equal answers; {about}")
            result[f"vqa/{name}token_f1"] = _token_f1(rows, f"words as bags; {about}", some)
    return result


def classified(rows: Sequence[Row], kind: str) -> dict[str, tuple[Floats, Floats]]:
    """Return by finding the probabilities (rows,) of a kind of CLASSIFIERS and the truth (rows,): 1, 0, or NaN if
    either is unknown.
    """
    values = [getattr(row, kind) or {} for row in rows]
    result = {}
    for name in sorted({name for each in values for name in each}):
        probabilities = np.asarray([each.get(name, np.nan) for each in values])
        truth = np.asarray([_truth(row, name) for row in rows])
        truth[~np.isfinite(probabilities)] = np.nan
        result[name] = probabilities, truth
    return result


def _classified(rows: Sequence[Row], kind: str) -> dict[str, Measure]:
    """Compute AUROC, AUPRC and F1 of each finding, from the likelihood of yes against no or from the head."""
    prefix, how = CLASSIFIERS[kind]
    about = f"{how}; unsaid labels count as absent, uncertain ones are left out; F1 above 0.5"
    result: dict[str, Measure] = {}
    parts: dict[str, list[bootstrap.Statistic]] = defaultdict(list)
    for name, (probabilities, truth) in classified(rows, kind).items():
        known = np.isfinite(truth)
        present, predicted = known & (truth == 1), known & (probabilities > 0.5)
        counts = np.stack([present & predicted, present.astype(int) + predicted, present], 1).astype(float)[:, None]
        kinds: dict[str, bootstrap.Statistic] = {
            "auroc": answers.auroc(probabilities, truth),
            "auprc": answers.auprc(probabilities, truth),
            "f1": answers.label_f1(counts, "micro"),
        }
        for score, statistic in kinds.items():
            if present.any():
                parts[score].append(statistic)
                result[f"{prefix}{score}/{name}"] = Measure(statistic, about)
    macro = {
        f"{prefix}{score}/macro": Measure(answers.Mean(tuple(each)), f"mean of findings; {about}")
        for score, each in parts.items()
    }
    return macro | result


def _truth(row: Row, name: str) -> float:
    for values in row.labels.values():
        if name in values:
            value = values[name]
            return float("nan") if value == -1 else float(value or 0)
    return float("nan")


def trivial(rows: Sequence[Row], known: Sequence[tuple[str | None, str]]) -> dict[str, list[str]]:
    """Return trivial baselines from training studies (question, text): the commonest report for everybody, or the
    commonest answer to the same question; and a random one for each.
    """
    reports = [answer for question, answer in known if question is None and answer]
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in known:
        if question is not None and answer:
            by_question[question.strip().lower()][answer] += 1
    every: Counter[str] = sum(by_question.values(), Counter())
    usual = Counter(reports).most_common(1)[0][0] if reports else ""
    random = np.random.default_rng(0)

    def constant(row: Row) -> str:
        if row.question is None:
            return usual
        same = by_question.get(row.question.strip().lower()) or every
        return same.most_common(1)[0][0] if same else ""

    def drawn(row: Row) -> str:
        among = reports if row.question is None else list(every.elements())
        return among[int(random.integers(len(among)))] if among else ""

    return {"constant": list(map(constant, rows)), "random": list(map(drawn, rows))}


def with_answers(rows: Sequence[Row], texts: Sequence[str]) -> list[Row]:
    """Return the same studies with other answers."""
    return [
        replace(row, generated=answer, likelihoods=None, head=None) for row, answer in zip(rows, texts, strict=True)
    ]


def load_rows(folder: Path) -> list[Row]:
    """Read the rows of a finished evaluation. Raises UserError."""
    names = set(Row.__dataclass_fields__)
    try:
        return [Row(**{k: v for k, v in line.items() if k in names}) for line in read_lines(folder / "reports.jsonl")]
    except (TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{folder}/reports.jsonl: not what this version of 'evaluate' writes; evaluate again"
        ) from error


def newest_evaluation(run: Path, split: str) -> Path:
    """Return the folder of a run's last evaluation of a split. Raises UserError."""
    candidates = [
        (int(scores["step"]), -len(path.parent.name), path.parent)
        for path in (run / "evaluation").glob("step-*/scores.json")
        if (scores := read_json(path)) and scores["split"] == split
    ]
    if not candidates:
        raise UserError(f"{run}: no evaluation of split '{split}' there; 'radhpc evaluate {run} --split {split}' first")
    step = max(candidates)[0]
    # Of two of the same step the one with more studies.
    return max((len(load_rows(path)), path) for at, _, path in candidates if at == step)[1]


def compare(rows: Sequence[Row], others: Sequence[Row], scoring: Scoring, where: str) -> dict[str, Any]:
    """Compare two runs on the studies that both have, by the paired bootstrap over patients. Raises UserError if
    there are none, or if the references differ.
    """
    own, theirs = {row.key: row for row in rows}, {row.key: row for row in others}
    keys = sorted(own.keys() & theirs.keys())
    if not keys:
        raise UserError(f"--against {where}: no study in common")
    if other := [key for key in keys if own[key].reference != theirs[key].reference]:
        raise UserError(
            f"--against {where}: {len(other)} of {len(keys)} studies have other references there: {other[0]}"
        )
    left, right = [own[key] for key in keys], [theirs[key] for key in keys]
    measured, known = scoring.measures(left), scoring.measures(right)
    patients = [row.patient for row in left]
    return {
        "against": where,
        "test": "paired bootstrap by patient, 1000 replicates, two-sided",
        "samples": len(keys),
        "scores": {
            name: bootstrap.compare(measure.statistic, known[name].statistic, patients)
            for name, measure in measured.items()
            if name in known
            and np.isfinite(bootstrap.value(measure.statistic) - bootstrap.value(known[name].statistic))
        },
    }

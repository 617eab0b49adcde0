"""What a model is worth on held-out studies: generated reports against the references, beside trivial baselines.

Writes evaluation/step-N/: reports.jsonl (key, reference, generated), scores.json and table.md. Each score says by its
convention what it is; low and high are a 95% bootstrap interval over patients.
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from radhpc import order
from radhpc.background import beside
from radhpc.board import panel
from radhpc.collate import Encoded, Encoder
from radhpc.dist import Ranks
from radhpc.engine import Engine
from radhpc.errors import UserError
from radhpc.files import write_atomically
from radhpc.generate import generate
from radhpc.metrics import findings, text
from radhpc.metrics.bootstrap import interval
from radhpc.recipe import Evaluation
from radhpc.sample import Sample
from radhpc.source import BadSample, Source, Study
from radhpc.stop import Stop

log = logging.getLogger("radhpc")

BASELINE = 4096  # training reports that the baselines are made of

Scores = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One study, answered."""

    key: str
    patient: str
    reference: str
    generated: str
    findings: frozenset[str] | None  # known findings of a phantom; None where they are not known


@dataclass(frozen=True)
class Result:
    """An evaluation; complete on rank 0 only."""

    scores: Scores
    baselines: dict[str, Scores]  # "constant" and "random"
    rows: list[Row]
    pictures: list[np.ndarray[Any, Any]]
    bad: list[str]  # keys of studies that could not be read and are left out


def chosen(source: Source, samples: int | None) -> list[int]:
    """The studies of an evaluation: always the same ones, spread over the split."""
    count = min(samples or len(source), len(source))
    return [int(n) for n in order.permute(np.arange(count), len(source), order.number("evaluation"))]


def evaluate(
    engine: Engine,
    encoder: Encoder,
    held_out: Source,
    training: Source,
    recipe: Evaluation,
    ranks: Ranks,
    check: Callable[[int], None] = lambda done: None,
    stop: Stop | None = None,
) -> Result:
    """Generate for the chosen studies, on all ranks, and score on rank 0. `stop` ends it by Interrupted."""
    stop = stop or Stop()
    numbers = chosen(held_out, recipe.samples)

    def read() -> tuple[list[Study], list[str], list[Encoded]]:
        mine, bad = _read(held_out, numbers[ranks.rank :: ranks.world])
        return mine, bad, [encoder.encode_prompt(key, sample.question, views, sample) for key, sample, views in mine]

    mine, bad, prompts = beside(read, ranks, stop) or ([], [], [])
    generated = generate(engine, encoder, prompts, recipe.batch, recipe.max_new_tokens, ranks, check)
    loss, tokens = _loss(engine, encoder, mine, recipe.batch, ranks, stop)
    rows = [
        Row(key, sample.patient, encoder.answer(sample), text, known_findings(sample))
        for (key, sample, _), text in zip(mine, generated, strict=True)
    ]
    pictures = [
        panel(views, {"Reference": row.reference, "Generated": row.generated})
        for row, (_, _, views) in zip(rows[: recipe.images], mine, strict=False)
    ]
    every_rank = ranks.gather((rows, bad))
    rows = sorted((row for rows, _ in every_rank for row in rows), key=lambda row: row.key)
    bad = sorted(key for _, keys in every_rank for key in keys)
    if not rows:
        raise UserError(
            f"evaluation: none of {len(numbers)} studies could be read; 'launch.py verify' names every fault"
        )

    def scored() -> Result:
        scores = {"loss": _score(loss / max(1, tokens), None, "nats per supervised token"), **score(rows)}
        baselines = {
            name: score(
                [Row(r.key, r.patient, r.reference, text, r.findings) for r, text in zip(rows, texts, strict=True)]
            )
            for name, texts in trivial(encoder, training, len(rows)).items()
        }
        return Result(scores, baselines, rows, pictures, bad)

    return beside(scored if ranks.first else None, ranks, stop) or Result({}, {}, [], [], [])


def _read(source: Source, numbers: list[int]) -> tuple[list[Study], list[str]]:
    """The studies, and the keys of those that are damaged."""
    studies, bad = [], []
    for number in numbers:
        try:
            studies.append(source.read(number))
        except BadSample as error:
            log.warning("left out of the evaluation: %s", error)
            bad.append(error.key)
    return studies, bad


def known_findings(sample: Sample) -> frozenset[str] | None:
    """The findings a phantom was drawn with."""
    labels = sample.labels.get("phantom")
    return None if labels is None else frozenset(name for name, value in labels.items() if value == 1)


def trivial(encoder: Encoder, training: Source, count: int) -> dict[str, list[str]]:
    """What costs nothing: the commonest training report for everybody, and a random training report for each."""
    some = order.permute(np.arange(min(BASELINE, len(training))), len(training), order.number("baseline"))
    texts = [text for text in map(encoder.answer, training.samples(np.sort(some))) if text]
    random = np.random.default_rng(0)
    return {
        "constant": [Counter(texts).most_common(1)[0][0]] * count,
        "random": [texts[n] for n in random.integers(len(texts), size=count)],
    }


def score(rows: list[Row]) -> Scores:
    """Every score that these rows allow."""
    patients = [row.patient for row in rows]

    def token_f1(rows: list[Row]) -> float:
        return float(np.mean([text.token_f1(row.generated, row.reference) for row in rows]))

    scores = {"token_f1": _score(token_f1(rows), interval(rows, patients, token_f1), "words as bags, lower case")}
    known = [row for row in rows if row.findings is not None]
    if known:
        names = (*findings.NAMES, "normal")
        read = [(set(findings.read(row.generated)), set(row.findings or ())) for row in known]
        f1 = findings.f1([mine for mine, _ in read], [wanted for _, wanted in read], names)
        limits = interval(read, [row.patient for row in known], lambda rows: _macro(rows, names), replicates=100)
        rule = "findings read back from the text by rule, macro over the labels present"
        scores["findings_macro_f1"] = _score(f1["macro"], limits, rule)
        for name, value in f1.items():
            if name != "macro":
                scores[f"findings_f1/{name}"] = _score(value, None, "findings read back from the text by rule")
    return scores


def _macro(rows: list[tuple[set[str], set[str]]], names: tuple[str, ...]) -> float:
    return findings.f1([mine for mine, _ in rows], [wanted for _, wanted in rows], names)["macro"]


def write(folder: Path, result: Result, step: int, split: str) -> None:
    """Write the three files; scores.json last, so that an evaluation with scores is a whole one."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = [
        {"key": row.key, "reference": row.reference, "generated": row.generated, "findings": sorted(row.findings or ())}
        for row in result.rows
    ]
    write_atomically(folder / "reports.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode(), 0o600)
    write_atomically(
        folder / "table.md", "\n".join([f"# Step {step}, split {split}", "", *table(result)]).encode(), 0o600
    )
    summary = {
        "step": step,
        "split": split,
        "samples": len(result.rows),
        "left_out": result.bad,
        "scores": result.scores,
        "baselines": result.baselines,
    }
    write_atomically(folder / "scores.json", (json.dumps(summary, indent=1) + "\n").encode(), 0o600)


def table(result: Result) -> Iterator[str]:
    """The scores beside the baselines, as Markdown lines."""
    yield "| score | model | 95% interval | constant report | random report |"
    yield "|---|---|---|---|---|"
    for name, score in result.scores.items():
        limits = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
        others = [result.baselines[b].get(name, {}).get("value") for b in ("constant", "random")]
        cells = ["" if value is None else f"{value:.3f}" for value in others]
        yield f"| {name} | {score['value']:.3f} | {limits} | {cells[0]} | {cells[1]} |"


def _score(value: float, limits: tuple[float, float] | None, convention: str) -> dict[str, Any]:
    low, high = limits or (None, None)
    return {"value": value, "low": low, "high": high, "convention": convention}


def _loss(
    engine: Engine, encoder: Encoder, studies: list[Study], batch: int, ranks: Ranks, stop: Stop
) -> tuple[float, float]:
    """Summed loss and supervised tokens over all ranks, with as many forward passes on each."""
    (rounds,) = ranks.max([float(-(-len(studies) // batch))])
    loss, tokens = 0.0, 0
    for n in range(int(rounds)):
        stop.check(ranks.max)
        rows = [encoder.encode(*study) for study in studies[n * batch : (n + 1) * batch]] or [encoder.empty()]
        loss += engine.loss_sum(encoder.batch(rows))
        tokens += sum(row.supervised for row in rows)
    total, count = ranks.sum([loss, float(tokens)])
    return total, count

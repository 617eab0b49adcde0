"""Evaluates a model on held-out studies: generated answers against the references, beside trivial baselines.

    task = EvaluationTask(encoder, held_out, training, settings, folder, identity)
    result = evaluate(lambda: engine, task, ranks)
    write(folder, result, step, split)

Enters: a model, a split. Leaves, in evaluation/step-N/: reports.jsonl (a line per study), scores.json and table.md; and
generated/, in which every rank keeps what it has generated: a preemption loses none of it. The same code runs
between stages, every so many steps, and for `radhpc evaluate` (job.py).
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from radhpc.core.board import study_panel
from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.recipe import EvaluationSettings
from radhpc.data import sampler
from radhpc.data.collate import EncodedStudy, StudyEncoder
from radhpc.data.retrieval import RetrievalIndex, encode_thumbnail
from radhpc.data.source import BadSample, DecodedStudy, Source
from radhpc.distributed.background import run_in_background, run_on_first
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Stop
from radhpc.engine.fsdp import Engine
from radhpc.evaluation.generation import generate, likelihoods
from radhpc.evaluation.metrics.published import lines as published_lines
from radhpc.evaluation.predictions import Batch, PredictionLog
from radhpc.evaluation.scoring import Row, Scores, Scoring, scores, trivial as trivial_texts, with_answers

log = logging.getLogger("radhpc")

BASELINE = 4096  # training studies from which the constant and the random baseline are made
YES_NO = (("yes", "Yes"), ("no", "No"))


@dataclass(frozen=True)
class EvaluationTask:
    """An evaluation: its studies, its settings, and the folder of its results."""

    encoder: StudyEncoder
    held_out: Source
    training: Source  # for the baselines
    settings: EvaluationSettings
    folder: Path
    identity: str  # of the weights: texts that other weights have generated do not count
    scoring: Scoring | None = None  # default: by the settings


@dataclass(frozen=True)
class EvaluationResult:
    """An evaluation; complete on rank 0 only."""

    scores: Scores
    baselines: dict[str, Scores]  # "constant", "random" and "nearest"
    rows: list[Row]
    pictures: list[np.ndarray[Any, Any]]
    bad: list[str]  # keys of studies that could not be read and are left out
    split: str = ""
    missing: dict[str, str] = field(default_factory=dict)  # scores that need something: what to put where


def choose_studies(source: Source, samples: int | None) -> list[int]:
    """Return the studies of an evaluation: always the same ones, spread over the split."""
    count = min(samples or len(source), len(source))
    return [int(n) for n in sampler.permute(np.arange(count), len(source), sampler.number("evaluation"))]


def evaluate(
    engine: Callable[[], Engine],
    task: EvaluationTask,
    ranks: Ranks,
    check: Callable[[int], None] = lambda done: None,
    stop: Stop | None = None,
) -> EvaluationResult:
    """Generate for the chosen studies, on all ranks, and score on rank 0. `stop` ends it by Interrupted.

    `engine`: returns the model; called only if anything is left to generate. `check`: called on all ranks before each
    batch with the number of studies that are done.
    """
    stop, scoring = stop or Stop(), task.scoring or Scoring(task.settings)
    held_out, settings = task.held_out, task.settings
    numbers = choose_studies(held_out, settings.samples)
    predictions = PredictionLog(task.folder / "generated", ranks.rank)
    identity = _identity(task.identity, held_out, settings)
    earlier = run_on_first(lambda: predictions.begin(identity), ranks, stop)
    number_of = dict(zip(held_out.keys(np.asarray(numbers)), numbers, strict=True))
    done = {key for batch in earlier for key in (*(row["key"] for row in batch["rows"]), *batch["bad"])}
    left = [number for key, number in number_of.items() if key not in done]
    batches = _by_length(held_out, left, settings.batch)
    local, rounds = batches[ranks.rank :: ranks.world], -(-len(batches) // ranks.world)
    model = engine() if rounds else None
    now: list[Batch] = []
    for n in range(rounds):
        assert model is not None
        check(len(numbers) - len(left) + min(len(left), n * settings.batch * ranks.world))
        answered = _answer_batch(model, task, local[n] if n < len(local) else [], ranks, stop)
        if answered["rows"] or answered["bad"]:
            predictions.append(answered)
            now.append(answered)
    gathered = [*earlier, *(batch for theirs in ranks.gather(now) for batch in theirs)]
    rows = sorted(
        (Row(**row) for batch in gathered for row in batch["rows"] if row["key"] in number_of), key=lambda r: r.key
    )
    bad = sorted(key for batch in gathered for key in batch["bad"] if key in number_of)
    if not rows:
        raise UserError(f"evaluation: none of {len(numbers)} studies could be read; 'radhpc verify' names every fault")
    index = None
    if settings.neighbours and any(row.question is None for row in rows):
        index = RetrievalIndex.build(
            task.training, task.encoder.reference, settings.neighbours, task.folder.parents[1], ranks, stop
        )

    def score_all() -> EvaluationResult:
        loss, tokens = (sum(batch[name] for batch in gathered) for name in ("loss", "tokens"))
        nats = {"value": loss / max(1, tokens), "low": None, "high": None, "convention": "nats per supervised token"}
        baselines = {
            name: score(with_answers(rows, texts), scoring, model=False)
            for name, texts in trivial(task.encoder, task.training, rows, index).items()
        }
        pictures = _pictures(held_out, [number_of[row.key] for row in rows], rows, settings.images)
        return EvaluationResult(
            {"loss": nats, **score(rows, scoring)}, baselines, rows, pictures, bad, held_out.split, scoring.missing()
        )

    return run_in_background(score_all if ranks.first else None, ranks, stop) or EvaluationResult({}, {}, [], [], [])


def _identity(weights: str, source: Source, settings: EvaluationSettings) -> str:
    """Return the identity of the generated texts; more studies or other scores do not change it."""
    names = ("max_new_tokens", "findings_question", "findings_vocabulary")
    asked = {**{name: getattr(settings, name) for name in names}, **settings.decoding()}
    return json.dumps(
        {"weights": weights, "data": source.hashes, "split": source.split, "asked": asked}, sort_keys=True
    )


def _by_length(source: Source, numbers: Sequence[int], batch: int) -> list[list[int]]:
    """Return batches of studies with equally many images and texts of similar length, the longest first: little is
    padded, and the ranks take about equally long.
    """
    if not numbers:
        return []
    sizes = source.sizes(np.asarray(numbers))
    order = np.lexsort((np.asarray(numbers), -sizes[:, 1], -sizes[:, 0]))
    falling = [numbers[n] for n in order]
    return [falling[start : start + batch] for start in range(0, len(falling), batch)]


def _answer_batch(engine: Engine, task: EvaluationTask, numbers: list[int], ranks: Ranks, stop: Stop) -> Batch:
    """Generate for one batch of this rank, which may be empty, and measure its loss. Raises Interrupted."""
    encoder, source, settings = task.encoder, task.held_out, task.settings

    def read() -> tuple[list[DecodedStudy], list[str], list[EncodedStudy], list[tuple[str, str, EncodedStudy]]]:
        studies, bad = _read(source, numbers)
        prompts = [encoder.encode_prompt(key, sample.question, views, sample) for key, sample, views in studies]
        return studies, bad, prompts, list(_questions(encoder, studies, settings))

    studies, bad, prompts, questions = run_in_background(read, ranks, stop) or ([], [], [], [])
    if settings.temperature is not None and numbers:
        torch.manual_seed(sampler.number("evaluation", numbers[0]) % (1 << 63))
    texts = generate(
        engine, encoder, prompts, settings.batch, settings.max_new_tokens, ranks,
        given_up=lambda: bool(stop.poll()), **settings.decoding(),
    )  # fmt: skip
    stop.check(ranks.max)  # texts that a signal has cut short do not count
    loss, tokens, heads = _supervised_loss(engine, encoder, studies, ranks)
    shares: dict[str, dict[str, float]] = {}
    if settings.findings_question is not None:
        rows = [row for _, _, row in questions]
        probabilities = likelihoods(engine, encoder, rows, settings.batch, YES_NO, ranks)
        for (key, name, _), (yes, _) in zip(questions, probabilities, strict=True):
            shares.setdefault(key, {})[name] = yes
    answered = [
        Row(
            key, sample.patient, sample.study, sample.dataset, sample.question, encoder.reference(sample), text,
            sample.labels, shares.get(key), encode_thumbnail(views), head,
        )
        for (key, sample, views), text, head in zip(studies, texts, heads, strict=True)
    ]  # fmt: skip
    return {"rows": [asdict(row) for row in answered], "bad": bad, "loss": loss, "tokens": tokens}


def _questions(
    encoder: StudyEncoder, studies: Sequence[DecodedStudy], settings: EvaluationSettings
) -> Iterator[tuple[str, str, EncodedStudy]]:
    """Yield key, finding and prompt of each yes/no question about a study's labels."""
    if settings.findings_question is not None:
        for key, sample, views in studies:
            for name in sample.labels.get(settings.findings_vocabulary, ()) if sample.question is None else ():
                question = settings.findings_question.replace("{finding}", name)
                yield key, name, encoder.encode_prompt(key, question, encoder.order_views(views, sample))


def _read(source: Source, numbers: list[int]) -> tuple[list[DecodedStudy], list[str]]:
    """Read the studies; return them and the keys of those that are damaged."""
    studies, bad = [], []
    for number in numbers:
        try:
            studies.append(source.read(number))
        except BadSample as error:
            log.warning("left out of the evaluation: %s", error)
            bad.append(error.key)
    return studies, bad


def _supervised_loss(
    engine: Engine, encoder: StudyEncoder, studies: list[DecodedStudy], ranks: Ranks
) -> tuple[float, int, list[dict[str, float] | None]]:
    """Return summed loss and supervised tokens of this rank's batch, and each study's findings by the multi-label head
    if the stage trains one. All ranks make the same forward passes if any of them has studies.
    """
    if not ranks.max([float(len(studies))])[0]:
        return 0.0, 0, []
    rows = [encoder.encode(*study) for study in studies]
    batch = encoder.batch(rows or [encoder.empty()])
    loss = engine.loss_sum(batch)
    # The model may also have a head that only a later stage trains.
    predicted = engine.predict_findings(batch) if encoder.labelled else None
    if not rows:
        return 0.0, 0, []
    names = encoder.tasks.findings.names
    heads: list[dict[str, float] | None] = [None] * len(rows)
    if predicted is not None:
        heads = [dict(zip(names, (round(p, 6) for p in each), strict=True)) for each in predicted.tolist()]
    return loss, sum(row.supervised for row in rows), heads


def _pictures(source: Source, numbers: list[int], rows: Sequence[Row], count: int) -> list[np.ndarray[Any, Any]]:
    """Draw studies beside reference and generated text, for the board."""
    studies, _ = _read(source, numbers[:count])
    row_of = {row.key: row for row in rows}
    return [
        study_panel(views, {"Reference": row_of[key].reference, "Generated": row_of[key].generated})
        for key, _, views in studies
    ]


def trivial(
    encoder: StudyEncoder, training: Source, rows: Sequence[Row], index: RetrievalIndex | None = None
) -> dict[str, list[str]]:
    """Return the answers of scoring.trivial, and the report of the training study whose image is most similar."""
    some = sampler.permute(np.arange(min(BASELINE, len(training))), len(training), sampler.number("baseline"))
    known = [(sample.question, encoder.reference(sample)) for sample in training.samples(np.sort(some))]
    texts = trivial_texts(rows, known)
    if index is not None and index.texts:
        near = index.nearest([row.thumbnail for row in rows])
        pairs = zip(rows, near, texts["constant"], strict=True)
        texts["nearest"] = [report if row.question is None else answer for row, report, answer in pairs]
    return texts


def score(rows: Sequence[Row], scoring: Scoring, model: bool = True) -> Scores:
    """Compute every score that these rows allow; a baseline's scores have no intervals."""
    return scores(scoring.measures(rows, model), rows, limits=model)


def write(
    folder: Path, result: EvaluationResult, step: int, split: str, comparison: dict[str, Any] | None = None
) -> None:
    """Write the three files; scores.json last: an evaluation that has scores is complete."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lines = "".join(json.dumps(row.public()) + "\n" for row in result.rows)
    write_atomically(folder / "reports.jsonl", lines.encode(), 0o600)
    text = "\n".join([f"# Step {step}, split {split}", "", *table(result, comparison), ""])
    write_atomically(folder / "table.md", text.encode(), 0o600)
    summary = {
        "step": step,
        "split": split,
        "samples": len(result.rows),
        "datasets": sorted({row.dataset for row in result.rows}),
        "left_out": result.bad,
        "scores": result.scores,
        "baselines": result.baselines,
        "missing": result.missing,
        **({"comparison": comparison} if comparison else {}),
    }
    write_atomically(folder / "scores.json", (json.dumps(summary, indent=1) + "\n").encode(), 0o600)


def table(result: EvaluationResult, comparison: dict[str, Any] | None = None) -> Iterator[str]:
    """Yield the scores beside the baselines as Markdown; then comparison, published and missing scores."""
    names = list(result.baselines)
    yield f"| score | model | 95% interval |{''.join(f' {name} |' for name in names)}"
    yield "|---" * (3 + len(names)) + "|"
    for name, entry in result.scores.items():
        limits = "" if entry["low"] is None else f"{entry['low']:.3f} to {entry['high']:.3f}"
        others = [result.baselines[baseline].get(name, {}).get("value") for baseline in names]
        cells = ["" if value is None else f"{value:.3f}" for value in others]
        yield f"| {name} | {entry['value']:.3f} | {limits} |{''.join(f' {cell} |' for cell in cells)}"
    if comparison:
        yield from ("", f"Against {comparison['against']}: {comparison['test']}, {comparison['samples']} studies.", "")
        yield from ("| score | difference | 95% interval | p |", "|---|---|---|---|")
        for name, entry in comparison["scores"].items():
            limits = f"{entry['low']:+.3f} to {entry['high']:+.3f}"
            yield f"| {name} | {entry['difference']:+.3f} | {limits} | {entry['p']:.3f} |"
    yield from published_lines(result.scores, {row.dataset for row in result.rows}, result.split)
    yield from ("", "How each score is made:", "")
    made: dict[str, list[str]] = {}
    for name, entry in result.scores.items():
        digest = f"; weights sha256 {entry['weights']}" if "weights" in entry else ""
        made.setdefault(entry["convention"] + digest, []).append(name)
    for convention, alike in made.items():
        yield f"- {', '.join(alike)}: {convention}"
    for name, why in result.missing.items():
        yield f"- {name}: not scored: {why}"

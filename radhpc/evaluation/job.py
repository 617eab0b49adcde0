"""Evaluates in a job of its own: `radhpc evaluate RUN --on PROFILE`, on any number of ranks, preempted or not.

    RUN/evaluation/step-000430-test/          reports.jsonl, scores.json, table.md, report.html, generated/
    RUN/evaluation/step-000430-test/job/      recipe.yaml, evaluation.json, events.jsonl, logs/, code/: a run folder

The job's folder looks like a run's, so that submitting, requeueing and `status` treat it as one; evaluation.json says
what to do. slurm.evaluation writes it before anything is submitted, radhpc.worker calls `work` on every rank.
"""

import time
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.files import read_json
from radhpc.core.log import Bar
from radhpc.core.people import refuse_shared_patients
from radhpc.core.protocol import Event
from radhpc.core.recipe import EvaluationSettings
from radhpc.core.run_folder import EVALUATION, RunFolder
from radhpc.data.source import Source
from radhpc.distributed.background import run_in_background, run_on_first
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Stop
from radhpc.evaluation import evaluate, report_page, scoring
from radhpc.training.context import open_context
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import restore_engine
from radhpc.training.sources import open_source

PROGRESS = 10.0  # seconds between two records of what is done: a life that leaves none has made no progress


def work(job: RunFolder, ranks: Ranks, stop: Stop) -> int:
    """Evaluate by the job's evaluation.json; return the checkpoint's step. Raises UserError and Interrupted."""
    task: dict[str, Any] = ranks.broadcast(read_json(job.path / EVALUATION) if ranks.first else None)
    run = RunFolder.open(task["run"])
    settings = EvaluationSettings.model_validate(task["settings"])
    context = open_context(run, run.recipe(), ranks, stop)
    name, folder = task["checkpoint"], job.path.parent
    if fault := run_on_first(lambda: context.checkpoints.verify(name), ranks, stop):
        raise UserError(f"{context.checkpoints.storage.where(name)}: {fault}; evaluate again for the newest one")
    cursor = context.checkpoints.cursor(name)
    training = open_source(context, cursor.stage, "train")
    elsewhere = bool(task["shards"])
    held_out = Source(task["shards"], task["split"]) if elsewhere else open_source(context, cursor.stage, task["split"])
    if elsewhere:
        refuse_shared_patients([*{part.url: part for part in (*training.patients(), *held_out.patients())}.values()])
    _refuse_unasked(run.path, held_out, training)
    scorer = scoring.Scoring(settings, every_convention=task["every_convention"], device=str(ranks.device))
    run_on_first(lambda: scorer.model_scorers.hashes and None, ranks, stop)
    count, recorded = len(evaluate.choose_studies(held_out, settings.samples)), [0.0]
    with Bar("evaluate", count, unit="studies", hidden=not ranks.first) as bar:

        def check(done: int) -> None:
            ranks.watchdog.beat("evaluating", slow=True)
            stop.check(ranks.max)
            bar.update(done)
            now = time.monotonic()
            if ranks.first and now - recorded[0] > PROGRESS:
                recorded[0] = now
                job.record(Event.SAVED, step=done)  # reports, which slurm.requeue takes for progress
                job.write_progress(stage="evaluate", step=done, steps=count, world=ranks.world)

        ranks.watchdog.beat("loading", slow=True)
        result = evaluate.evaluate(
            lambda: restore_engine(context, name)[0],
            evaluate.EvaluationTask(
                build_encoder(context, cursor.stage),
                held_out,
                training,
                settings,
                folder,
                task["weights"],
                scorer,
            ),
            ranks,
            check,
            stop,
        )
        bar.update(count)

    def compared() -> dict[str, Any]:
        other = scoring.newest_evaluation(Path(task["against"]), task["split"])
        return scoring.compare(result.rows, scoring.load_rows(other), scorer, task["against"])

    comparison = run_in_background(compared if task["against"] and ranks.first else None, ranks, stop)
    if ranks.first:
        evaluate.write(folder, result, cursor.step, task["split"], comparison)
        report_page.write(folder, held_out)
        job.write_progress(stage="evaluate", step=count, steps=count, world=ranks.world)
        run.record(Event.EVALUATED, step=cursor.step, split=task["split"], samples=len(result.rows))
    return cursor.step


def _refuse_unasked(run: Path, held_out: Source, training: Source) -> None:
    """Raise UserError if the split asks questions and the model was trained on none."""
    import numpy as np

    def asks(source: Source) -> bool:
        some = np.unique(np.linspace(0, len(source) - 1, 64).astype(np.int64))
        return any(sample.question is not None for sample in source.samples(some))

    if asks(held_out) and not asks(training):
        raise UserError(
            f"{run}: split '{held_out.split}' asks questions, and no study of the stage's training data does; train a "
            "stage on questions first, or name other shards with --shards"
        )

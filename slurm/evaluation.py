"""Prepare the folder of an evaluation and its job: what `radhpc evaluate` does before anything is submitted.

    job = prepare(run, "step-000430", "9f86d0...", "test", [], settings, against=None)     # a RunFolder
    submit.submit(job, profile)

An interrupted evaluation goes on when the command is called again; one with other settings begins anew (generated.py).
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.recipe import EvaluationSettings, override
from radhpc.core.run_folder import EVALUATION, RunFolder
from slurm import scheduler


def settings_of(run: RunFolder, overrides: Sequence[str], samples: int | None) -> EvaluationSettings:
    """Return the evaluation section of a run's recipe, with changes such as `beams=3`; by default for all studies."""
    section = run.recipe().evaluation
    return override(section, overrides, "evaluation").model_copy(update={"samples": samples, "images": 0})


def prepare(
    run: RunFolder,
    checkpoint: str,
    weights: str,
    split: str,
    shards: Sequence[str],
    settings: EvaluationSettings,
    against: Path | None,
    every_convention: bool = True,
) -> RunFolder:
    """Make the job's folder. `weights`: the identity of the checkpoint; `shards`: others than the run's own.

    Raises UserError, also while a job works there.
    """
    folder = run.path / "evaluation" / f"{checkpoint}-{split}"
    if shards:
        folder = folder.with_name(f"{folder.name}-{'-'.join(_plain(url) for url in shards)}")
    job = RunFolder(folder / "job")
    scorers = {**settings.scorers.folders(), "sha256": settings.scorers.sha256}  # absolute: a job runs elsewhere
    task = {
        "run": str(run.path),
        "checkpoint": checkpoint,
        "weights": weights,
        "split": split,
        "shards": [url if "://" in url else str(Path(url).absolute()) for url in shards],
        "settings": {**settings.model_dump(mode="json"), "scorers": scorers},
        "every_convention": every_convention,
        "against": None if against is None else str(RunFolder.open(against).path),
    }
    try:
        job.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with job.lock("evaluate"):
            scheduler.refuse_if_alive(job)
            for name in ("code", "logs"):  # of an evaluation before this one
                shutil.rmtree(job.path / name, ignore_errors=True)
            for name in ("events.jsonl", "lease.json"):
                (job.path / name).unlink(missing_ok=True)
            (job.path / "logs").mkdir()
            write_atomically(job.path / EVALUATION, json.dumps(task, indent=1).encode(), 0o600)
            write_atomically(job.recipe_path, run.recipe_path.read_bytes())
    except OSError as error:
        raise UserError(f"{job.path}: {error.strerror}") from error
    return job


def _plain(url: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in url.rstrip("/").rsplit("/", 1)[-1])

"""How long `launch.py status` takes over many runs: the whole command, the queue asked once.

    python -m bench.status                 # a thousand runs of 300 events each, half of them in the queue
    python -m bench.status --quick --json

The run folders are made up, in the form that a job leaves; squeue is a stand-in that prints a row for each job, because
the question is what we add to it. The peer is one call per run, as `scontrol show job` for each would be.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import report

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 2.0  # seconds that a thousand runs may take


def make(folder: Path, runs: int, saves: int) -> None:
    """Run folders `run-0000`, ...: three lives of a job, `saves` checkpoints; every second one is in the queue."""
    folder.mkdir()
    for n in range(runs):
        run = folder / f"run-{n:05}"
        (run / "evaluation" / "step-000100").mkdir(parents=True)
        (run / "recipe.yaml").write_text("name: made-up\n")
        job = {"cluster": "slurm", "id": str(100_000 + n), "host": "login", "environment": {}}
        (run / "job.json").write_text(json.dumps(job))
        scores = {"step": 100, "split": "validate", "scores": {"f1": {"value": 0.5}}}
        (run / "evaluation" / "step-000100" / "scores.json").write_text(json.dumps(scores))
        progress = {"time": time.time(), "stage": "adapt", "step": 4000, "steps": 9000, "loss": 1.0, "world": 8}
        rates = {"samples_per_second": 99.0, "step_seconds": 0.5, "data_wait": 0.02, "device": "cuda"}
        (run / "progress.json").write_text(json.dumps(progress | rates))
        (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in _events(n, saves)))


def _events(n: int, saves: int) -> list[dict[str, object]]:
    job, second = str(100_000 + n), 0
    rows: list[tuple[str, dict[str, object]]] = [("submitted", {"job": job, "world": 8})]
    for life in range(3):
        rows += [("starting", {"job": job, "world": 8}), ("started", {"job": job, "world": 8, "life": life + 1})]
        rows += [("first_step", {"step": life * 1000 + 1, "seconds": 1.0})]
        each = saves // 3
        rows += [("saved", {"step": life * 1000 + at, "seconds": 0.5, "bytes": 10**8}) for at in range(each)]
        if life < 2:
            rows += [("preempted", {"job": job, "step": 1}), ("requeued", {"job": job, "cause": "preempted"})]
    if n % 2:
        rows.append(("finished", {"step": 9000}))
    found = []
    for name, details in rows:
        second += 20
        at = f"2026-11-{20 + second // 86400:02}T{second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}+00:00"
        found.append({"time": at, "event": name, **details})
    return found


def stand_in(folder: Path, runs: int) -> Path:
    """A squeue that prints a row for every job."""
    folder.mkdir()
    rows = "".join(f"{100_000 + n}|RUNNING|0|2026-11-22T10:00:00|None|\n" for n in range(runs) if n % 2 == 0)
    (folder / "rows").write_text(rows)
    (folder / "squeue").write_text(f"#!/bin/sh\nexec cat {folder}/rows\n")
    (folder / "squeue").chmod(0o755)
    return folder


def main() -> None:
    """Measure, and print a table and an object."""
    options = report.parser("status", __doc__, "a hundred runs").parse_args()
    runs, saves = (100, 60) if options.quick else (1000, 300)
    with tempfile.TemporaryDirectory() as temporary:
        folder, programs = Path(temporary) / "runs", stand_in(Path(temporary) / "programs", runs)
        make(folder, runs, saves)
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "COLUMNS": "160"}
        environment["XDG_CACHE_HOME"] = str(Path(temporary) / "cache")

        def command(*arguments: object) -> None:
            line = [sys.executable, ROOT / "launch.py", "status", *map(str, arguments)]
            subprocess.run(line, check=True, capture_output=True, env=environment, cwd=ROOT)

        started = time.perf_counter()
        command(folder)
        first = time.perf_counter() - started
        few = sorted(folder.iterdir())[:10]
        tasks = {
            "table": lambda: command(folder),
            "json": lambda: command(folder, "--json"),
            "one": lambda: command(few[0]),
            "apart": lambda: [command(run) for run in few],
        }
        least = report.interleaved(tasks, 2 if options.quick else 3, time.perf_counter)
    figures = {
        f"seconds for {runs} runs, none of them looked at before": first,
        f"seconds for {runs} runs, table": least["table"],
        f"seconds for {runs} runs, --json": least["json"],
        "seconds for one run": least["one"],
        "milliseconds for each further run": 1000 * (least["table"] - least["one"]) / (runs - 1),
    }
    ratios = {
        f"{LIMIT:.0f} s over the time of {runs} runs": LIMIT / least["table"],
        "one command per run over one for all, each run": least["apart"] / 10 / (least["table"] / runs),
    }
    notes = f"{runs} runs with {saves} checkpoints and three lives each, half of them running, on a local disk."
    report.show("status of many runs", ratios, figures, notes, options.json)


if __name__ == "__main__":
    main()

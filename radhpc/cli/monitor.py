"""Monitor runs: status, logs, board, profile."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from radhpc.cli.common import MONITORING, Json, RunPath, emit, from_elsewhere, say, verb
from radhpc.core.errors import UserError
from radhpc.core.log import console
from slurm.monitoring import run_table, tables


@verb(
    MONITORING,
    "radhpc status",
    "radhpc status runs/* --watch",
)
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Run folders or sweeps; default: all in runs/.")
    ] = None,
    audit: Annotated[
        bool,
        typer.Option(
            "--audit", help="List which samples were trained on, epoch by epoch, and whether each exactly once."
        ),
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh the table until Ctrl-C.")] = False,
    as_json: Json = False,
) -> None:
    """Show state and reason, stage, step, loss, speed, time left, last checkpoint's age, restarts, goodput, GPU-hours.

    Goodput is the share of the ranks' time spent on steps that still count; lost hours went into start-up and into
    steps that had to be repeated.
    """
    from slurm.monitoring.status import Statuses, find_runs
    from slurm.sweep.standing import summary
    from slurm.sweep.study import SweepStudy, is_sweep

    if watch and (audit or as_json):
        raise UserError(f"--watch: not together with {'--audit' if audit else '--json'}")
    if watch:
        from slurm.monitoring.watch import watch as watch_runs

        watch_runs(lambda: find_runs(runs), Console(highlight=False))
        return
    sweeps = [path for path in runs or sorted(Path("runs").glob("*/")) if is_sweep(path)]
    if sweeps and not audit:
        standings = [summary(SweepStudy.open(path)) for path in sweeps]
        rest = [path for path in runs or sorted(Path("runs").glob("*/")) if path not in sweeps]
        alone = Statuses(find_runs(rest, strict=bool(runs))).now() if rest else []
        if alone:
            say(run_table.RunTable(alone), as_json)
        for standing in standings:
            say(tables.sweep(standing), as_json)
        emit(standings[0] if runs and len(runs) == 1 else {"runs": alone, "sweeps": standings}, as_json)
        return
    chosen = find_runs(runs)
    if audit:
        from radhpc.data.audit import audit as run_audit

        results = [{"run": str(run.path), **run_audit(run)} for run in chosen]
        say(tables.audit(results), as_json)
        console.print(*tables.audit_sentences(results), sep="\n", highlight=False, soft_wrap=True)
    else:
        results = Statuses(chosen).now()
        say(run_table.RunTable(results), as_json)
    emit(results[0] if len(results) == 1 else {"runs": results}, as_json)


@verb(
    MONITORING,
    "radhpc logs RUN",
    "radhpc logs RUN --rank 3 --follow",
)
def logs(
    run: RunPath,
    rank: Annotated[
        int | None, typer.Option(help="Only this rank; default: rank 0, and the errors of all ranks.", min=0)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Keep printing new lines until the job ends.")] = False,
    life: Annotated[
        int | None, typer.Option(help="Only this start of the job, counted from 1; default: all.", min=1)
    ] = None,
) -> None:
    """Print what the job printed; of a failed run, first the traceback of the rank that failed first."""
    from radhpc.core.run_folder import RunFolder
    from slurm.monitoring.logs import show

    show(RunFolder.open(run), Console(highlight=False), rank, life, follow)


@verb(MONITORING, "radhpc board runs/quickstart-20261122-101500")
def board(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN", help="Run folders or sweeps; default: all in runs/.")
    ] = None,
    port: Annotated[
        int, typer.Option(help="Port on this machine's loopback; 0: any free port.", min=0, max=65535)
    ] = 6006,
) -> None:
    """Serve TensorBoard for these runs on this machine, to you alone: the address that is printed holds a secret."""
    from radhpc.core.run_folder import RunFolder
    from radhpc.serving.board_page import BoardPage
    from slurm.sweep.study import is_sweep

    inside = [
        sorted(p.parent for p in path.glob("trials/*/recipe.yaml")) if is_sweep(path) else [path] for path in runs or []
    ]
    named = [path for paths in inside for path in paths]
    chosen = [
        RunFolder.open(path).path for path in named or sorted(p.parent for p in Path("runs").glob("*/recipe.yaml"))
    ]
    if not chosen:
        raise UserError("no run in runs/: name one")
    # Two runs of one name, of two sweeps for example, are told apart by their folders.
    alone = [path.name for path in chosen]
    titles = [path.name if alone.count(path.name) == 1 else " ".join(path.parts[-3:]) for path in chosen]
    page = BoardPage({title: path / "tensorboard" for title, path in zip(titles, chosen, strict=True)}, port)
    say(f"{page.url}\n{from_elsewhere(page.port)}\nCtrl-C ends it.", False)
    try:
        page.serve()
    except KeyboardInterrupt:
        say("ended", False)


@verb(MONITORING, "radhpc profile runs/padchest-20261122-101500")
def profile(
    run: RunPath,
    steps: Annotated[int, typer.Option(help="How many of the next steps.", min=1, max=1000)] = 10,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the trace.", min=0)] = 600,
    as_json: Json = False,
) -> None:
    """Trace the next steps of the running job with a profiler, and list the operators that take longest."""
    from radhpc.core.run_folder import RunFolder
    from slurm.monitoring import profiling

    traced = profiling.trace(RunFolder.open(run), steps, wait)
    say(tables.traced(traced), as_json)
    emit({"run": str(run.absolute()), **traced}, as_json)

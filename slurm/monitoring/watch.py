"""Follow runs: a live table on a terminal; elsewhere a line for each thing that changes, for a log or a mail."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.live import Live

from radhpc.core.run_folder import RunFolder
from slurm.monitoring.run_table import RunTable, line, name
from slurm.monitoring.status import LIVING, Statuses

QUEUE_SECONDS = 10.0  # between looks at the queue: many sites ask not to poll it more often
SECONDS = 2.0  # between looks at the runs' folders


def watch(find: Callable[[], Sequence[RunFolder]], console: Console) -> None:
    """Follow runs until Ctrl-C; without a terminal, until no run lives. `find` is called again to find new runs."""
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            _table(find, console)
        else:
            _lines(find, console)


def _table(find: Callable[[], Sequence[RunFolder]], console: Console) -> None:
    runs = list(find())
    look = Statuses(runs, QUEUE_SECONDS)
    with Live(RunTable(look.now(), console.height - 1), console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(SECONDS)
            current = list(find())
            if [run.path for run in current] != [run.path for run in runs]:
                runs, look = current, Statuses(current, QUEUE_SECONDS)
            results = look.now()
            live.update(RunTable(results, console.height - 1), refresh=True)


def _lines(find: Callable[[], Sequence[RunFolder]], console: Console) -> None:
    """Print a line whenever something changes that stays the same from step to step."""
    look, printed = Statuses(list(find()), QUEUE_SECONDS), dict[str, Any]()
    while True:
        results = look.now()
        for result in results:
            news = [result[key] for key in ("state", "why", "stage", "checkpoint_step", "restarts")]
            if printed.get(result["run"]) != news:
                printed[result["run"]] = news
                console.print(f"{time.strftime('%H:%M:%S')} {name(result)}: {line(result)}", soft_wrap=True)
        if not any(result["state"] in LIVING for result in results):
            return
        time.sleep(SECONDS)

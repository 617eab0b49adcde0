"""What every measurement shares: the machine it ran on, interleaved timing, and the answer for people and programs."""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from radhpc.core.errors import UserError


def parser(name: str, description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every measurement has; `quick` says what --quick leaves out."""
    found = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=(description or "").split("\n\n")[0])
    found.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    found.add_argument("--quick", action="store_true", help=quick)
    return found


def run(main: Callable[[], None]) -> None:
    """Run a measurement as a command: a mistake of the user's is one line and exit status 2."""
    try:
        main()
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)


def machine() -> str:
    """The processor and the cores that this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def interleaved(
    tasks: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, float]:
    """Run all tasks in turn, `rounds` times, and return the least seconds of each.

    Whatever else the machine does slows all of them alike, and the least is what the task itself takes.
    """
    least: dict[str, float] = {}
    for _ in range(rounds):
        for name, task in tasks.items():
            started = clock()
            task()
            least[name] = min(least.get(name, float("inf")), clock() - started)
    return least


def _shown(value: float) -> str:
    if 0 < abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:,.3f}" if abs(value) < 100 else f"{value:,.0f}"


def show(title: str, ratios: Mapping[str, float], figures: Mapping[str, float], notes: str, as_json: bool) -> None:
    """Print a table, and as the last line the JSON object {ratios, figures, machine}."""
    console = Console(stderr=as_json, width=120)
    table = Table(title=f"{title} ({machine()})", title_justify="left")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for rows in (ratios, figures):
        for name, value in rows.items():
            table.add_row(name, _shown(value))
        table.add_section()
    console.print(table)
    console.print(notes, highlight=False)
    if as_json:
        print(json.dumps({"ratios": dict(ratios), "figures": dict(figures), "machine": machine()}), flush=True)

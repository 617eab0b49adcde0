"""Render where runs stand: the JSON objects of `radhpc status` in, a Rich table for any width of terminal out.

console.print(RunTable(Statuses(runs).now()))
line(result)        # the same of one run: "running, stage adapt, step 40 of 155, loss 4.612, saved at 30, 12 s left"

Nothing is printed here.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from radhpc.core.protocol import RunState

_FRAME = 8  # lines that are no row: around the head, below the table, the summary, the columns left out
_STYLES = {
    RunState.RUNNING: "green",
    RunState.PENDING: "yellow",
    RunState.FAILED: "bold red",
    RunState.STOPPED: "magenta",
    RunState.FINISHED: "blue",
    "": "",
}
_ORDER = (RunState.FAILED, RunState.RUNNING, RunState.PENDING, RunState.STOPPED, RunState.FINISHED)
_GAP = 2  # between columns


@dataclass(frozen=True)
class _Column:
    """A column of the table of runs; where the terminal is narrow those of least worth are left out first."""

    title: str
    worth: int
    cell: Callable[[dict[str, Any]], str | Text]
    right: bool = True


class RunTable:
    """The state of runs as slurm.monitoring.status gives it, for any width; below the table, why runs wait or failed.

    `height`: lines it may take; what lives or failed is shown before what has ended, and what is not shown is counted.
    """

    def __init__(self, results: Sequence[dict[str, Any]], height: int | None = None) -> None:
        self.results, self.height = results, height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self.results:
            yield Text("no run is there: 'radhpc train RECIPE --on PROFILE' starts one in runs/")
            return
        shown, notes = list(self.results), self._notes()
        if self.height is not None:
            total = len(notes)
            while notes and self._lines(notes, console, options) > self.height // 3:
                notes.pop()
            if len(notes) < total:
                notes.append(("", f"... and {total - len(notes)} more", "radhpc status RUN"))
            room = self.height - _FRAME - self._lines(notes, console, options)
            if len(shown) > room:
                shown = sorted(shown, key=lambda result: _ORDER.index(result["state"]))[: max(1, room)]
        table, left_out = self._fit(shown, options)
        yield table
        if notes:
            yield self._grid(notes)
        if len(self.results) > 1:
            yield Text(self._summary(len(shown)), style="dim")
        if left_out:
            said_out = f" not shown in {options.max_width} columns: {', '.join(left_out)}"
            yield Text(said_out, style="dim")

    def _fit(self, shown: Sequence[dict[str, Any]], options: ConsoleOptions) -> tuple[Text, list[str]]:
        """Return the table with as many columns as fit, and the titles of those that do not, except for empty ones."""
        for brief in (False, True):
            widths = {}
            for column in _columns(self.results, options.max_width // 3, brief):
                width = max((_width(column.cell(result)) for result in self.results), default=0)
                if width:
                    widths[column] = max(width, len(column.title))
            chosen: list[_Column] = []
            for column in sorted(widths, key=lambda column: -column.worth):
                needed = sum(widths[other] + _GAP for other in (*chosen, column))
                if len(chosen) < 2 or needed <= options.max_width:
                    chosen.append(column)
            columns = list(widths)
            if len(chosen) == len(columns):
                break
        left_out = [column.title for column in columns if column not in chosen and column.title]
        return _lines_of({column: widths[column] for column in columns if column in chosen}, shown), left_out

    def _notes(self) -> list[tuple[str, str, str]]:
        """Return (state, runs, sentence) of runs with a reason to show; runs with the same sentence share a row."""
        notes: dict[tuple[str, str], list[str]] = {}
        for result in sorted(self.results, key=lambda result: _ORDER.index(result["state"])):
            if result["why"]:
                notes.setdefault((result["state"], result["why"]), []).append(name(result))
        return [(state, _several(runs), words) for (state, words), runs in notes.items()]

    def _grid(self, notes: Sequence[tuple[str, str, str]]) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for state, runs, words in notes:
            grid.add_row(Text("*", style=_STYLES[state]), Text.assemble((runs, "bold"), f": {words}"))
        return Padding(grid, (0, 0, 1, 0))

    def _lines(self, notes: Sequence[tuple[str, str, str]], console: Console, options: ConsoleOptions) -> int:
        return len(console.render_lines(self._grid(notes), options)) if notes else 0

    def _summary(self, shown: int) -> str:
        counts = Counter(result["state"] for result in self.results)
        states = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
        more = "" if shown == len(self.results) else f"; {shown} of them shown"
        return f" {len(self.results)} runs: {states}{more}"


def _columns(results: Sequence[dict[str, Any]], longest: int, brief: bool) -> list[_Column]:
    """Return all columns; `brief` gives restarts by their number alone."""
    on_cpus = bool(results) and {result["device"] for result in results} <= {"cpu", None}
    device = "rank" if on_cpus else "GPU"
    return [
        _Column("run", 100, lambda r: Text(_short(name(r), longest), no_wrap=True), right=False),
        _Column("state", 99, lambda r: Text(r["state"], style=_STYLES[r["state"]]), right=False),
        _Column("stage", 40, lambda r: Text(r["stage"] or ""), right=False),
        _Column("step", 95, lambda r: f"{r['step']:,}/{r['steps']:,}" if r["steps"] else ""),
        _Column("", 10, _bar, right=False),
        _Column("loss", 90, lambda r: "" if r["loss"] is None else f"{r['loss']:.3f}"),
        _Column("samples/s", 60, lambda r: _number(r["samples_per_second"])),
        _Column(f"per {device}", 20, lambda r: _number(r["samples_per_second_per_rank"] if r["world"] != 1 else 0)),
        _Column("data wait", 35, lambda r: "" if r["data_wait"] is None else f"{r['data_wait']:.0%}"),
        _Column("left", 80, _left),
        _Column("last save", 70, lambda r: span(r["checkpoint_age_seconds"])),
        _Column("restarts", 55, lambda r: _restarts(r["restarts"], brief), right=brief),
        _Column("goodput", 50, lambda r: "" if r["goodput"] is None else f"{r['goodput']:.0%}"),
        _Column(f"{device}-hours", 30, lambda r: _hours(r["gpu_hours"])),
        _Column("lost", 25, lambda r: _hours(r["gpu_hours_lost"])),
    ]


def line(result: dict[str, Any]) -> str:
    """Return a run's state in one line, as far as it is known."""
    step = f"step {result['step']:,} of {result['steps']:,}" if result["steps"] else ""
    loss = "" if result["loss"] is None else f"loss {result['loss']:.3f}"
    saved = "" if result["checkpoint_step"] is None else f"saved at {result['checkpoint_step']:,}"
    left = f"{span(result['eta_seconds'])} left" if result["eta_seconds"] else ""
    stage = f"stage {result['stage']}" if result["stage"] and result["state"] == RunState.RUNNING else ""
    parts = [stage, step, loss, saved, left, _restarts(result["restarts"], brief=False)]
    why = f": {result['why']}" if result["why"] else ""
    return ", ".join([f"{result['state']}{why}", *filter(None, parts)])


def _lines_of(widths: Mapping[_Column, int], results: Sequence[dict[str, Any]]) -> Text:
    """Render the head, a rule and a line for each result. Rich's own table takes seconds for a thousand rows."""
    total = sum(widths.values()) + _GAP * (len(widths) - 1)
    text = Text("\n ", no_wrap=True, overflow="ellipsis")
    text.append_text(_line([Text(column.title, style="bold") for column in widths], widths))
    text.append(f"\n {'─' * total}\n")
    for result in results:
        text.append(" ").append_text(_line([column.cell(result) for column in widths], widths)).append("\n")
    return text


def _line(cells: Sequence[str | Text], widths: Mapping[_Column, int]) -> Text:
    line = Text()
    for cell, (column, width) in zip(cells, widths.items(), strict=True):
        space = " " * (width - _width(cell))
        line.append(" " * _GAP if line else "").append(space if column.right else "")
        line.append_text(cell) if isinstance(cell, Text) else line.append(cell)
        line.append("" if column.right else space)
    return line


def _width(cell: str | Text) -> int:
    return cell_len(cell if isinstance(cell, str) else cell.plain)


def name(result: dict[str, Any]) -> str:
    """Return a run's name: its folder's, and of a trial its sweep's before it."""
    path = Path(result["run"])
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "trials" else path.name


def span(seconds: float | None) -> str:
    """Return a length of time with two figures that matter: 45 s, 12 min, 3 h 05, 2 d 04 h."""
    if seconds is None:
        return ""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02}" if hours < 48 else f"{hours // 24} d {hours % 24:02} h"


def _left(result: dict[str, Any]) -> str:
    """Return the time to the end, or of a pending run to its start."""
    starts = result["starts_in_seconds"]
    return f"in {span(starts)}" if starts else span(result["eta_seconds"])


def _several(runs: Sequence[str]) -> str:
    """Return the names of a few runs, and how many more there are."""
    return ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")


def _short(text: str, most: int) -> str:
    """Return the beginning and the end of a long name: dates stand at the end."""
    return text if len(text) <= most else f"{text[: (most - 1) // 2]}…{text[-(most // 2) :]}"


def _number(value: float | None) -> str:
    return "" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.2f}"


def _hours(hours: float) -> str:
    return "" if not hours else "<0.01" if hours < 0.01 else f"{hours:.2f}" if hours < 10 else f"{hours:,.0f}"


def _restarts(counts: dict[str, int], brief: bool) -> str:
    if brief:
        return str(sum(counts.values()) or "")
    return ", ".join(f"{count} {cause.replace('_', ' ')}" for cause, count in counts.items() if count)


def _bar(result: dict[str, Any]) -> Text:
    if result["state"] != RunState.RUNNING or not result["steps"]:
        return Text("")
    done = min(12, 12 * result["step"] // result["steps"])
    return Text.assemble(("━" * done, "green"), ("─" * (12 - done), "bright_black"))

"""What people read of the verbs about runs: their JSON objects in, Rich's tables out. Nothing is printed here."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from radhpc.core.protocol import RunState

SHOWN = 20  # samples that were seen too often or never


def scores(found: dict[str, Any]) -> Iterator[Table | str]:
    """scores.json of an evaluation beside its baselines, the difference to another run, and what is missing. Scores of
    single findings have a table for each kind of them.
    """
    groups: dict[str, list[str]] = {}
    for name in found["scores"]:
        kind, slash, _ = name.partition("/")
        alone = not slash or kind.rpartition("_")[2] not in ("f1", "auroc", "auprc")
        groups.setdefault("score" if alone else kind, []).append(name)
    for kind, names in groups.items():
        title = f"step {found['step']}, {found['split']}" if kind == "score" else None
        table = Table(
            kind,
            "model",
            "95% interval",
            *found["baselines"],
            title=title,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for name in names:
            score, short = found["scores"][name], name if kind == "score" else name.partition("/")[2]
            limits = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
            others = [values.get(name, {}).get("value") for values in found["baselines"].values()]
            table.add_row(short, f"{score['value']:.3f}", limits, *("" if v is None else f"{v:.3f}" for v in others))
        yield table
    if other := found.get("comparison"):
        title = f"against {other['against']}: {other['test']}, {other['samples']} studies"
        differences = Table("score", "difference", "95% interval", "p", title=title)
        for name, one in other["scores"].items():
            limits = f"{one['low']:+.3f} to {one['high']:+.3f}"
            differences.add_row(name, f"{one['difference']:+.3f}", limits, f"{one['p']:.3f}")
        yield differences
    for name, why in found.get("missing", {}).items():
        yield f"{name}: not scored: {why}"


def weights(found: dict[str, Any]) -> RenderableType:
    """The files of a recipe's model, part by part."""
    if not found["parts"]:
        return Text(f"family {found['family']}: random weights from the recipe's configuration, no file is needed")
    table = Table("part", "file", "size", "state", box=SIMPLE_HEAD)
    table.columns[2].justify = "right"
    for part, what in found["parts"].items():
        table.add_row(part, Text(what["folder"], style="bold"), _bytes(what["bytes"]), "")
        for file in what["files"]:
            checked = {"as it should be": ", sha256 as it should be", "unknown": ", no sha256 is known"}
            state = Text(file["fault"], style="red") if file["fault"] else "whole" + checked.get(file["sha256"], "")
            table.add_row("", file["name"], "" if file["bytes"] is None else _bytes(file["bytes"]), state)
    return Group(table, Text(found["fault"], style="red")) if found["fault"] else table


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@dataclass(frozen=True)
class _Column:
    """A column of the table of runs; where the terminal is narrow those of least worth are left out first."""

    title: str
    worth: int
    cell: Callable[[dict[str, Any]], str | Text]
    right: bool = True


class RunTable:
    """Where runs stand, as slurm.monitoring.status says, for any width; below the table why those wait, or failed.


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
            said = len(notes)
            while notes and self._lines(notes, console, options) > self.height // 3:
                notes.pop()
            if len(notes) < said:
                notes.append(("", f"... and {said - len(notes)} more", "radhpc status RUN"))
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
        """The table with as many columns as fit, and the titles of those that do not. Empty ones are not missed."""
        for brief in (False, True):
            widths = {}
            for column in _columns(self.results, options.max_width // 3, brief):
                width = max((_width(column.cell(result)) for result in self.results), default=0)
                if width:
                    widths[column] = max(width, len(column.title))
            chosen: list[_Column] = []
            for column in sorted(widths, key=lambda column: -column.worth):
                wanted = sum(widths[other] + _GAP for other in (*chosen, column))
                if len(chosen) < 2 or wanted <= options.max_width:
                    chosen.append(column)
            columns = list(widths)
            if len(chosen) == len(columns):
                break
        left_out = [column.title for column in columns if column not in chosen and column.title]
        return _lines_of({column: widths[column] for column in columns if column in chosen}, shown), left_out

    def _notes(self) -> list[tuple[str, str, str]]:
        """(state, runs, sentence) of those that have something to say, the same sentence once."""
        said: dict[tuple[str, str], list[str]] = {}
        for result in sorted(self.results, key=lambda result: _ORDER.index(result["state"])):
            if result["why"]:
                said.setdefault((result["state"], result["why"]), []).append(name(result))
        return [(state, _several(runs), words) for (state, words), runs in said.items()]

    def _grid(self, notes: Sequence[tuple[str, str, str]]) -> RenderableType:
        grid = Table.grid(padding=(0, 1))
        for state, runs, words in notes:
            grid.add_row(Text("*", style=_STYLES[state]), Text.assemble((runs, "bold"), f": {words}"))
        return Padding(grid, (0, 0, 1, 0))

    def _lines(self, notes: Sequence[tuple[str, str, str]], console: Console, options: ConsoleOptions) -> int:
        return len(console.render_lines(self._grid(notes), options)) if notes else 0

    def _summary(self, shown: int) -> str:
        counts = Counter(result["state"] for result in self.results)
        said = ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])
        more = "" if shown == len(self.results) else f"; {shown} of them shown"
        return f" {len(self.results)} runs: {said}{more}"


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


def _columns(results: Sequence[dict[str, Any]], longest: int, brief: bool) -> list[_Column]:
    """All that is known; `brief` says restarts by their number alone."""
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
    """The same in one line, as far as it is known."""
    step = f"step {result['step']:,} of {result['steps']:,}" if result["steps"] else ""
    loss = "" if result["loss"] is None else f"loss {result['loss']:.3f}"
    saved = "" if result["checkpoint_step"] is None else f"saved at {result['checkpoint_step']:,}"
    left = f"{span(result['eta_seconds'])} left" if result["eta_seconds"] else ""
    stage = f"stage {result['stage']}" if result["stage"] and result["state"] == RunState.RUNNING else ""
    parts = [stage, step, loss, saved, left, _restarts(result["restarts"], brief=False)]
    why = f": {result['why']}" if result["why"] else ""
    return ", ".join([f"{result['state']}{why}", *filter(None, parts)])


_GAP = 2  # between columns


def _lines_of(widths: Mapping[_Column, int], results: Sequence[dict[str, Any]]) -> Text:
    """The head, a rule and a line for each result. Not a table of Rich's, which takes seconds for a thousand rows."""
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
    """A run's name: its folder's, and of a trial its sweep's before it."""
    path = Path(result["run"])
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "trials" else path.name


def span(seconds: float | None) -> str:
    """A length of time with two figures that matter: 45 s, 12 min, 3 h 05, 2 d 04 h."""
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
    """Time to the end; of a pending run to its start."""
    starts = result["starts_in_seconds"]
    return f"in {span(starts)}" if starts else span(result["eta_seconds"])


def _several(runs: Sequence[str]) -> str:
    """Names of runs, and how many more there are."""
    return ", ".join(runs[:3]) + (f" and {len(runs) - 3} more" if len(runs) > 3 else "")


def _short(text: str, most: int) -> str:
    """The beginning and the end of a long name: dates stand at the end."""
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


def audit(results: list[dict[str, Any]]) -> Table:
    """What radhpc.data.audit says of each run, epoch by epoch."""
    mixed = any("dataset" in epoch for result in results for epoch in result["epochs"])
    dataset = ["dataset"] if mixed else []
    titles = ("run", "stage", *dataset, "epoch", "due", "of", "seen", "missing", "repeated", "exactly once")
    table = Table(*titles, box=SIMPLE_HEAD)
    for result in results:
        for epoch in result["epochs"]:
            numbers = [str(epoch[key]) for key in ("epoch", "expected", "of", "seen")]
            dataset = [Path(epoch.get("dataset", "")).name] if mixed else []
            faults = [str(len(epoch[key])) for key in ("missing", "repeated")]
            once = "yes" if epoch["exactly_once"] else "NO"
            table.add_row(Path(result["run"]).name, epoch["stage"], *dataset, *numbers, *faults, once)
    return table


def audit_sentences(results: list[dict[str, Any]]) -> Iterator[str]:
    """A sentence for each audited run, and the samples that went wrong."""
    for result in results:
        lives, worlds = len(result["topologies"]), sorted({life["world_size"] for life in result["topologies"]})
        over = f"{lives} lives on {' and '.join(map(str, worlds))} rank(s)"
        wrong = sum(not epoch["exactly_once"] for epoch in result["epochs"])
        verdict = f"NOT exactly once in {wrong} epoch(s)" if wrong else "every sample due so far exactly once"
        bad = f", {len(result['quarantined'])} of them unreadable and left out" if result["quarantined"] else ""
        yield f"{Path(result['run']).name}: {verdict}{bad}, over {over}"
        for epoch in result["epochs"]:
            for fault in ("missing", "repeated"):
                for key in epoch[fault][:SHOWN]:
                    yield f"  stage {epoch['stage']}, epoch {epoch['epoch']}: {fault}: {key}"


def plan(result: dict[str, Any]) -> Iterator[RenderableType]:
    """What a recipe will take on a profile, and what of it does not fit."""
    table = Table(
        "stage", "steps", "trained of all", "GB per GPU", "of it a batch of", "checkpoint MB", box=SIMPLE_HEAD
    )
    for stage in result["stages"]:
        table.add_row(
            stage["name"],
            "?" if stage["steps"] is None else f"{stage['steps']:,}",
            f"{stage['trainable']:,} of {stage['parameters']:,}",
            f"{stage['gigabytes_per_gpu']:.2f}",
            f"{stage['micro_batch']} x {stage['tokens']} tokens, {stage['views']} view(s)",
            f"{stage['checkpoint_megabytes']:.1f}",
        )
    yield table
    yield from result["assumed"]
    yield "fits on: " + ", ".join(f"{card} {'yes' if fits else 'NO'}" for card, fits in result["fits_on"].items())
    if result["hours"] is None:
        yield "hours: unknown; --like RUN takes the samples/s of an earlier run"
    else:
        gpus = "" if result["gpu_hours"] is None else f", {result['gpu_hours']:.1f} GPU-hours"
        yield (
            f"{result['hours']:.2f} h for {result['steps']:,} steps, {result['hours_per_epoch']:.2f} h an epoch{gpus} "
            f"({result['samples_per_second']:.1f} samples/s: {result['samples_per_second_from']})"
        )
    grace = "never preempted" if result["grace_seconds"] is None else f"grace {result['grace_seconds']} s"
    yield (
        f"a save of {result['checkpoint_megabytes']:.1f} MB takes {result['save_seconds']:.1f} s at "
        f"{result['megabytes_per_second']:.0f} MB/s; {grace}"
    )
    yield from (f"[red]does not fit[/] {problem}" for problem in result["problems"])


def checks(found: list[dict[str, Any]]) -> Iterator[str]:
    """What doctor found, and what it wants where something is not as it should be."""
    for check in found:
        yield f"{'[green]ok[/]' if check['ok'] else '[red]NO[/]'}  [bold]{check['name']}[/]: {check['found']}"
        if not check["ok"]:
            yield f"    wanted: {check['wanted']}"


def sweep(standing: dict[str, Any]) -> Iterator[RenderableType]:
    """The trials of a sweep, the best first."""
    keys = list(dict.fromkeys(key for trial in standing["trials"] for key in trial["parameters"]))
    title = f"{Path(standing['sweep']).name}: {standing['metric']}, {standing['direction']}"
    columns = ("trial", "state", standing["metric"], "step", *(_tail(key, keys) for key in keys))
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)
    for trial in standing["trials"]:
        why = f": {trial['why']}" if trial["state"] in (RunState.FAILED, RunState.MISSING) and trial["why"] else ""
        value = "" if trial["value"] is None else f"{trial['value']:.4f}"
        steps = f"{trial['step']}/{trial['steps'] or '?'}"
        labels = (_label(trial["labels"].get(key)) for key in keys)
        table.add_row(Path(trial["run"]).name, trial["state"] + why, value, steps, *labels)
    yield table
    if standing["best"]:
        yield f"best so far: trial {Path(standing['best']['run']).name}, {standing['best_recipe']}"


def _tail(key: str, keys: list[str]) -> str:
    """The last words of a key that tell it from the others."""
    parts = key.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(tail for tail in tails if sum(other == key or other.endswith(f".{tail}") for other in keys) == 1)


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def answer(result: Mapping[str, Any], console: Console, heading: bool) -> None:
    """What `generate` prints of one study: its warnings, its text by sections, its neighbours."""
    if heading:
        console.print(Text(result["name"], style="bold"))
    if "error" in result:
        console.print(Text.assemble(("error ", "red"), result["error"]), soft_wrap=True)
        return
    for warning in result["warnings"]:
        console.print(Text.assemble(("warning ", "yellow"), warning), soft_wrap=True)
    for name, text in result["sections"].items() or [("", result["text"] or "(the model wrote nothing)")]:
        console.print(Text.assemble((f"{name.capitalize()}: " if name else "", "bold"), text), soft_wrap=True)
    for text in result.get("given", ()):
        console.print(Text.assemble(("  given to the model ", "dim"), text), soft_wrap=True)
    for line in neighbours(result["neighbours"]):
        console.print(line, soft_wrap=True)


def neighbours(found: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    """Training studies that look alike, a line each."""
    for neighbour in found:
        yield Text.assemble((f"  {neighbour['similarity']:.2f} {neighbour['key']} ", "dim"), neighbour["text"])


def traced(found: dict[str, Any]) -> Iterator[RenderableType]:
    """Where a trace lies and the operators that took longest."""
    table = Table("operator", "calls", "ms", "share", box=SIMPLE_HEAD)
    for row in found["operators"]:
        table.add_row(row["operator"], str(row["calls"]), f"{row['milliseconds']:.1f}", f"{row['share']:.1%}")
    yield table
    yield f"{found['trace']}: open it in https://ui.perfetto.dev or chrome://tracing"

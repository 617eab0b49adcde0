"""Render the results of verbs about runs: their JSON objects in, Rich's tables out. Nothing is printed here."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from radhpc.core.protocol import RunState

SHOWN = 20  # samples that were seen too often or never


def scores(results: dict[str, Any]) -> Iterator[Table | str]:
    """Show scores.json of an evaluation next to its baselines, the difference to another run, and what is missing.

    Scores of single findings have a table for each kind of score.
    """
    groups: dict[str, list[str]] = {}
    for name in results["scores"]:
        kind, slash, _ = name.partition("/")
        alone = not slash or kind.rpartition("_")[2] not in ("f1", "auroc", "auprc")
        groups.setdefault("score" if alone else kind, []).append(name)
    for kind, names in groups.items():
        title = f"step {results['step']}, {results['split']}" if kind == "score" else None
        table = Table(
            kind,
            "model",
            "95% interval",
            *results["baselines"],
            title=title,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
        )
        for column in table.columns[1:]:
            column.justify, column.no_wrap = "right", True
        for name in names:
            score, short = results["scores"][name], name if kind == "score" else name.partition("/")[2]
            limits = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
            others = [values.get(name, {}).get("value") for values in results["baselines"].values()]
            table.add_row(short, f"{score['value']:.3f}", limits, *("" if v is None else f"{v:.3f}" for v in others))
        yield table
    if other := results.get("comparison"):
        title = f"against {other['against']}: {other['test']}, {other['samples']} studies"
        differences = Table("score", "difference", "95% interval", "p", title=title)
        for name, one in other["scores"].items():
            limits = f"{one['low']:+.3f} to {one['high']:+.3f}"
            differences.add_row(name, f"{one['difference']:+.3f}", limits, f"{one['p']:.3f}")
        yield differences
    for name, why in results.get("missing", {}).items():
        yield f"{name}: not scored: {why}"


def weights(listing: dict[str, Any]) -> RenderableType:
    """Show the files of a recipe's model, part by part."""
    if not listing["parts"]:
        return Text(f"family {listing['family']}: random weights from the recipe's configuration, no file is needed")
    table = Table("part", "file", "size", "state", box=SIMPLE_HEAD)
    table.columns[2].justify = "right"
    for part, component in listing["parts"].items():
        table.add_row(part, Text(component["folder"], style="bold"), _bytes(component["bytes"]), "")
        for file in component["files"]:
            checked = {"as it should be": ", sha256 as it should be", "unknown": ", no sha256 is known"}
            state = Text(file["fault"], style="red") if file["fault"] else "whole" + checked.get(file["sha256"], "")
            table.add_row("", file["name"], "" if file["bytes"] is None else _bytes(file["bytes"]), state)
    return Group(table, Text(listing["fault"], style="red")) if listing["fault"] else table


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def audit(results: list[dict[str, Any]]) -> Table:
    """Show the audit of each run, epoch by epoch."""
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
    """Yield a sentence for each audited run, and the samples that went wrong."""
    for result in results:
        lives, worlds = len(result["topologies"]), sorted({life["world_size"] for life in result["topologies"]})
        over = f"{lives} lives on {' and '.join(map(str, worlds))} rank(s)"
        wrong = sum(not epoch["exactly_once"] for epoch in result["epochs"])
        verdict = f"NOT exactly once in {wrong} epoch(s)" if wrong else "every sample due so far exactly once"
        if together := result["overlaps"]:
            pairs = ", ".join(f"{pair['life']} and {pair['beside']}" for pair in together)
            verdict = f"NOT exactly once: two jobs trained it at the same time (lives {pairs})"
        bad = f", {len(result['quarantined'])} of them unreadable and left out" if result["quarantined"] else ""
        yield f"{Path(result['run']).name}: {verdict}{bad}, over {over}"
        for epoch in result["epochs"]:
            for fault in ("missing", "repeated"):
                for key in epoch[fault][:SHOWN]:
                    yield f"  stage {epoch['stage']}, epoch {epoch['epoch']}: {fault}: {key}"


def plan(result: dict[str, Any]) -> Iterator[RenderableType]:
    """Show what a recipe needs on a profile, and what does not fit."""
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


def checks(results: list[dict[str, Any]]) -> Iterator[str]:
    """Show the checks of doctor, and what is expected where one fails."""
    for check in results:
        yield f"{'[green]ok[/]' if check['ok'] else '[red]NO[/]'}  [bold]{check['name']}[/]: {check['found']}"
        if not check["ok"]:
            yield f"    wanted: {check['wanted']}"


def sweep(standing: dict[str, Any]) -> Iterator[RenderableType]:
    """Show the trials of a sweep, the best first."""
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
    """Return the last words of a key that tell it from the others."""
    parts = key.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
    return next(tail for tail in tails if sum(other == key or other.endswith(f".{tail}") for other in keys) == 1)


def _label(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "" if value is None else str(value)


def answer(result: Mapping[str, Any], console: Console, heading: bool) -> None:
    """Print the answer of `generate` for one study: its warnings, its text by sections, its neighbours."""
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


def neighbours(similar: Sequence[Mapping[str, Any]]) -> Iterator[Text]:
    """Show similar training studies, one line each."""
    for neighbour in similar:
        yield Text.assemble((f"  {neighbour['similarity']:.2f} {neighbour['key']} ", "dim"), neighbour["text"])


def traced(trace: dict[str, Any]) -> Iterator[RenderableType]:
    """Show where a trace lies and the operators that took longest."""
    table = Table("operator", "calls", "ms", "share", box=SIMPLE_HEAD)
    for row in trace["operators"]:
        table.add_row(row["operator"], str(row["calls"]), f"{row['milliseconds']:.1f}", f"{row['share']:.1%}")
    yield table
    yield f"{trace['trace']}: open it in https://ui.perfetto.dev or chrome://tracing"

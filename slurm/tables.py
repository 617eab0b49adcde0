"""What people read of the verbs about runs: their JSON objects in, Rich's tables out. Nothing is printed here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

SHOWN = 20  # samples that were seen too often or never


def scores(found: dict[str, Any]) -> Table:
    """scores.json of an evaluation beside its baselines."""
    table = Table(
        "score", "model", "95% interval", *found["baselines"], title=f"step {found['step']}, {found['split']}"
    )
    for name, score in found["scores"].items():
        limits = "" if score["low"] is None else f"{score['low']:.3f} to {score['high']:.3f}"
        others = [values.get(name, {}).get("value") for values in found["baselines"].values()]
        table.add_row(name, f"{score['value']:.3f}", limits, *("" if v is None else f"{v:.3f}" for v in others))
    return table


def runs(results: list[dict[str, Any]]) -> Table:
    """Where runs stand: what slurm.status says of each."""
    table = Table("run", "state", "stage", "step", "loss", "samples/s", "checkpoint", "restarts", "goodput")
    for result in results:
        age = result["checkpoint_age_seconds"]
        restarts = ", ".join(f"{count} {cause}" for cause, count in result["restarts"].items() if count)
        table.add_row(
            Path(result["run"]).name,
            f"{result['state']} {result['cause'] if result['state'] != result['cause'] else ''}".strip(),
            result["stage"] or "",
            f"{result['step']}/{result['steps'] or '?'}",
            "" if result["loss"] is None else f"{result['loss']:.3f}",
            "" if not result["samples_per_second"] else f"{result['samples_per_second']:.1f}",
            "" if age is None else f"step {result['checkpoint_step']}, {age:.0f} s ago",
            restarts,
            "" if result["goodput"] is None else f"{result['goodput']:.0%}",
        )
    return table


def audit(results: list[dict[str, Any]]) -> Table:
    """What radhpc.audit says of each run, epoch by epoch."""
    mixed = any("dataset" in epoch for result in results for epoch in result["epochs"])
    dataset = ["dataset"] if mixed else []
    table = Table("run", "stage", *dataset, "epoch", "due", "of", "seen", "missing", "repeated", "exactly once")
    for result in results:
        for epoch in result["epochs"]:
            numbers = [str(epoch[key]) for key in ("epoch", "expected", "of", "seen")]
            dataset = [Path(epoch.get("dataset", "")).name] if mixed else []
            faults = [str(len(epoch[key])) for key in ("missing", "repeated")]
            once = "yes" if epoch["exactly_once"] else "NO"
            table.add_row(Path(result["run"]).name, epoch["stage"], *dataset, *numbers, *faults, once)
    return table


def verdicts(results: list[dict[str, Any]]) -> Iterator[str]:
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

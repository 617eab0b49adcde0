"""Proof of which samples a run was trained on: the ledger against the order, epoch by epoch."""

from collections import Counter
from typing import Any

from radhpc import order
from radhpc.ledger import consumed
from radhpc.recipe import Stage
from radhpc.run_dir import RunDir
from radhpc.stream import Source, stage_samples


def audit(run: RunDir) -> dict[str, Any]:
    """Per stage and epoch: samples due so far, seen, missing, and repeated or foreign; and the run's topologies.

    A step that a hard kill undid was trained again in a later life and counts once; `replayed_steps` says how many.
    """
    recipe = run.recipe()
    seen = consumed(run.path / "ledger")
    epochs = []
    first = 1
    for number, stage in enumerate(recipe.stages):
        source = Source(stage.shards or recipe.shards, "train")
        steps = [step for step, at in seen.stages.items() if at == number]
        if not steps:
            break
        batches = {step: seen.steps[step] + seen.bad[step] for step in steps}
        epochs += _epochs(stage, number, source, batches, first, recipe.seed)
        first = max(steps) + 1
    topologies = [
        {"world_size": life["world"], "engine": life["engine"], "from_step": _resumed_at(run, life["time"])}
        for life in run.events("started")
    ]
    return {"epochs": epochs, "replayed_steps": len(seen.replayed), "topologies": topologies}


def _epochs(
    stage: Stage, number: int, source: Source, batches: dict[int, list[str]], first: int, seed: int
) -> list[dict[str, Any]]:
    due: dict[int, Counter[str]] = {}
    got: dict[int, Counter[str]] = {}
    for step in range(first, max(batches) + 1):
        start = (step - first) * stage.batch
        count = min(stage.batch, stage_samples(stage, len(source)) - start)
        keys = [source.key(int(n)) for n in order.samples_at(start, count, len(source), seed, number)]
        trained = Counter(batches.get(step, []))
        for position, key in enumerate(keys, start):
            epoch = position // len(source)
            due.setdefault(epoch, Counter())[key] += 1
            if trained[key]:
                trained[key] -= 1
                got.setdefault(epoch, Counter())[key] += 1
        got.setdefault(start // len(source), Counter()).update(+trained)  # what this step should not have seen
    return [_verdict(stage.name, epoch, due[epoch], got.get(epoch, Counter())) for epoch in sorted(due)]


def _verdict(stage: str, epoch: int, due: Counter[str], got: Counter[str]) -> dict[str, Any]:
    missing, repeated = sorted((due - got).elements()), sorted((got - due).elements())
    twice = [key for key, count in due.items() if count > 1]
    assert not twice, f"the order gave {twice[0]} twice in an epoch"
    return {
        "stage": stage,
        "epoch": epoch,
        "expected": due.total(),
        "seen": got.total(),
        "missing": missing,
        "repeated": repeated,
        "exactly_once": not missing and not repeated,
    }


def _resumed_at(run: RunDir, started: str) -> int:
    """The step that a life went on from: that of the 'resumed' event between its start and the next."""
    later = [event for event in run.events("started", "resumed") if event["time"] >= started]
    return int(later[1]["step"]) if len(later) > 1 and later[1]["event"] == "resumed" else 0

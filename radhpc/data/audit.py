"""Prove which samples a run was trained on: compare its ledger with the order, epoch by epoch."""

from collections import Counter, defaultdict
from typing import Any

import numpy as np

from radhpc.core.errors import UserError
from radhpc.core.ledger import bytes_by_life, read_ledger
from radhpc.core.protocol import Event
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import RunFolder
from radhpc.data.source import Source
from radhpc.data.stream import stage_sampler, stage_samples

_STEPS = 256  # whose positions are looked up at a time


def audit(run: RunFolder) -> dict[str, Any]:
    """Report per stage and epoch the samples due so far, seen, missing, and repeated or foreign; and the topologies.

    With weights, each dataset has epochs of its own. A step that a hard kill undid was trained again in a later life
    and counts once; `replayed_steps` says how many. A sample that could not be read counts as seen, and is named in
    `quarantined`. Raises UserError for a run without a ledger.
    """
    recipe = run.recipe()
    if not recipe.stream.audit:
        raise UserError(f"{run.recipe_path}: stream.audit: false, so that the run keeps no ledger; allowed is true")
    seen = read_ledger(run.path / "ledger")
    epochs: list[dict[str, Any]] = []
    # What was taken over from another run was trained on there.
    first = max((event["step"] for event in run.events(Event.TAKEN_OVER)), default=0) + 1
    for number, stage in enumerate(recipe.stages):
        steps = [step for step, at in seen.stages.items() if at == number]
        if not steps and not epochs:
            continue
        if not steps:
            break
        batches = {step: seen.steps[step] + seen.bad[step] for step in steps}
        source = Source(recipe.shards_of(stage), "train")
        epochs += _epochs(recipe, number, source, batches, first)
        first = max(steps) + 1
    together = overlaps(run)
    for epoch in epochs if together else []:
        epoch["exactly_once"] = False  # of what two jobs trained at the same time, one's has been lost
    topologies: list[dict[str, Any]] = []
    for event in run.events(Event.STARTED, Event.RESUMED):
        if event["event"] == Event.STARTED:
            topologies.append({"world_size": event["world"], "engine": event["engine"], "from_step": 0})
        else:
            topologies[-1]["from_step"] = int(event["step"])
    return {
        "epochs": epochs,
        "replayed_steps": len(seen.replayed),
        "quarantined": sorted({key for keys in seen.bad.values() for key in keys}),
        "topologies": topologies,
        "overlaps": together,
    }


def overlaps(run: RunFolder) -> list[dict[str, int]]:
    """Return the lives that worked while a later one did: (life, beside).

    A life notes how much each earlier one had written to the ledger; one that has written more since was not over. Of
    runs that noted nothing, a step that was saved twice before the next life began tells the same.
    """
    pairs: set[tuple[int, int]] = set()
    written = bytes_by_life(run.path / "ledger")
    life, saved = 0, set[int]()
    for event in run.events(Event.STARTED, Event.SAVED):
        if event["event"] == Event.STARTED:
            life, saved = life + 1, set()
            noted = event.get("ledger")
            for before, size in noted.items() if isinstance(noted, dict) else ():
                if written.get(before, 0) > size:
                    pairs.add((int(before), life))
        elif event["step"] in saved:
            pairs.add((life - 1, life))
        saved |= {event["step"]} if event["event"] == Event.SAVED else set()
    return [{"life": first, "beside": second} for first, second in sorted(pairs)]


def _epochs(
    recipe: Recipe, number: int, source: Source, batches: dict[int, list[str]], first: int
) -> list[dict[str, Any]]:
    stage = recipe.stages[number]
    order = stage_sampler(source, number, recipe.stream, recipe.seed)
    samples, last = stage_samples(stage, len(source)), max(batches)
    due: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)  # by dataset and epoch
    got: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for step in range(first, last + 1, _STEPS):
        start = (step - first) * stage.batch
        drawn = order.at(np.arange(start, min(samples, (min(last + 1, step + _STEPS) - first) * stage.batch)))
        epochs = list(zip(drawn.dataset.tolist(), drawn.epoch.tolist(), strict=True))
        keys = source.keys(drawn.sample)
        for at in range(0, len(keys), stage.batch):
            trained = Counter(batches.get(step + at // stage.batch, []))
            for epoch, key in zip(epochs[at : at + stage.batch], keys[at : at + stage.batch], strict=True):
                due[epoch][key] += 1
                if trained[key]:
                    trained[key] -= 1
                    got[epoch][key] += 1
            got[epochs[at]].update(+trained)  # what this step should not have seen
    sizes = order.sizes
    return [
        {
            "stage": stage.name,
            **({"dataset": source.datasets[dataset].url} if len(sizes) > 1 else {}),
            **_verdict(epoch, due[dataset, epoch], got[dataset, epoch], sizes[dataset]),
        }
        for dataset, epoch in sorted(due)
    ]


def _verdict(epoch: int, due: Counter[str], got: Counter[str], size: int) -> dict[str, Any]:
    missing, repeated = sorted((due - got).elements()), sorted((got - due).elements())
    twice = [key for key, count in due.items() if count > 1]
    assert not twice, f"the order gave {twice[0]} twice in an epoch"
    return {
        "epoch": epoch,
        "expected": due.total(),
        "of": size,
        "seen": got.total(),
        "missing": missing,
        "repeated": repeated,
        "exactly_once": not missing and not repeated,
    }

"""Stages join without a seam, measured on the model itself as it lies on its devices.

Between worker.py and the engine: at a stage's end the loss on a few of its studies is recorded with the event
"stage_finished"; the next stage, in this life or a later one, begins only if its model gives the same. adapters.py has
compared each layer's weights by then; this also finds what was never saved, or is laid out otherwise.
"""

import math

from radhpc.core.errors import UserError
from radhpc.core.protocol import Event
from radhpc.data.source import BadSample
from radhpc.engine.fsdp import Engine
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.sources import open_source

STUDIES = 4
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # relative; rounding alone gives less than a tenth of it


def probe(context: RunContext, engine: Engine, number: int) -> float | None:
    """The loss per token on studies of a stage, as that stage asks and shows them; None where none can be read. All
    ranks call it, with the same result.
    """
    source, encoder = open_source(context, number, "train"), build_encoder(context, number)
    rows = []
    for place in range(min(len(source), 4 * STUDIES)):
        try:
            row = encoder.encode(*source.read(place))
        except BadSample:
            continue
        if row.supervised and len(rows) < STUDIES:
            rows.append(row)
    if not rows:
        return None
    return engine.loss_sum(encoder.batch(rows)) / sum(row.supervised for row in rows)


def check(context: RunContext, engine: Engine, number: int) -> None:
    """Refuse a stage that does not begin where the one before it ended. Raises UserError on all ranks."""
    recipe = context.recipe
    before, stage = recipe.stages[number - 1], recipe.stages[number]
    if stage.adapters == "new":
        return
    ends = [
        event for event in context.run.events(Event.STAGE_FINISHED, Event.TAKEN_OVER) if event["number"] == number - 1
    ]
    then = context.ranks.broadcast(ends[-1].get("loss") if ends else None)
    now = None if then is None else probe(context, engine, number - 1)
    if then is None or now is None:
        return
    (now,) = context.ranks.max([now])
    if not math.isclose(now, then, rel_tol=TOLERANCE[recipe.precision], abs_tol=1e-4):
        raise UserError(
            f"stage '{stage.name}' does not begin where '{before.name}' ended: the loss on {STUDIES} studies is "
            f"{now:.6f}, then {then:.6f}"
        )

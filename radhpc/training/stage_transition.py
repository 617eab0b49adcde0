"""Check that a stage begins with the loss that the stage before ended with, on the model as it lies on its devices.

Stands between worker.py and the engine: at the end of a stage the loss on a few of its studies is recorded with the
event "stage_finished"; the next stage, in this life or a later one, begins only if its model gives the same loss.
adapters.py has compared the weights of each layer by then; this also finds what was never saved or is laid out
differently.
"""

import math

from radhpc.core.errors import UserError
from radhpc.core.protocol import Event
from radhpc.data.collate import EncodedStudy
from radhpc.data.source import BadSample
from radhpc.engine.fsdp import Engine
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.sources import open_source

STUDIES = 4
TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2, "fp16": 2e-2}  # relative; rounding alone gives less than a tenth of it


def measure_loss(context: RunContext, engine: Engine, stage: int) -> float | None:
    """Return the loss per token on studies of a stage, as that stage encodes them; None where none can be read. All
    ranks call it, with the same result.
    """
    source, encoder = open_source(context, stage, "train"), build_encoder(context, stage)
    rows: list[EncodedStudy] = []
    for number in range(min(len(source), 4 * STUDIES)):
        try:
            row = encoder.encode(*source.read(number))
        except BadSample:
            continue
        if row.supervised and len(rows) < STUDIES:
            rows.append(row)
    if not rows:
        return None
    return engine.loss_sum(encoder.batch(rows)) / sum(row.supervised for row in rows)


def check_loss(context: RunContext, engine: Engine, stage: int) -> None:
    """Refuse a stage that does not begin where the one before it ended. Raises UserError on all ranks."""
    recipe, ranks = context.recipe, context.ranks
    before, settings = recipe.stages[stage - 1], recipe.stages[stage]
    if settings.adapters == "new":
        return
    events = context.run.events(Event.STAGE_FINISHED, Event.TAKEN_OVER)
    ends = [event for event in events if event["number"] == stage - 1]
    recorded = ranks.broadcast(ends[-1].get("loss") if ends else None)
    loss = None if recorded is None else measure_loss(context, engine, stage - 1)
    if recorded is None or loss is None:
        return
    (loss,) = ranks.max([loss])
    if not math.isclose(loss, recorded, rel_tol=TOLERANCE[recipe.precision], abs_tol=1e-4):
        raise UserError(
            f"stage '{settings.name}' does not begin where '{before.name}' ended: the loss on {STUDIES} studies is "
            f"{loss:.6f}, then {recorded:.6f}"
        )

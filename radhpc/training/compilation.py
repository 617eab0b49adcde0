"""Compile the layers of a stage as a part of starting up: kept for the next life, and ended by a signal.

torch.compile does its work in the first passes through each kind of layer, which takes minutes on a large model. In the
first step it would hold up a preemption's signal for as long. So a pass that changes nothing goes before the first
step, while the ranks go on agreeing whether to stop; and what the compiler has made lies in the run folder
(`compiled/`), where a requeued life finds it on whatever node it starts. A TORCHINDUCTOR_CACHE_DIR that the profile's
environment names is left as it is: runs of one user may share theirs.
"""

import contextlib
import os
import time

import torch

from radhpc.core.compat_torch import disable_duck_shapes
from radhpc.core.protocol import Event
from radhpc.data.collate import EncodedStudy
from radhpc.data.source import BadSample
from radhpc.distributed.background import run_in_background
from radhpc.training.context import RunContext, StageContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.sources import open_source

CACHE = "TORCHINDUCTOR_CACHE_DIR"


def prepare(context: RunContext) -> None:
    """Set up the compiler before the engine is built: the folder of its output, and which sizes may change."""
    if context.recipe.model.compile:
        # torch would choose a place of its own.
        os.environ.setdefault(CACHE, str(context.run.folder("compiled")))
        # Else sizes that happen to be equal in the first batch are taken for one, and the next batch compiles anew.
        disable_duck_shapes()


def warm_up(stage: StageContext) -> None:
    """Compile the layers of a stage, if the recipe asks for it; all ranks call it. Raises Interrupted on all."""
    context, engine, settings = stage.context, stage.engine, stage.settings
    if not context.recipe.model.compile:
        return
    ranks, encoder = context.ranks, build_encoder(context, stage.number)
    size = min(settings.micro_batch or settings.batch, -(-settings.batch // ranks.world))
    batch = encoder.batch([encoder.empty()] * size)
    started = time.perf_counter()

    def compile_layers() -> None:
        if ranks.device.type == "cuda":
            torch.cuda.set_device(ranks.device)  # of this thread
        engine.warm_up(batch)

    ranks.watchdog.beat(f"compiling for stage {settings.name}", slow=True)
    if ranks.world > 1 and ranks.device.type == "cpu":
        compile_layers()  # the engine's collectives and the agreements go over the same group, and must not mix
    else:
        run_in_background(compile_layers, ranks, context.stop)
    if engine.meter.supported:
        _count_operations(stage, size)
    if ranks.first:
        context.run.record(Event.COMPILED, stage=settings.name, seconds=round(time.perf_counter() - started, 1))


def _count_operations(stage: StageContext, size: int) -> None:
    """Count the operations of a step by passes of their own through layers that are not compiled, because inside of a
    compiled one no single operations can be seen. The passes leave nothing else.
    """
    source, encoder = open_source(stage.context, stage.number, "train"), build_encoder(stage.context, stage.number)
    rows: list[EncodedStudy] = []
    for number in range(min(size, len(source))):
        with contextlib.suppress(BadSample):  # the stream names it
            rows.append(encoder.encode(*source.read(number)))
    with torch.compiler.set_stance("force_eager"):
        stage.engine.warm_up(encoder.batch(rows or [encoder.empty()]), counted=True)

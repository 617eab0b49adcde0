"""Hold the context of a run: the data that its training, evaluation and generation share.

    context = open_context(run, run.recipe(), ranks)
    training = open_source(context, 0, "train")    # sources.py
    encoder = build_encoder(context, stage=0)      # encoder_builder.py
    engine, cursor = restore_engine(context)       # engine_builder.py

Enters: a run folder and its frozen recipe. The builders are functions of the context; what they have made is kept in
its cache, so that all of a process share one source, one encoder and one family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from radhpc.core.board import Board
from radhpc.core.recipe import Recipe, Stage
from radhpc.core.run_folder import RunFolder
from radhpc.core.sample import Split
from radhpc.data.collate import StudyEncoder
from radhpc.data.source import Source
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Stop
from radhpc.engine.checkpoint import Checkpoints
from radhpc.engine.fsdp import Engine
from radhpc.models.family import ModelFamily


class Trial(Protocol):
    """The sweep that a run belongs to, as far as the job has to know it; called on rank 0 alone."""

    @property
    def metric(self) -> str: ...

    def parameters(self) -> Mapping[str, bool | int | float | str | None]: ...

    def should_prune(self, step: int) -> bool:
        """Return whether to save and end at this step, now that it was evaluated."""


@dataclass
class BuilderCache:
    """The objects that the builders have made so far in this process."""

    family: ModelFamily | None = None
    sources: dict[tuple[int, Split], Source] = field(default_factory=dict)  # by stage and split
    encoders: dict[int, StudyEncoder] = field(default_factory=dict)  # by stage


@dataclass(frozen=True, eq=False)
class RunContext:
    """A run as one rank sees it."""

    run: RunFolder
    recipe: Recipe
    ranks: Ranks
    stop: Stop  # ends long work by Interrupted, on all ranks together
    trial: Trial | None
    checkpoints: Checkpoints
    cache: BuilderCache = field(default_factory=BuilderCache)


@dataclass(frozen=True, eq=False)
class StageContext:
    """A stage of a run while it is trained."""

    context: RunContext
    number: int  # of the stage, from 0
    engine: Engine
    base_hash: str
    lineage: tuple[str, ...]  # names of the last checkpoints of the stages before
    board: Board

    @property
    def settings(self) -> Stage:
        return self.context.recipe.stages[self.number]


def open_context(
    run: RunFolder, recipe: Recipe, ranks: Ranks, stop: Stop | None = None, trial: Trial | None = None
) -> RunContext:
    """Return the context of a run; without `stop` no signal is listened to."""
    return RunContext(run, recipe, ranks, stop or Stop(), trial, Checkpoints.of(run.path, recipe))

"""Open the shards of a stage: one source for each stage and split, opened once per process."""

from radhpc.core.sample import Split
from radhpc.data.source import Source
from radhpc.training.context import RunContext


def open_source(context: RunContext, stage: int, split: Split) -> Source:
    """Return the samples of a split over the shards of a stage."""
    sources, recipe = context.cache.sources, context.recipe
    if (stage, split) not in sources:
        sources[stage, split] = Source(recipe.shards_of(recipe.stages[stage]), split)
    return sources[stage, split]

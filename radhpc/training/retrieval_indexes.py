"""Build the retrieval indexes: for each stage whose prompts carry reports of similar studies, those reports.

    build_retrieval_indexes(context)                # before the first step, on all ranks
    retrieve = load_retriever(context, 0, count=2)  # views, patient -> reports of similar studies of other patients

An index lies in RUN/neighbours/STAGE/ and never changes while the run lives: its sha256 is recorded by the event
"neighbours" and checked by each later life.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.protocol import Event
from radhpc.core.sample import Sample
from radhpc.data.retrieval import RetrievalIndex, encode_thumbnail
from radhpc.data.tasks import Tasks
from radhpc.distributed.background import run_on_first
from radhpc.engine.checkpoint import sha256
from radhpc.training.context import RunContext
from radhpc.training.sources import open_source


def build_retrieval_indexes(context: RunContext) -> None:
    """Make the index of each stage that needs one, unless an earlier life has made it; all ranks call it.

    Raises UserError where an index is not the one that an earlier life was trained with.
    """
    recipe = context.recipe
    for number, stage in enumerate(recipe.stages):
        text = recipe.text_of(stage)
        if not text.neighbours:
            continue
        training, tasks = open_source(context, number, "train"), Tasks(text, recipe.findings, recipe.seed)

        def report(sample: Sample, tasks: Tasks = tasks) -> str:
            usual = tasks.default(sample)
            return usual.answer if usual and tasks.mixture[usual.task].kind == "report" else ""

        RetrievalIndex.build(training, report, len(training), _folder(context, number), context.ranks, context.stop)

        def check(number: int = number) -> None:
            _check_index(context, number)

        run_on_first(check, context.ranks, context.stop)


def retrieval_index_path(context: RunContext, stage: int) -> Path:
    """Return the file of a stage's index."""
    training = open_source(context, stage, "train")
    return RetrievalIndex.path(training, len(training), _folder(context, stage))


def load_retriever(context: RunContext, stage: int, count: int) -> Callable[[Sequence[Image.Image], str], list[str]]:
    """Return a function that looks up `count` reports of similar studies for the views of a patient's study.

    Raises UserError where the index is missing.
    """
    path = retrieval_index_path(context, stage)
    if not path.exists():
        raise UserError(f"{path}: missing; without it the model does not get the reports that it was trained with")
    index = RetrievalIndex.load(path)
    return lambda views, patient: index.most_similar(encode_thumbnail(views), count, patient)


def _folder(context: RunContext, stage: int) -> Path:
    """Return the folder of one stage: two stages may learn other sections of the same studies."""
    return context.run.folder(f"neighbours/{context.recipe.stages[stage].name}")


def _check_index(context: RunContext, stage: int) -> None:
    path, name = retrieval_index_path(context, stage), context.recipe.stages[stage].name
    digest = sha256(path)
    recorded = next((event for event in context.run.events(Event.NEIGHBOURS) if event["stage"] == name), None)
    if recorded is None:
        context.run.record(Event.NEIGHBOURS, stage=name, sha256=digest)
    elif recorded["sha256"] != digest:
        raise UserError(f"{path}: changed since stage '{name}' began; its prompts would be others: start a new run")

"""Build the model family and the encoders of a run; each is made once per process.

family = build_family(context)             # the tokenizer is trained first where the recipe trains one
encoder = build_encoder(context, stage=0)
batch = encoder.batch([encoder.encode(*source.read(7))])
"""

import shutil

from radhpc.data.collate import StudyEncoder, conversation
from radhpc.distributed.background import run_on_first
from radhpc.models import family as models, tokenizer
from radhpc.training.context import RunContext
from radhpc.training.retrieval_indexes import load_retriever
from radhpc.training.sources import open_source


def build_family(context: RunContext) -> models.ModelFamily:
    """Return the model family with its tokenizer; on the first call all ranks call it."""
    if context.cache.family is None:
        context.cache.family = models.family(context.recipe.model, _tokenizer_folder(context))
    return context.cache.family


def build_encoder(context: RunContext, stage: int) -> StudyEncoder:
    """Return the encoder of a stage: its prompts, answers and views."""
    encoders, recipe = context.cache.encoders, context.recipe
    if stage not in encoders:
        settings = recipe.stages[stage]
        text, images = recipe.text_of(settings), recipe.images_of(settings)
        labelled = bool(settings.objective.clinical)
        encoder = StudyEncoder(build_family(context), text, images, recipe.findings, recipe.seed, labelled)
        if text.neighbours:
            encoder.retrieve = load_retriever(context, stage, text.neighbours)
        encoders[stage] = encoder
    return encoders[stage]


def _tokenizer_folder(context: RunContext) -> str:
    """Return the folder of the tokenizer; one that the recipe trains is trained once, by rank 0."""
    recipe, run = context.recipe, context.run
    vocabulary = recipe.model.tokenizer.train_vocabulary
    if vocabulary is None:
        return str(recipe.model.tokenizer_folder)
    folder = run.path / "tokenizer"

    def train() -> None:
        if folder.exists():
            return
        temporary = run.path / ".tokenizer.writing"
        shutil.rmtree(temporary, ignore_errors=True)
        text, findings = recipe.text_of(recipe.stages[0]), recipe.findings
        samples = open_source(context, 0, "train").samples()
        tokenizer.train((conversation(sample, text, findings) for sample in samples), vocabulary, temporary)
        temporary.rename(folder)

    run_on_first(train, context.ranks, context.stop)
    return str(folder)

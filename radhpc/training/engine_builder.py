"""Build the engine of a stage: the base model, its adapters, what is trained, sharded over the ranks.

    engine, base_hash = build_engine(context, stage=1, lineage=("step-001000",))    # to train
    engine, cursor = restore_engine(context)                                        # to evaluate or to answer

All ranks call these functions.
"""

import gc

import torch

from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe
from radhpc.distributed.background import run_in_background
from radhpc.engine import zero
from radhpc.engine.checkpoint import Cursor
from radhpc.engine.fsdp import Engine, check_support
from radhpc.models import adapters, extra_modules, lazy_loading
from radhpc.models.quantization import quantise
from radhpc.training.base_hash import compute_base_hash
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_family
from radhpc.training.sources import open_source


def build_engine(
    context: RunContext, stage: int, lineage: tuple[str, ...], training: bool = True
) -> tuple[Engine, str]:
    """Return the model at the start of a stage, ready to train, and the hash of its base model.

    `lineage` names the last checkpoints of the stages before. Without `training`, one rank needs no DeepSpeed.
    """
    family, recipe, ranks = build_family(context), context.recipe, context.ranks
    if not training and ranks.world == 1:
        recipe = recipe.model_copy(update={"engine": "single"})
    check_support(recipe, ranks)
    gc.collect()  # the engine of the stage before is full of reference cycles
    values_needed = any(each.lora is not None and each.lora.dora for each in recipe.stages)
    model = run_in_background(
        lambda: lazy_loading.build(family, recipe.model, recipe.seed, values_needed), ranks, context.stop
    )
    assert model is not None
    base_hash = compute_base_hash(context, model)
    if recipe.model.quantise is not None:
        quantise(model, family.blocks, (pattern for each in recipe.stages for pattern in each.train))
    _check_text_length(model, recipe)
    extra_modules.attach(model, family, recipe, recipe.seed)
    adapters.check(model, recipe.stages)

    def trained_before(earlier: int) -> adapters.Tensors:
        return _load_stage_end(context, earlier, lineage[earlier], base_hash)

    adapters.prepare(model, recipe.stages, stage, trained_before, recipe.seed)
    settings = recipe.stages[stage]
    engine_class = zero.ZeroEngine if recipe.engine == "deepspeed" else Engine
    return engine_class(model, recipe, settings.optimizer, family.blocks, ranks, settings.objective), base_hash


def restore_engine(context: RunContext, name: str | None = None) -> tuple[Engine, Cursor]:
    """Return the model of a checkpoint, or of the newest one that verifies. Raises UserError where there is none."""
    checkpoints = context.checkpoints
    newest, skipped = (name, []) if name else checkpoints.newest()
    if newest is None:
        why = "".join(f"; {damaged}: {fault}" for damaged, fault in skipped)
        raise UserError(f"{context.run.path}: no checkpoint to load{why}")
    cursor = checkpoints.cursor(newest)
    engine, base_hash = build_engine(context, cursor.stage, cursor.lineage, training=False)
    check_cursor(context, cursor, base_hash)
    engine.load(checkpoints.tensors(newest, moments=False), steps=0)
    return engine, cursor


def check_cursor(context: RunContext, cursor: Cursor, base_hash: str) -> None:
    """Refuse a checkpoint that was made with another recipe, base model or data than the run has now."""
    run = context.run.path
    if cursor.recipe != context.recipe.hash:
        raise UserError(f"{run}/recipe.yaml: changed since the checkpoint of step {cursor.step}; start a new run")
    if cursor.base != base_hash:
        raise UserError(f"{run}: the base model is not the one of the checkpoint of step {cursor.step}")
    if cursor.data != open_source(context, cursor.stage, "train").hashes:
        raise UserError(
            f"{run}: the shards are not those of the checkpoint of step {cursor.step}; a run needs the same "
            "manifests all its life"
        )


def _load_stage_end(context: RunContext, stage: int, name: str, base_hash: str) -> adapters.Tensors:
    """Load what an earlier stage has trained. Raises UserError where its last checkpoint is damaged or not its own."""
    checkpoints = context.checkpoints
    location = checkpoints.storage.where(name)
    if fault := checkpoints.verify(name):
        stage_name = context.recipe.stages[stage].name
        raise UserError(f"{location}: {fault}; without the end of stage '{stage_name}' the run cannot go on")
    if checkpoints.cursor(name).base != base_hash:
        raise UserError(f"{location}: it was trained on another base model than this one")
    return checkpoints.tensors(name, moments=False)


def _check_text_length(model: torch.nn.Module, recipe: Recipe) -> None:
    """Refuse texts that are longer than the model can read."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    longest = getattr(config, "max_position_embeddings", None)
    for stage in recipe.stages:
        tokens = recipe.text_of(stage).max_tokens
        if longest is not None and tokens > longest:
            raise UserError(
                f"stage '{stage.name}': text.max_tokens {tokens} is longer than the model's context; allowed are up to "
                f"{longest}"
            )

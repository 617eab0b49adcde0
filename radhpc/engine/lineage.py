"""Begin a run where another run's stage ended: `train RECIPE --stages 2,3 --from RUN`.

The earlier stages of the new run's recipe are those that the other run was trained by, and their last checkpoints are
copied, so that the new run depends on no other folder, and its recipe says how its weights came about.

    recipe, first = select(recipe, "2,3", RunFolder.open("runs/base"))     # first = 1: the stages before are done
    take_over(run, first, RunFolder.open("runs/base"))                     # into the new run's folder
"""

import shutil
from dataclasses import replace
from pathlib import Path

from radhpc.core.errors import UserError
from radhpc.core.protocol import Event
from radhpc.core.recipe import Recipe, validate
from radhpc.core.run_folder import RunFolder
from radhpc.engine.checkpoint import Checkpoints


def select(recipe: Recipe, stages: str | None, origin: RunFolder | None) -> tuple[Recipe, int]:
    """Return the recipe of the stages that `stages` names, by number from 1 or by name, and how many stages are done
    already. Raises UserError.
    """
    first, last = _chosen(recipe, stages)
    if first and origin is None:
        raise UserError(f"--stages {stages}: the stages before are trained elsewhere; say where by --from RUN")
    if not first and origin is not None:
        raise UserError(f"--from {origin.path}: stage '{recipe.stages[0].name}' needs no other run; see --stages")
    chosen = recipe.stages[:last]
    if origin is not None:
        theirs = origin.recipe()
        if len(theirs.stages) < first:
            raise UserError(f"--from {origin.path}: it has {len(theirs.stages)} stages, {first} are wanted")
        for key in ("fusion", "family"):
            if getattr(theirs.model, key) != getattr(recipe.model, key):
                raise UserError(f"--from {origin.path}: its model.{key} is another one; allowed is the same")
        if theirs.heads and theirs.findings != recipe.findings:
            raise UserError(f"--from {origin.path}: its 'findings' are others, which its heads were made for")
        before = tuple(
            stage.model_copy(
                update={
                    "shards": theirs.shards_of(stage),
                    "text": theirs.text_of(stage),
                    "images": theirs.images_of(stage),
                }
            )
            for stage in theirs.stages[:first]
        )
        chosen = (*before, *chosen[first:])
        _last_checkpoints(origin, first)
    cut = {**recipe.model_dump(), "stages": [stage.model_dump() for stage in chosen]}
    return validate(Recipe, cut, Path(f"--stages {stages}")), first


def take_over(run: RunFolder, first: int, origin: RunFolder) -> None:
    """Copy the ends of the stages before `first`, and the tokenizer if it was trained there. Raises UserError."""
    recipe, theirs = run.recipe(), Checkpoints.of(origin.path, origin.recipe())
    ours = Checkpoints.of(run.path, recipe)
    names = _last_checkpoints(origin, first)
    for name in names:
        cursor = replace(theirs.cursor(name), recipe=recipe.hash, origin=f"{origin.path}: {name}")
        ours.save(theirs.tensors(name, moments=False), cursor)
    if (origin.path / "tokenizer").exists():
        shutil.copytree(origin.path / "tokenizer", run.path / "tokenizer")
    ends = [event for event in origin.events(Event.STAGE_FINISHED, Event.TAKEN_OVER) if event["number"] == first - 1]
    run.record(
        Event.TAKEN_OVER,
        origin=str(origin.path),
        checkpoints=names,
        step=theirs.cursor(names[-1]).step,
        number=first - 1,
        loss=ends[-1].get("loss") if ends else None,  # for stage_transition.py
    )


def _last_checkpoints(origin: RunFolder, first: int) -> list[str]:
    """Return the checkpoints that ended the stages before `first`. Raises UserError where one is missing or damaged."""
    recipe = origin.recipe()
    checkpoints = Checkpoints.of(origin.path, recipe)
    ends = {}
    for name in checkpoints.committed():
        cursor = checkpoints.cursor(name)
        if cursor.stage_done:
            ends[cursor.stage] = name
    for number in range(first):
        stage = recipe.stages[number].name
        if number not in ends:
            raise UserError(f"--from {origin.path}: no checkpoint of the end of stage '{stage}'")
        if fault := checkpoints.verify(ends[number]):
            raise UserError(f"{checkpoints.storage.where(ends[number])}: {fault}; it is the end of stage '{stage}'")
    return [ends[number] for number in range(first)]


def _chosen(recipe: Recipe, stages: str | None) -> tuple[int, int]:
    """Return the first of the stages, from 0, and their end (exclusive)."""
    names = [stage.name for stage in recipe.stages]
    if stages is None:
        return 0, len(names)
    numbers = []
    for word in stages.split(","):
        word = word.strip()
        if word in names:
            numbers.append(names.index(word))
        elif word.isdecimal() and 1 <= int(word) <= len(names):
            numbers.append(int(word) - 1)
        else:
            allowed = f"1 to {len(names)}, and {', '.join(names)}"
            raise UserError(f"--stages {stages}: no stage '{word}'; allowed are {allowed}")
    if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise UserError(f"--stages {stages}: allowed are stages that follow each other, such as 2,3")
    return numbers[0], numbers[-1] + 1

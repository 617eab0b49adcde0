"""Runs that begin where another's stage ended, and stages that begin where the one before ended, or not at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from radhpc import worker
from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe, load
from radhpc.core.run_folder import RunFolder
from radhpc.data.audit import audit
from radhpc.engine import lineage
from radhpc.engine.checkpoint import read_cursor
from tests.conftest import TINY_RECIPE

SMALL = [
    "stages.scratch.steps=2", "stages.adapt.epochs=null", "stages.adapt.steps=2", "stages.refine.steps=2",
    "evaluation.samples=1", "evaluation.max_new_tokens=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Recipe:
    path = tmp_path_factory.mktemp("lineage") / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=phantom_shards))
    return load(path, SMALL)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> RunFolder:
    """A run of three stages of two steps each."""
    run = RunFolder.create(tmp_path_factory.mktemp("base") / "run", recipe)
    assert worker.run(str(run.path)).state == "finished"
    return run


def end(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.path / "checkpoints/step-000006/state.safetensors")


def test_a_run_from_anothers_stage_ends_as_that_one(base: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    """The same seeds, data and weights: bit for bit, from its own copies, and with a recipe that says so."""
    changed = load_changed(recipe, "stages.scratch.optimizer.learning_rate=0.5")
    chosen, first = lineage.select(changed, "2,refine", base)
    assert first == 1
    assert chosen.stages[0].optimizer == recipe.stages[0].optimizer, "the recipe must say how its weights came about"
    run = RunFolder.create(tmp_path / "run", chosen)
    lineage.take_over(run, first, base)
    cursor = read_cursor(run.path / "checkpoints/step-000002")
    assert (cursor.stage, cursor.stage_done) == (0, True)
    assert cursor.origin == f"{base.path}: step-000002"
    assert worker.run(str(run.path)).state == "finished"
    ours, wanted = end(run), end(base)
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)
    found = [(epoch["stage"], epoch["exactly_once"]) for epoch in audit(run)["epochs"]]
    assert found == [("adapt", True), ("refine", True)]
    assert [event["number"] for event in run.events("stage_finished")] == [1, 2]
    again, first = lineage.select(recipe, "3", run)  # and so on
    third = RunFolder.create(tmp_path / "third", again)
    lineage.take_over(third, first, run)
    assert worker.run(str(third.path)).state == "finished"
    assert all(torch.equal(end(third)[name], wanted[name]) for name in wanted)


def load_changed(recipe: Recipe, *changes: str) -> Recipe:
    from radhpc.core.recipe import build

    return build(recipe.model_dump(mode="json"), changes, Path("tiny.yaml"))


def test_a_seam_ends_the_run_before_its_first_step(base: RunFolder, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    shutil.copytree(base.path, run.path)
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(run.path / "checkpoints" / name)
    lines = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    ends = [n for n, event in enumerate(lines) if event["event"] == "stage_finished"]
    kept = lines[: ends[0] + 1]
    losses = [lines[n]["loss"] for n in ends]
    assert all(loss > 0 for loss in losses)
    kept[-1]["loss"] *= 1.01
    (run.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    with pytest.raises(UserError, match="stage 'adapt' does not begin where 'scratch' ended: the loss on 4 studies"):
        worker.run(str(run.path))
    assert not run.events("first_step")[len([e for e in kept if e["event"] == "first_step"]) :]


def test_what_cannot_be_chosen_is_refused(base: RunFolder, recipe: Recipe, tmp_path: Path) -> None:
    def refused(stages: str | None, origin: RunFolder | None, of: Recipe = recipe) -> str:
        with pytest.raises(UserError) as error:
            lineage.select(of, stages, origin)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no stage '4'; allowed are 1 to 3, and scratch, adapt, refine" in refused("4", None)
    assert "stages that follow each other" in refused("1,3", None)
    assert "say where by --from RUN" in refused("2,3", None)
    assert "needs no other run" in refused(None, base)
    assert "its model.fusion is another one" in refused(
        "3", base, load_changed(recipe, "model.fusion={width: 8, heads: 1}")
    )
    unborn = RunFolder.create(tmp_path / "unborn", recipe)
    assert "no checkpoint of the end of stage 'scratch'" in refused("2", unborn)
    assert lineage.select(recipe, "1,2", None)[0].stages == recipe.stages[:2]

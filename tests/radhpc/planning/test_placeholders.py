"""A plan of every full recipe on a machine that has neither the weights nor the data."""

from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe, load
from radhpc.models.family import family_class
from radhpc.planning import placeholders
from radhpc.planning.forecast import forecast
from slurm.cluster import GPUS
from slurm.preflight.plan import fits
from tests.conftest import ROOT

FULL = ("radixpert", "radixpert_code", "gla", "lightmedvlm", "cxr_qlora", "t4", "rtx3090", "qwen3_vl")
BASE = {  # parameters as the models' makers and pages give them; LightMedVLM's with SASA's 32.6 million
    "radixpert": 10_670_220_835,
    "gla": 7_062_902_784,
    "lightmedvlm": 715_385_016,
    "qwen3_vl": 4_437_815_808,
}


def full(name: str, *changes: str) -> Recipe:
    return load(ROOT / "recipes" / f"{name}.yaml", list(changes))


@pytest.mark.parametrize("name", FULL)
def test_what_stands_in_is_said(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = full(name)
    *weights, data = placeholders.notes(recipe)
    assert len(weights) == len(recipe.model.folders), "no configuration of a model that it names"
    assert all(line.startswith("models/") and "not there yet; the published configuration" in line for line in weights)
    assert data.startswith("data/")
    (tmp_path / "data" / "roco_v2").mkdir(parents=True)
    assert placeholders.missing_shards((f"{tmp_path}/data/roco_v2", "s3://bucket/roco")) == [], (
        "a mistake, if they are no shards"
    )


@pytest.mark.parametrize("name", BASE)
def test_a_published_configuration_gives_the_published_size(name: str, tmp_path: Path) -> None:
    recipe = full(name)
    model = placeholders.fill_missing_folders(recipe.model, tmp_path)
    placeholders.write_tokenizer(recipe, tmp_path / "tokenizer")
    family = family_class(model.family)
    if model.attention == "auto":
        model = model.model_copy(update={"attention": getattr(family, "attention", "sdpa")})
    made: Any = family(model, str(tmp_path / "tokenizer"))
    assert sum(parameter.numel() for parameter in made.build_empty().parameters()) == BASE[name]


def test_shards_that_are_there_are_measured_and_steps_need_no_shards(recipe_file: Path, phantom_shards: Path) -> None:
    """Of three stages one has whole epochs of shards that are missing; the others are as if all were there."""
    recipe = load(recipe_file)
    part = load(recipe_file, ["stages.adapt.shards=[data/none]", "stages.refine.shards=[data/none]"])
    complete, partial = forecast(recipe, world=1), forecast(part, world=1)
    assert partial[0] == complete[0]
    assert (partial[1].steps, partial[1].samples, partial[1].epoch_samples) == (None, None, None)
    assert (partial[2].steps, partial[2].samples, partial[2].epoch_samples) == (14, 14 * 6, None)
    assert (partial[2].tokens, partial[2].views) == (recipe.text.max_tokens, placeholders.VIEWS)
    assert partial[2].gigabytes_per_gpu > complete[2].gigabytes_per_gpu
    with pytest.raises(UserError, match=r"no manifest\.json there"):
        forecast(load(recipe_file, [f"shards=[{recipe_file.parent}]"]), world=1)


@pytest.mark.heavy
@pytest.mark.timeout(250)
def test_the_recipes_for_one_card_fit_it() -> None:
    """On the real 11B, traced whole. One trace is enough: the T4's recipe is the other one with less of each study."""
    recipe, smaller = full("rtx3090").model_dump(), full("t4").model_dump()
    assert smaller["images"].pop("views") < recipe["images"].pop("views")
    assert smaller["text"].pop("max_tokens") < recipe["text"].pop("max_tokens")
    assert (smaller.pop("precision"), recipe.pop("precision")) == ("fp16", "bf16"), "both of two bytes"
    for name in ("name", "evaluation"):
        del smaller[name], recipe[name]
    assert smaller == recipe
    (stage,) = forecast(full("rtx3090"), world=1)
    assert stage.trainable == 67_174_400
    assert stage.parameters == BASE["radixpert"] + 67_174_400
    assert 8 < stage.gigabytes_per_gpu < 13, "of tensors alone, on a card of 16 and on one of 24"
    assert (stage.steps, stage.samples, stage.epoch_samples) == (20_000, 160_000, None)
    for card in ("T4", "RTX 3090"):
        (limit,) = (gigabytes for _, name, gigabytes in GPUS if name == card)
        assert fits(stage.gigabytes_per_gpu, limit * 2**30)

"""The recipes of the published systems: each loads, and says of the real model what is documented."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from radhpc import worker
from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe, load
from radhpc.core.run_folder import RunFolder
from radhpc.models import adapters, extra_modules, tokenizer
from radhpc.models.family import ModelFamily, family
from tests.conftest import ROOT

MINE = ("radixpert", "radixpert_code", "cxr_qlora", "t4", "rtx3090", "tiny/radixpert", "tiny/cxr_qlora")
# Llama-3.2-11B-Vision's config.json, as far as the class's defaults are others.
ELEVEN: dict[str, Any] = {"text": {}, "vision": {"image_size": 560}}


@pytest.mark.parametrize("name", MINE)
def test_a_recipe_loads_and_opens_with_its_commands(name: str, tmp_path: Path) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = load(path)
    frozen = tmp_path / "recipe.yaml"
    frozen.write_text(recipe.to_yaml())
    assert load(frozen) == recipe
    said = re.findall(r"^#\s+radhpc (?:plan|train) (\S+)", path.read_text(), re.M)
    assert said
    assert set(said) == {f"recipes/{name}.yaml"}


@pytest.fixture(scope="module")
def eleven(tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    """The real architecture without values; its text is Llama's, its tokenizer is not."""
    folder = tmp_path_factory.mktemp("eleven")
    tokenizer.train(["Clear lungs."], 300, folder)
    recipe = load(
        ROOT / "recipes" / "quickstart.yaml",
        [f"model.config={ELEVEN}", "model.gates=null", "model.positions=null", f"model.tokenizer.folder={folder}",
         "model.tokenizer.train_vocabulary=null"],
    )  # fmt: skip
    return family(recipe.model, str(folder))


def recipe(name: str) -> Recipe:
    return load(ROOT / "recipes" / f"{name}.yaml")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", ["radixpert", "cxr_qlora"])
def test_a_twin_trains_through_all_its_stages(name: str, phantom_shards: Path, tmp_path: Path) -> None:
    changes = [f"shards=[{phantom_shards}]", "evaluation.samples=1", "evaluation.max_new_tokens=2"]
    twin = load(ROOT / "recipes" / "tiny" / f"{name}.yaml", changes)
    few = twin.model_copy(update={"stages": tuple(stage.model_copy(update={"steps": 2}) for stage in twin.stages)})
    run = RunFolder.create(tmp_path / "run", few)
    assert worker.run(str(run.path)).state == "finished"
    assert [event["stage"] for event in run.events("stage_finished")] == [stage.name for stage in few.stages]


def test_all_linear_layers_at_rank_16_are_67_million_parameters(eleven: ModelFamily) -> None:
    """As the notebook prints it that cxr_qlora was made from: 67,174,400."""
    stage = recipe("cxr_qlora").stages[0]
    assert stage.lora is not None
    model = eleven.build_empty()
    adapters.check(model, [stage])
    with torch.device("meta"):
        adapters.attach(model, stage.lora, 0)
    adapters.choose_trained(model, stage)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 67_174_400
    for name in ("t4", "rtx3090"):
        assert recipe(name).stages[0].lora == stage.lora


def test_radixperts_stages_fit_the_real_model_and_grow(eleven: ModelFamily) -> None:
    """Every pattern matches; adapters come first to the eight layers that see the image, then to all."""
    model = eleven.build_empty()
    published, code = recipe("radixpert"), recipe("radixpert_code")
    with torch.device("meta"):
        extra_modules.attach(model, eleven, published, 0)
    for each in (published, code):
        adapters.check(model, each.stages)
    layers = dict(model.named_modules())
    for each, ranks in ((published, (16, 24, 32)), (code, (8, 12, 16))):
        counts = []
        for stage, rank in zip(each.stages, ranks, strict=True):
            assert stage.lora is not None
            assert (stage.lora.rank, stage.lora.alpha, stage.lora.dropout) == (rank, 2 * rank, 0.1)
            found = [layer for name, layer in layers.items() if re.fullmatch(stage.lora.targets, name)]
            assert all(isinstance(layer, nn.Linear) for layer in found)
            counts.append(sum(rank * (layer.in_features + layer.out_features) for layer in found))  # type: ignore[operator]
        if each is published:
            assert counts == [10_485_760, 78_643_200, 134_348_800]
    assert [(stage.epochs, stage.optimizer.learning_rate) for stage in published.stages] == [
        (15, 1e-4), (20, 5e-5), (25, 2e-5)
    ]  # fmt: skip
    assert [(s.epochs, s.batch, s.optimizer.learning_rate) for s in code.stages] == [
        (10, 16, 5e-5), (15, 12, 3e-5), (20, 8, 1e-5)
    ]  # fmt: skip
    weights = [
        (terms.generation, terms.contrastive, terms.clinical, terms.fusion, terms.regularisation)
        for terms in (stage.objective for stage in published.stages)
    ]
    assert weights == [(1, 0.5, 0, 0, 0.1), (1, 0.7, 0.3, 0, 0.1), (1, 0.8, 0.5, 0.3, 0.1)]
    assert [stage.optimizer.sharpness for stage in code.stages] == [None] * 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("stages.task.objective.fusion=1 model.fusion=null", "objective.fusion 1.0 needs model.fusion"),
        ("stages.task.lora=null stages.task.adapters=merge", "objective.regularisation 0.1 is of adapters"),
        ("engine=deepspeed", "goes with engines fsdp and single"),
        ("model.fusion.heads=7", "width 4096 is no multiple of heads 7"),
        (
            "text.tasks.rare={kind: finding, prompt: '{finding}?', findings: [Cold]}",
            "finding 'Cold': allowed are No Fin",
        ),
        ("stages.task.adapters=keep", "'keep' needs lora.rank 24; or say 'grow'"),
        ("findings.vocabulary=padchest", "vocabulary 'padchest' needs 'names'"),
        ("stages.task.objective={generation: 0}", "nothing to learn"),
    ],
)
def test_what_does_not_fit_together_is_refused(change: str, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as error:
        load(ROOT / "recipes" / "radixpert.yaml", re.split(r" (?=model|stages)", change))
    assert "\n" not in str(error.value)

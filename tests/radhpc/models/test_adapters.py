"""Stages join without a seam: after growing, keeping or merging adapters the logits are those before."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from radhpc.core.errors import UserError
from radhpc.core.recipe import LoraSettings, Recipe, Stage, load
from radhpc.data.collate import Batch, StudyEncoder
from radhpc.data.source import Source
from radhpc.distributed.ranks import Ranks
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters
from radhpc.models.family import ModelFamily
from radhpc.serving.export import write_adapter
from tests.conftest import TINY_RECIPE, tiny_family

TARGETS = ".*language_model.*(q|v)_proj"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Recipe:
    path = tmp_path_factory.mktemp("adapters") / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=phantom_shards))
    return load(path)


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> ModelFamily:
    return tiny_family(recipe, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


@pytest.fixture(scope="module")
def batch(recipe: Recipe, kind: ModelFamily) -> Batch:
    encoder, source = StudyEncoder(kind, recipe.text), Source(recipe.shards, "train")
    return encoder.batch([encoder.encode(*source.read(n)) for n in range(4)])


def logits(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**inputs).logits  # type: ignore[no-any-return]


def trained(kind: ModelFamily, lora: LoraSettings) -> tuple[torch.nn.Module, adapters.Adapter]:
    """A model with adapters that do something."""
    model = kind.build(0)
    adapters.attach(model, lora, seed=1)
    torch.manual_seed(2)
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(std=0.3)
            tensors[adapters.canonical(name)] = parameter.data.clone()
    return model, adapters.Adapter(lora, tensors)


@pytest.mark.parametrize(("rank", "alpha"), [(2, 4), (4, 8), (5, 3.5), (16, 64)])
def test_growing_keeps_the_function_and_every_new_direction_learns(
    kind: ModelFamily, batch: Batch, rank: int, alpha: float
) -> None:
    before, adapter = trained(kind, LoraSettings(rank=2, alpha=4, targets=TARGETS))
    after = kind.build(0)
    lora = LoraSettings(rank=rank, alpha=alpha, targets=TARGETS)
    adapters.attach(after, lora, seed=3)
    plain = logits(after, batch)
    adapters.grow(after, lora, adapter)
    expected = logits(before, batch)
    assert (expected - plain).abs().max() > 1e-2, "the adapters do nothing: the test would pass on anything"
    assert (logits(after, batch) - expected).abs().max() < 1e-5
    after(**{k: v for k, v in batch.items() if k != "labels"}).logits.square().sum().backward()
    for name, parameter in after.named_parameters():
        if ".lora_B." in name:
            assert parameter.grad is not None
            assert (parameter.grad.abs().amax(dim=0) > 0).all(), f"{name}: a direction without gradient"


def test_merging_keeps_the_function(kind: ModelFamily, batch: Batch) -> None:
    before, adapter = trained(kind, LoraSettings(rank=3, alpha=6, targets=TARGETS))
    after = kind.build(0)
    adapters.merge(after, adapter)
    assert (logits(after, batch) - logits(before, batch)).abs().max() < 1e-5


def test_a_stage_is_prepared_from_the_stages_before(kind: ModelFamily, recipe: Recipe, batch: Batch) -> None:
    """Full training, then adapters, then grown ones: the third stage starts where the second ended."""
    saved: list[adapters.Tensors] = []
    last = None
    for number in range(3):
        model = kind.build(0)
        adapters.prepare(model, recipe.stages, number, saved.__getitem__, seed=0)
        if last is not None:
            assert (logits(model, batch) - last).abs().max() < 1e-5, f"a seam before stage {number}"
        engine = Engine(model, recipe, recipe.stages[number].optimizer, kind.blocks, Ranks())
        for _ in range(3):
            engine.step([batch], int((batch["labels"][:, 1:] != -100).sum()), 1.0)
        assert last is None or (logits(model, batch) - last).abs().max() > 1e-4
        last = logits(model, batch)
        saved.append(engine.weights())


def test_peft_reads_our_adapter(kind: ModelFamily, batch: Batch, tmp_path: Path) -> None:
    lora = LoraSettings(rank=3, alpha=6, targets=TARGETS)
    model, adapter = trained(kind, lora)
    write_adapter(tmp_path / "adapter", adapters.peft_config(lora), adapter.tensors)
    write_adapter(tmp_path / "adapter", adapters.peft_config(lora), adapter.tensors)  # over the one that is there
    theirs: Any = peft.PeftModel.from_pretrained(kind.build(0), str(tmp_path / "adapter"))  # type: ignore[arg-type]
    assert torch.equal(logits(theirs, batch), logits(model, batch))


def test_what_matches_nothing_is_refused(kind: ModelFamily, recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"nowhere.*"):
        adapters.attach(kind.build(0), LoraSettings(rank=2, alpha=2, targets="nowhere"), 0)
    stage = recipe.stages[0].model_copy(update={"train": ("projecter",)})
    with pytest.raises(UserError, match="'projecter' matches no parameter"):
        adapters.choose_trained(kind.build(0), stage)
    optimizer = recipe.stages[1].optimizer.model_copy(
        update={"groups": (recipe.stages[1].optimizer.groups[0].model_copy(update={"match": "vision"}),)}
    )
    model = kind.build(0)
    adapters.prepare(model, (recipe.stages[1],), 0, lambda n: {}, 0)
    with pytest.raises(UserError, match="'vision' matches no trained parameter"):
        Engine(model, recipe, optimizer, kind.blocks, Ranks())


def test_only_the_stage_trains(kind: ModelFamily, recipe: Recipe, batch: Batch) -> None:
    model = kind.build(0)
    adapters.prepare(model, (recipe.stages[1],), 0, lambda n: {}, 0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    engine = Engine(model, recipe, recipe.stages[1].optimizer, kind.blocks, Ranks())
    for _ in range(2):
        engine.step([batch], 100, 1.0)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name in before if ".lora_" in name}


BROAD = ".*language_model.*(q|v|o)_proj"
STEPS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"rslora": True}),
    ({"rslora": True}, {"rank": 6, "alpha": 5, "rslora": True}),
    ({"rank_pattern": {"q_proj": 3}}, {"rank": 4, "rank_pattern": {"q_proj": 7, "layers.0.self_attn.v_proj": 5}}),
    ({}, {"rank": 5, "targets": BROAD}),
    ({}, {"rank": 5, "dora": True}),
    ({"dora": True}, {"rank": 6, "alpha": 9, "dora": True}),
]


@pytest.mark.parametrize(("before", "after"), STEPS, ids=["rslora", "alpha", "pattern", "layers", "dora", "dora-rank"])
def test_adapters_of_every_kind_grow_without_changing_the_function(
    kind: ModelFamily, batch: Batch, before: dict[str, Any], after: dict[str, Any]
) -> None:
    plain = {"rank": 2, "alpha": 4, "targets": TARGETS}
    old, lora = LoraSettings(**(plain | before)), LoraSettings(**(plain | after))
    model, adapter = trained(kind, old)
    if old.dora:
        for name, parameter in model.named_parameters():
            if "magnitude" in name:  # trained, too
                parameter.data *= 1.3
                adapter.tensors[adapters.canonical(name)] = parameter.data.clone()
    grown = kind.build(0)
    adapters.attach(grown, lora, seed=3)
    fresh = logits(grown, batch)
    adapters.grow(grown, lora, adapter)
    expected = logits(model, batch)
    assert (expected - fresh).abs().max() > 1e-2, "the adapters do nothing: the test would pass on anything"
    assert (logits(grown, batch) - expected).abs().max() < 1e-5
    for name, parameter in grown.named_parameters():
        if name.endswith(".lora_A.default.weight"):
            layer = adapters.canonical(name).removesuffix(".lora_A.weight")
            assert len(parameter) == lora.rank_of(layer), "PEFT chose another rank than we"


@pytest.mark.parametrize("kinds", [{"rslora": True}, {"dora": True}, {"rank_pattern": {"q_proj": 3}}])
def test_merging_keeps_the_function_of_every_kind(kind: ModelFamily, batch: Batch, kinds: dict[str, Any]) -> None:
    before, adapter = trained(kind, LoraSettings(**({"rank": 2, "alpha": 4, "targets": TARGETS} | kinds)))
    after = kind.build(0)
    adapters.merge(after, adapter)
    assert (logits(after, batch) - logits(before, batch)).abs().max() < 1e-5


def test_a_seam_is_refused_when_it_comes(kind: ModelFamily) -> None:
    """A layer's change is held against what it was, on every start."""
    _, adapter = trained(kind, LoraSettings(rank=2, alpha=4, targets=TARGETS))
    for name, tensor in adapter.tensors.items():
        if ".lora_B." in name:
            tensor *= float("nan")
    grown, lora = kind.build(0), LoraSettings(rank=3, alpha=4, targets=TARGETS)
    adapters.attach(grown, lora, seed=0)
    with pytest.raises(UserError, match="growing the adapters would change the model"):
        adapters.grow(grown, lora, adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ["no_such"]}, "train: 'no_such' matches no parameter"),
        ({"lora": {"targets": "nowhere"}}, "lora.targets: 'nowhere' matches no linear layer"),
        ({"lora": {"targets": ".*language_model.*self_attn.*"}}, "also matches .*; allowed are linear layers"),
        ({"lora": {"rank_pattern": {"k_proj": 3}}}, "rank_pattern: 'k_proj' matches none of the targets"),
        ({"train": ["layers.0"]}, "is trained whole by train 'layers.0' and adapted by"),
        ({"lora": {"targets": ".*language_model.*q_proj", "rank": 9}}, "leaves out .*v_proj"),
        ({"lora": {"rank": 9, "rank_pattern": {"v_proj": 1}}}, "has rank 1, before 2; ranks can only grow"),
    ],
)
def test_patterns_of_every_stage_are_held_against_the_model(
    kind: ModelFamily, recipe: Recipe, changes: dict[str, Any], words: str
) -> None:
    adapters.check(kind.build(0), recipe.stages)
    stage = recipe.stages[2].model_dump(exclude={"shards"})
    lora = stage["lora"] | changes.pop("lora", {})
    wrong = Stage.model_validate(stage | changes | {"lora": lora})
    with pytest.raises(UserError, match=words) as error:
        adapters.check(kind.build(0), (*recipe.stages[:2], wrong))
    assert "stage 'refine'" in str(error.value)


def test_new_adapters_leave_the_old_ones_behind(kind: ModelFamily, recipe: Recipe, batch: Batch) -> None:
    _, adapter = trained(kind, LoraSettings(rank=2, alpha=4, targets=TARGETS))
    stages = (recipe.stages[1], recipe.stages[2].model_copy(update={"adapters": "new"}))
    model = kind.build(0)
    adapters.prepare(model, stages, 1, lambda n: adapter.tensors, 0)
    assert torch.equal(logits(model, batch), logits(kind.build(0), batch))

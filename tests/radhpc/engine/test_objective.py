"""Terms of the objective: what they are worth does not depend on ranks and micro-batches; fusion leaks nothing.

Ranks are spawned once for each number of them, and do all the checks inside.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from radhpc.core.recipe import ObjectiveSettings, Recipe, load
from radhpc.data.collate import IGNORE, Batch, EncodedStudy, StudyEncoder
from radhpc.data.source import Source
from radhpc.distributed.ranks import Ranks
from radhpc.engine.fsdp import Engine
from radhpc.engine.objective import info_nce
from radhpc.models import adapters, extra_modules
from radhpc.models.family import ModelFamily, family
from radhpc.models.portable.hierarchical_fusion import HierarchicalFusion, _levels
from tests.conftest import ROOT, TINY_RECIPE, free_port, tiny_family

ALL_TERMS = {
    "contrastive": 0.7, "clinical": 0.5, "fusion": 0.3, "regularisation": 0.1, "label_smoothing": 0.1,
    "l2": 1e-2, "orthogonal": 1e-2, "l1": 1e-3,
}  # fmt: skip
TERMS = ("contrastive", "clinical", "fusion", "regularisation")
VARIANTS: dict[str, dict[str, float]] = {
    "generation": {},
    "all": ALL_TERMS,
    "sharpness": {"contrastive": 0.5, "sharpness": 0.5},
}
# Of the families beside Mllama, whose features are elsewhere; LLaVA's views apart, so that studies differ in number.
FAMILIES = {
    "gla": ["images={views: 2}"],
    "lightmedvlm": ["model.connector.dropout=0"],
    "qwen3_vl": ["model.max_pixels=6400"],
}  # fmt: skip
EVERY = (*VARIANTS, *FAMILIES)
STUDIES, STEPS = 6, 2


def tiny(folder: Path, shards: Path, variant: str) -> Recipe:
    if variant in FAMILIES:
        changes = [
            f"shards=[{shards}]", "stages.reports.lora.dropout=0",
            "stages.reports.objective={generation: 0.1, contrastive: 0.7, clinical: 0.5}",
            "stages.reports.optimizer={learning_rate: 2.0e-4, schedule: constant}",
        ]  # fmt: skip
        return load(ROOT / "recipes" / "tiny" / f"{variant}.yaml", [*changes, *FAMILIES[variant]])
    terms = dict(VARIANTS[variant])
    changes = [
        "model.fusion={width: 16, heads: 2}",
        "stages.adapt.train=[fusion]",
        "stages.adapt.optimizer={learning_rate: 3.0e-3, schedule: constant}",
        "stages.adapt.lora.dropout=0",
    ]
    if rho := terms.pop("sharpness", None):
        changes.append(f"stages.adapt.optimizer.sharpness={rho}")
    # The heads are there in every variant, and so are the same random numbers.
    changes.append(f"stages.adapt.objective={json.dumps(terms)}")
    changes.append("stages.refine.objective={contrastive: 1.0, clinical: 1.0}")
    path = folder / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=shards))
    return load(path, changes)


def build(recipe: Recipe, kind: ModelFamily, ranks: Ranks) -> Engine:
    """The adapters' stage alone, with a fusion that has an effect."""
    model = kind.build(0)
    extra_modules.attach(model, kind, recipe, 0)
    stage = recipe.stages[1]
    adapters.prepare(model, (stage,), 0, lambda n: {}, 0)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (".lora_B" in name or name.endswith("fusion.gate")):
            nn.init.normal_(parameter, std=0.2)
    return Engine(model, recipe, stage.optimizer, kind.blocks, ranks, stage.objective)


def rows(recipe: Recipe, kind: ModelFamily) -> tuple[StudyEncoder, list[EncodedStudy]]:
    encoder = StudyEncoder(kind, recipe.text, recipe.images, recipe.findings, recipe.seed, labelled=True)
    source = Source(recipe.shards, "train")
    return encoder, [encoder.encode(*source.read(number)) for number in range(STUDIES)]


def train(recipe: Recipe, kind: ModelFamily, ranks: Ranks, size: int) -> list[dict[str, float]]:
    """Some steps over the same six studies, dealt to the ranks in micro-batches of this size."""
    engine, (encoder, studies) = build(recipe, kind, ranks), rows(recipe, kind)
    rounds = -(-STUDIES // (size * ranks.world))
    batches = []
    for n in range(rounds):
        first = (n * ranks.world + ranks.rank) * size
        mine = studies[first : first + size]
        batches.append(encoder.batch(mine + [encoder.empty()] * (size - len(mine))))
    supervised = sum(row.supervised for row in studies)
    reports = []
    for _ in range(STEPS):
        report = engine.step(batches, supervised, 1.0)
        reports.append({"loss": report.loss, "norm": report.gradient_norm, **report.terms})
    return reports


def main(folder: Path, shards: Path) -> None:
    """What a spawned rank does."""
    torch.set_num_threads(1)
    ranks, results = Ranks(), {}
    for variant in EVERY:
        recipe = tiny(folder / str(ranks.rank), shards, variant)
        results[variant] = train(recipe, family(recipe.model, str(folder / "tokenizer")), ranks, size=2)
    if ranks.first:
        (folder / "results.json").write_text(json.dumps(results))
    ranks.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objective")


@pytest.fixture(scope="module")
def kind(folder: Path, phantom_shards: Path) -> ModelFamily:
    return tiny_family(tiny(folder, phantom_shards, "all"), folder / "tokenizer")


@pytest.fixture(scope="module")
def alone(folder: Path, kind: ModelFamily, phantom_shards: Path) -> dict[str, list[dict[str, float]]]:
    """On one rank, in one micro-batch."""
    recipes = {variant: tiny(folder, phantom_shards, variant) for variant in EVERY}
    return {
        variant: train(recipe, family(recipe.model, str(folder / "tokenizer")), Ranks(), STUDIES)
        for variant, recipe in recipes.items()
    }


def same(ours: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    assert len(ours) == len(wanted) == STEPS
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5, abs=2e-6)


@pytest.mark.timeout(280)
@pytest.mark.parametrize("world", [3])
def test_no_term_depends_on_the_number_of_ranks(
    world: int, folder: Path, alone: dict[str, Any], phantom_shards: Path, tmp_path: Path
) -> None:
    """Promise 2, of every term, of their sum, and of sharpness-aware minimisation."""
    (tmp_path / "tokenizer").symlink_to(folder / "tokenizer")
    port = free_port()
    code = (
        f"from pathlib import Path; from tests.radhpc.engine.test_objective import main; main(Path({str(tmp_path)!r}), "
    )
    code += f"Path({str(phantom_shards)!r}))"
    processes = []
    for rank in range(world):
        (tmp_path / str(rank)).mkdir()
        environment = {
            "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                cwd=ROOT,
                env={**os.environ, **environment},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    try:
        errors = [process.communicate(timeout=200)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert not any(process.returncode for process in processes), errors
    results = json.loads((tmp_path / "results.json").read_text())
    for variant in EVERY:
        same(results[variant], alone[variant])


@pytest.mark.parametrize("size", [2])
def test_no_term_depends_on_the_micro_batch(
    size: int, folder: Path, kind: ModelFamily, alone: dict[str, Any], phantom_shards: Path
) -> None:
    for variant in ("all", "sharpness"):
        same(train(tiny(folder, phantom_shards, variant), kind, Ranks(), size), alone[variant])


@pytest.mark.parametrize("name", FAMILIES)
def test_other_families_learn_by_their_features_too(alone: dict[str, list[dict[str, float]]], name: str) -> None:
    first, last = alone[name]
    assert last["contrastive"] < first["contrastive"]
    assert last["clinical"] < first["clinical"]
    assert first["loss"] == pytest.approx(
        0.1 * first["generation"] + 0.7 * first["contrastive"] + 0.5 * first["clinical"]
    )


def test_every_term_does_something_and_falls(alone: dict[str, list[dict[str, float]]]) -> None:
    first, last = alone["all"]
    for name in ("contrastive", "clinical", "fusion"):
        assert last[name] < first[name], name
    assert first["loss"] == pytest.approx(first["generation"] + sum(ALL_TERMS[n] * first[n] for n in TERMS), rel=1e-6)
    assert alone["sharpness"][0]["loss"] == pytest.approx(
        alone["generation"][0]["generation"] + 0.5 * alone["all"][0]["contrastive"], rel=1e-5
    )
    assert alone["sharpness"][1]["contrastive"] != pytest.approx(alone["all"][1]["contrastive"], rel=1e-4)
    assert set(alone["all"][0]) == {
        "loss", "norm", "generation", "contrastive", "clinical", "fusion", "regularisation",
    }  # fmt: skip


def test_the_contrastive_gradient_is_that_of_the_whole_batch(
    folder: Path, kind: ModelFamily, phantom_shards: Path
) -> None:
    """In two passes over micro-batches, with dropout, against one backward pass through all at once, without."""
    recipe = tiny(folder, phantom_shards, "all")
    contrastive = ObjectiveSettings(contrastive=1.0, generation=0.0)
    stages = tuple(stage.model_copy(update={"objective": contrastive}) for stage in recipe.stages)
    recipe = recipe.model_copy(update={"stages": stages})
    engine, (encoder, studies) = build(recipe, kind, Ranks()), rows(recipe, kind)
    engine.model.train()
    batch = encoder.batch(studies)
    heads, fusion = engine.model.heads, engine.model.model.fusion  # type: ignore[union-attr]
    with fusion.prompted(prompt(batch)), heads.capture(batch) as heard:  # type: ignore[union-attr, operator]
        engine.model(**inputs(batch))
        pairs = torch.stack([heard["image"], heard["text"]], dim=1)
    info_nce(pairs, torch.ones(STUDIES), 0.07).backward()
    wanted = {name: p.grad.clone() for name, p in engine.trained.items() if p.grad is not None}
    assert any(".lora_" in name for name in wanted) or any("fusion" in name for name in wanted)
    engine.optimizer.zero_grad(set_to_none=True)
    engine._passes([encoder.batch(studies[:4]), encoder.batch(studies[4:])], 1, 1.0, lambda: None)
    for name, gradient in wanted.items():
        assert torch.allclose(engine.trained[name].grad, gradient, atol=1e-6, rtol=1e-4), name  # type: ignore[arg-type]


def inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in ("labels", "findings")}


def prompt(batch: Batch) -> torch.Tensor:
    return (batch["labels"] == IGNORE) & batch["attention_mask"].bool()


def test_an_evaluation_reports_the_plain_loss_of_the_tokens(
    folder: Path, kind: ModelFamily, phantom_shards: Path
) -> None:
    recipe = tiny(folder, phantom_shards, "all")
    engine, (encoder, studies) = build(recipe, kind, Ranks()), rows(recipe, kind)
    batch = encoder.batch(studies)
    engine.step([batch], 100, 0.0)
    with torch.no_grad(), engine.model.model.fusion.prompted(prompt(batch)):  # type: ignore[union-attr, operator]
        logits = engine.model.eval()(**inputs(batch)).logits
    plain = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert engine.loss_sum(batch) == pytest.approx(float(plain), rel=1e-6)
    found = engine.predict_findings(batch)
    assert found is not None
    assert found.shape == (STUDIES, len(recipe.findings.names))


def test_the_fusion_starts_as_the_base_model_and_sees_the_prompt_alone(
    folder: Path, kind: ModelFamily, phantom_shards: Path
) -> None:
    recipe = tiny(folder, phantom_shards, "all")
    encoder, studies = rows(recipe, kind)
    batch = encoder.batch(studies)
    base, fused = kind.build(0), kind.build(0)
    extra_modules.attach(fused, kind, recipe, 0)
    fusion = fused.model.fusion  # type: ignore[union-attr]

    def logits(model: nn.Module, changed: Batch | None = None) -> torch.Tensor:
        with torch.no_grad(), fusion.prompted(prompt(batch)):  # type: ignore[union-attr, operator]
            return model(**inputs(batch | (changed or {}))).logits  # type: ignore[no-any-return]

    assert torch.equal(logits(fused), logits(base)), "step 0 is not the base model"
    with torch.no_grad():
        fusion.gate.fill_(0.5)  # type: ignore[union-attr, operator]
    before = logits(fused)
    assert (before - logits(base)).abs().max() > 1e-3, "the fusion does nothing: the rest would pass on anything"
    # Other answers leave every position up to the first answer token as it was: nothing of them came back by the image.
    learnt = batch["labels"] != IGNORE
    other = torch.where(learnt, (batch["input_ids"] + 7) % 200 + 10, batch["input_ids"])
    after = logits(fused, {"input_ids": other})
    first = learnt.int().argmax(1)
    for row in range(STUDIES):
        assert torch.equal(after[row, : first[row]], before[row, : first[row]])
        assert not torch.equal(after[row, first[row] :], before[row, first[row] :])
    # Another prompt changes what is seen of the image, and padding on the other side does not.
    swapped = batch["input_ids"].clone()
    swapped[:, 3] = 77
    assert not torch.equal(logits(fused, {"input_ids": swapped}), before)
    for model in (base, fused):
        model.eval()
    asked = encoder.batch([encoder.encode_prompt("", None, views(recipe, n)) for n in range(2)], left=True)
    with torch.no_grad():
        ids = fused.generate(**inputs(asked), max_new_tokens=4, do_sample=False)  # type: ignore[operator]
        again = fused.generate(**inputs(asked), max_new_tokens=4, do_sample=False, use_cache=False)  # type: ignore[operator]
    assert ids.shape[1] == asked["input_ids"].shape[1] + 4 or ids.shape[1] > asked["input_ids"].shape[1]
    assert again.shape[0] == 2


def views(recipe: Recipe, number: int) -> Any:
    return Source(recipe.shards, "train").read(number)[2]


def test_the_levels_are_taken_out_of_mllamas_interleaved_features() -> None:
    """Against transformers' own way of putting them together."""
    final = torch.full((1, 2, 3), 100.0)
    states = [torch.arange(3.0).expand(1, 2, 3) + 10 * n for n in range(5)]
    features = torch.cat([final, torch.stack(states, dim=-1).reshape(1, 2, -1)], dim=-1)
    seen = []

    class Watched(nn.Module):
        def forward(self, tensor: torch.Tensor) -> torch.Tensor:
            seen.append(tensor)
            return tensor[..., :4]

    fusion = HierarchicalFusion(vision=3, hidden=5, width=4, heads=2)
    fusion.inward = nn.ModuleList(Watched() for _ in range(3))
    fusion(features, torch.ones(1, 2), torch.zeros(1, 2, 5), torch.ones(1, 2, dtype=torch.bool))
    low, mid, high = seen
    assert torch.equal(low, torch.cat(states[0:2], dim=-1))
    assert torch.equal(mid, torch.cat(states[2:4], dim=-1))
    assert torch.equal(high, torch.cat([states[4], final], dim=-1))
    assert _levels(2) == ((1,), (0,))
    assert _levels(6) == ((1, 2), (3, 4), (5, 0))


def test_training_without_saying_what_the_prompt_is_is_an_error() -> None:
    fusion = HierarchicalFusion(vision=3, hidden=5, width=4, heads=2).train()
    with pytest.raises(AssertionError, match="prompted"):
        fusion.prompt_mask(None, torch.zeros(1, 2, dtype=torch.long))


def test_sharpness_looks_for_the_worst_point_nearby() -> None:
    """Against the formula, on a function whose gradients can be written down."""
    from radhpc.engine.sam import ascent_step

    weight = nn.Parameter(torch.tensor([3.0, -4.0]))
    (weight.square() / 2).sum().backward()
    before = weight.detach().clone()
    with ascent_step({"w": weight}, 0.5, float(weight.grad.norm())):  # type: ignore[union-attr]
        assert torch.allclose(weight.detach(), torch.tensor([3.3, -4.4]))
        assert weight.grad is None
        (weight.square() / 2).sum().backward()
    assert torch.equal(weight.detach(), before)
    assert torch.allclose(weight.grad, torch.tensor([3.3, -4.4]))  # type: ignore[arg-type]
    with pytest.raises(KeyError), ascent_step({"w": weight}, 0.5, 1.0):
        raise KeyError
    assert torch.equal(weight.detach(), before)

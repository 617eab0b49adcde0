"""The families beside Mllama train all their stages on one process and on two, resume, generate, and are exact."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bench.chaos import losses
from radhpc.core.errors import UserError
from radhpc.core.recipe import ImageSettings, Recipe, load
from radhpc.core.run_folder import RunFolder, node_name
from radhpc.core.sample import Report, Sample, View
from radhpc.data.collate import StudyEncoder
from radhpc.models import family as models
from radhpc.models.portable.connector import Abstractor, SpatialSemanticAbstractor
from radhpc.models.tokenizer import train as train_tokenizer
from tests.conftest import ROOT

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(400)]

TINY = {"llava": "gla", "swin_qwen": "lightmedvlm", "qwen3_vl": "qwen3_vl"}  # family: its tiny recipe
FAMILIES = sorted(TINY)
# Two steps of each stage, without what ranks draw for themselves.
SHORT = [
    "checkpoint.every=2", "evaluation.samples=3", "evaluation.batch=2", "evaluation.max_new_tokens=4",
    "evaluation.images=0",
]  # fmt: skip


def short(family: str, shards: object) -> Recipe:
    path = ROOT / "recipes" / "tiny" / f"{TINY[family]}.yaml"
    changes = [f"shards=[{shards}]", *SHORT]
    for stage in load(path).stages:
        where = f"stages.{stage.name}"
        changes += [f"{where}.{key}" for key in ("epochs=null", "steps=2", "batch=4", "micro_batch=2")]
        changes += [f"{where}.lora.dropout=0"] if stage.lora else []
    if family == "swin_qwen":
        changes.append("model.connector.dropout=0")
    return load(path, changes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Findings: a nodule in the left upper lobe. Impression: no effusion."] * 20, 320, folder)
    return str(folder)


@pytest.fixture(scope="module")
def built(tokenizer: str) -> Callable[[str], tuple[Any, Any]]:
    """A family and its model by name, each built once."""
    known: dict[str, tuple[Any, Any]] = {}

    def build(family: str) -> tuple[Any, Any]:
        if family not in known:
            model = short(family, "none").model
            if family == "swin_qwen":  # with tied embeddings a random model says one word all the time
                (model.config or {})["text"]["tie_word_embeddings"] = False
            made: Any = models.family(model, tokenizer)
            known[family] = made, made.build(seed=1)
        return known[family]

    return build


def view(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width)).astype(np.uint8))


def encoder(family: Any, name: str) -> StudyEncoder:
    recipe = short(name, "none")
    return StudyEncoder(family, recipe.text, recipe.images)


# Whole runs.


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> dict[str, tuple[Path, Path]]:
    """Of each family a run on one process, and one on two ranks that is interrupted in its second stage."""
    from radhpc import worker

    folder = tmp_path_factory.mktemp("runs")
    result = {}
    for family in FAMILIES:
        recipe = short(family, phantom_shards)
        one, two = (RunFolder.create(folder / f"{family}-{ranks}", recipe) for ranks in (1, 2))
        assert worker.run(str(one.path)).state == "finished"
        result[family] = one.path, two.path
    port = 20000 + os.getpid() % 20000
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-m", "tests.radhpc.models.interrupted_runs", *(str(two) for _, two in result.values())]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages_on_one_process_and_on_two_ranks_that_resume(
    runs: dict[str, tuple[Path, Path]], family: str
) -> None:
    one, two = runs[family]
    alone, together = losses(one), losses(two)
    stages = short(family, "none").stages
    assert sorted(alone) == sorted(together) == list(range(1, 2 * len(stages) + 1))
    assert [together[step] for step in alone] == pytest.approx(list(alone.values()), rel=2e-5)
    assert len(set(alone.values())) == len(alone), "nothing was learnt"
    assert [event["stage"] for event in RunFolder.open(two).events("stage_finished")] == [
        stage.name for stage in stages
    ]
    for run in (one, two):
        scores = [json.loads(path.read_text()) for path in sorted(run.glob("evaluation/*/scores.json"))]
        assert len(scores) == len(stages)
        assert all(score["samples"] == 3 for score in scores)
    assert (one / "adapter" / "adapter_model.safetensors").exists()
    curves = EventAccumulator(str(two / "tensorboard"), size_guidance={"scalars": 0})
    curves.Reload()
    tags = set(curves.Tags()["scalars"])
    assert {f"nodes_gigabytes/{node_name()}", f"nodes_data_wait_seconds/{node_name()}", "loss_by_task/report"} <= tags
    by_dataset = {point.step: point.value for point in curves.Scalars("loss_by_dataset/phantom")}
    assert by_dataset == pytest.approx(together, rel=1e-4), "all tokens are of one dataset"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_exported_for_plain_transformers(
    runs: dict[str, tuple[Path, Path]], tmp_path: Path, family: str
) -> None:
    """--check: example.py runs in a process that cannot import radhpc, and gives the same logits."""
    from radhpc.cli.models import context_of
    from radhpc.serving.export import check, export

    assert check(*export(context_of(runs[family][0]), tmp_path / "out")) < 1e-5
    travel = {path.name for path in tmp_path.rglob("*.py")} - {"example.py"}
    assert (
        travel
        == {
            "llava": set(),
            "swin_qwen": {"connector.py", "swin_llava.py", "study_processor.py"},
            "qwen3_vl": {"study_processor.py"},
        }[family]
    )


# Generation.


def generated(family: Any, model: Any, batch: dict[str, torch.Tensor], beams: int = 1) -> list[list[int]]:
    """New tokens of each row, without what pads them."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False, num_beams=beams)
    new = ids[:, batch["input_ids"].shape[1] :].tolist()
    return [[token for token in row if token != family.tokenizer.pad_token_id] for row in new]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("beams", [1, 2])
def test_studies_of_a_batch_do_not_see_each_other(built: Any, name: str, beams: int) -> None:
    """Padding, the number of views and beams: a row gives what it gives alone."""
    family, model = built(name)
    asked = StudyEncoder(family, short(name, "none").text)
    prompts = [
        asked.encode_prompt("a", None, [view(90, 70), view(60, 100, 1)]),
        asked.encode_prompt("b", "Is there an effusion in the left lower lobe?", [view(80, 80, 2)]),
    ]
    together = generated(family, model, asked.batch(prompts, left=True), beams)
    assert together == [generated(family, model, asked.batch([prompt], left=True), beams)[0] for prompt in prompts]
    assert together[0] != together[1]


def test_llava_says_what_transformers_says(built: Any) -> None:
    """From picture and question to tokens, by transformers' own processor and model, for square views."""
    from transformers import LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    family, model = built("llava")
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}),
        family.tokenizer, patch_size=14, vision_feature_select_strategy="default",
        image_token=family.image_token, num_additional_image_tokens=1,
    )  # fmt: skip
    theirs = LlavaForConditionalGeneration(family.config)
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config = model.generation_config
    views = [view(112, 112), view(130, 130, 1)]
    text = family.prompt("What do you see?", 2)
    inputs = processor(images=views, text=text, return_tensors="pt", add_special_tokens=False)
    ours = StudyEncoder(family, short("llava", "none").text)
    batch = ours.batch([ours.encode_prompt("", "What do you see?", views)], left=True)
    assert torch.equal(inputs["input_ids"], batch["input_ids"])
    assert torch.allclose(inputs["pixel_values"], batch["pixel_values"], atol=1e-5)
    new = theirs.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert generated(family, model, batch)[0] == [t for t in new.tolist() if t != family.tokenizer.pad_token_id]


def test_qwen3_vl_says_what_transformers_says(built: Any) -> None:
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    family, model = built("qwen3_vl")
    processor = Qwen2VLImageProcessorPil(
        patch_size=14, size={"shortest_edge": 28 * 28, "longest_edge": 12544}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    views = [view(200, 90), view(60, 131, 1)]
    images = processor(images=views, return_tensors="pt")
    chat = family.prompt("What do you see?", 2)
    for grid in images["image_grid_thw"]:
        chat = chat.replace(family.image_token, "#" * int(grid.prod() // 4), 1)
    ids = family.tokenizer(chat.replace("#", family.image_token), add_special_tokens=False, return_tensors="pt")
    inputs = {**images, "input_ids": ids["input_ids"], "attention_mask": ids["attention_mask"]}
    inputs["mm_token_type_ids"] = (ids["input_ids"] == family.image_token_id).int()
    ours = StudyEncoder(family, short("qwen3_vl", "none").text)
    batch = ours.batch([ours.encode_prompt("", "What do you see?", views)], left=True)
    assert batch.keys() - {"labels"} == inputs.keys()
    for name in inputs:
        assert torch.allclose(inputs[name].double(), batch[name].double(), atol=1e-5), name
    theirs = Qwen3VLForConditionalGeneration(family.config)
    theirs.load_state_dict(model.state_dict())
    theirs.generation_config = model.generation_config
    new = theirs.eval().generate(**inputs, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert generated(family, model, batch)[0] == [t for t in new.tolist() if t != family.tokenizer.pad_token_id]


def test_swin_qwen_generates_what_its_forward_pass_says(built: Any) -> None:
    """Token by token without a cache, each time over the whole text."""
    family, model = built("swin_qwen")
    ours = StudyEncoder(family, short("swin_qwen", "none").text)
    batch = ours.batch([ours.encode_prompt("", "What do you see?", [view(112, 112)])], left=True)
    expected = generated(family, model, batch)[0]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    said: list[int] = []
    with torch.no_grad():
        for _ in expected:
            said.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
            inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[said[-1]]])], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert said == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_a_studys_features_are_its_own(built: Any, name: str) -> None:
    """What the objective pools of a row does not depend on the other rows, their views and their padding."""
    family, model = built(name)
    points = family.feature_points(model)
    asked = StudyEncoder(family, short(name, "none").text)
    rows = [
        asked.encode_prompt("a", None, [view(90, 70), view(60, 100, 1)]),
        asked.encode_prompt("b", "Is there an effusion in the left lower lobe?", [view(80, 80, 2)]),
    ]

    def pooled(*some: Any) -> torch.Tensor:
        outputs = []
        batch = asked.batch(list(some))
        hook = points.image.register_forward_hook(lambda _, __, output: outputs.append(points.pool(output, batch)))
        with torch.no_grad():
            model(**{key: value for key, value in batch.items() if key != "labels"})
        hook.remove()
        (result,) = outputs
        assert result.shape == (len(some), points.width)
        return result  # type: ignore[no-any-return]

    together = pooled(*rows)
    for number, row in enumerate(rows):
        assert torch.allclose(together[number], pooled(row)[0], atol=1e-5)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


# Models.


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_is_a_function_of_its_seed(built: Any, name: str) -> None:
    family, model = built(name)
    again, other, empty = family.build(seed=1).state_dict(), family.build(seed=2).state_dict(), family.build_empty()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    assert any(not torch.equal(other[key], value) for key, value in model.state_dict().items())
    shapes = [{key: value.shape for key, value in one.named_parameters()} for one in (model, empty)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_views_are_shown_as_they_went_in(built: Any, name: str) -> None:
    family, _ = built(name)
    (shown,) = family.show_images(family.encode_images([view(112, 112)]))
    assert np.array_equal(np.asarray(shown), np.asarray(view(112, 112)))


def test_sasa_has_the_published_size_and_hears_its_concepts() -> None:
    with torch.device("meta"):
        assert round(sum(p.numel() for p in SpatialSemanticAbstractor(1024, 1024, 64).parameters()) / 1e6, 1) == 32.6
    torch.manual_seed(0)
    sasa = SpatialSemanticAbstractor(24, 16, latents=6, heads=2)
    others, embeddings = sasa.latents[4:].clone(), torch.randn(4, 16) / 80
    length = sasa.latents.norm(dim=1).mean()
    sasa.set_concepts(embeddings)
    assert torch.equal(sasa.latents[4:], others)
    assert torch.allclose(sasa.latents[:4].norm(dim=1), length)
    cosines = torch.nn.functional.cosine_similarity(sasa.latents[:4], embeddings)
    assert torch.allclose(cosines, torch.ones(4))


def test_a_connector_turns_features_into_as_many_tokens_as_it_says(tokenizer: str) -> None:
    features = torch.randn(2, 49, 24)
    assert SpatialSemanticAbstractor(24, 16, 6, heads=2)(features).shape == (2, 6, 16)
    assert Abstractor(24, 16, 9, 49, inner=32)(features).shape == (2, 9, 16)
    recipe = short("swin_qwen", "none")
    for kind, tokens in (("sasa", 16), ("abstractor", 16), ("linear", 49)):
        connector = recipe.model.connector.model_copy(update={"kind": kind})  # type: ignore[union-attr]
        family: Any = models.family(recipe.model.model_copy(update={"connector": connector}), tokenizer)
        asked = encoder(family, "swin_qwen")
        batch = asked.batch([asked.encode_prompt("", None, [view(90, 90)])])
        assert int((batch["input_ids"] == family.image_token_id).sum()) == tokens
        assert family.build(0)(**batch).logits.isfinite().all()


def test_views_come_in_the_order_that_the_recipe_says(built: Any) -> None:
    family, _ = built("llava")
    views = [view(90, 90, n) for n in range(4)]
    shown = tuple(View(view=name, width=90, height=90) for name in ("LATERAL", None, "pa", "AP"))
    sample = Sample(
        dataset="d", patient="0" * 16, study="0" * 16, split="train", images=shown, report=Report(findings="Clear.")
    )
    images = ImageSettings(order=("PA", "AP", "LATERAL"), views=3)  # type: ignore[call-arg]
    asked = StudyEncoder(family, short("llava", "none").text, images)
    expected = family.encode_images([views[2], views[3], views[0]])["pixel_values"]
    for encoded in (asked.encode("", sample, views), asked.encode_prompt("", None, views, sample)):
        assert np.array_equal(encoded.images["pixel_values"], expected)
    assert not np.array_equal(asked.encode_prompt("", None, views).images["pixel_values"], expected), "files of a user"


def test_mllama_takes_a_chat_template_too(tokenizer: str) -> None:
    template = "'{{ image_token }}{{ messages[0].content[1].text }}'"
    recipe = load(ROOT / "recipes" / "tiny" / "radixpert.yaml", [f"model.chat_template={template}"])
    assert models.family(recipe.model, tokenizer).prompt("What?", 1) == "<|image|>What?"


def test_a_studys_views_are_averaged_whatever_pads_the_batch(built: Any) -> None:
    family, model = built("swin_qwen")
    views = [view(90, 90), view(100, 100, 1)]
    alone = [family.collate_images([family.encode_images([one])], np.zeros((1, 1))) for one in views]
    both = family.collate_images([family.encode_images([views[0]]), family.encode_images(views)], np.zeros((2, 1)))
    with torch.no_grad():
        one, two = (model.model.get_image_features(**images).last_hidden_state for images in alone)
        mixed = model.model.get_image_features(**both).last_hidden_state
    assert torch.allclose(mixed[0], one[0], atol=1e-5)
    assert torch.allclose(mixed[1], (one[0] + two[0]) / 2, atol=1e-5)


# What bad input gets.


def refused(family: str, *changes: str, folder: object = "none") -> str:
    path = ROOT / "recipes" / "tiny" / f"{TINY[family]}.yaml"

    def asked() -> str:
        made: Any = models.family(load(path, list(changes)).model, str(folder))
        return str(made.prompt("What?", 1))

    with pytest.raises(UserError) as caught:
        asked()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_recipe_that_does_not_fit_gets_one_line(tokenizer: str) -> None:
    def llava(change: str) -> str:
        return refused("llava", change, folder=tokenizer)

    assert "no such family (did you mean 'llava'?); allowed are llava, mllama" in llava("model.family=lava")
    assert "'hiden_size' is no key of transformers' LlamaConfig" in llava("model.config.text.hiden_size=4")
    assert "unknown key 'txt'; allowed are text and vision" in llava("model.config.txt.a=4")
    assert "no 'model_type' of transformers is 'lama' (did you mean" in llava("model.config.text.model_type=lama")
    assert "1 image(s) become 0 times <|image|>" in llava("model.chat_template='{{ bos_token }}USER:'")
    assert "'text' has both 'weights' and 'config'" in llava("model.weights={text: somewhere}")
    assert "an abstractor pools to a square" in refused("swin_qwen", "model.connector={kind: abstractor, latents: 15}")
    assert "does not take weights.text" in refused("llava", "model={family: mllama, weights: {text: somewhere}}")
    assert "a mapping names components" in refused(
        "llava", "model={family: mllama, weights: {model: x}, tokenizer: {folder: x}}"
    )
    assert "a mapping names components" in refused(
        "llava", "model={family: mllama, weights: {}, tokenizer: {train_vocabulary: 400}}"
    )
    assert "'concepts' do not fit into 3 'latents'" in refused("swin_qwen", "model.connector={latents: 3}")

"""The files of a recipe's model: listed, checked before anything is queued, and put together from several folders."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from radhpc.core import families
from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe, load
from radhpc.models import family as models, weights
from radhpc.models.families.base import read_tokenizer
from radhpc.models.tokenizer import train as train_tokenizer
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(120)

VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "image_size": 56, "patch_size": 14}  # fmt: skip
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 300}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP and a Llama as transformers saves them; the latter's tokenizer knows no image."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**VISION)).save_pretrained(folder / "clip")
    train_tokenizer(["Findings: a nodule."] * 9, 300, folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / "llama" / name
        path.write_text(path.read_text().replace("<|image|>", "<|other|>"))
    rows = len(read_tokenizer(str(folder / "llama")))
    LlamaForCausalLM(LlamaConfig(**TEXT, vocab_size=rows)).save_pretrained(folder / "llama", max_shard_size="20KB")
    return folder


@pytest.fixture
def recipe(saved: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """The tiny GLA over copies of these folders, with changes."""
    for name in ("clip", "llama"):
        (tmp_path / name).mkdir()
        for path in (saved / name).iterdir():
            (tmp_path / name / path.name).write_bytes(path.read_bytes())

    def make(*changes: str) -> Recipe:
        folders = f"model.weights={{vision: {tmp_path}/clip, text: {tmp_path}/llama}}"
        usual = ["model.config=null", "model.tokenizer={}", folders, "shards=[none]"]
        return load(ROOT / "recipes" / "tiny" / "gla.yaml", [*usual, *changes])

    return make


def refusal(recipe: Recipe) -> str:
    with pytest.raises(UserError) as caught:
        weights.check(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_components_are_put_together_and_a_new_token_is_the_mean_of_the_others(
    recipe: Callable[..., Recipe], saved: Path
) -> None:
    chosen = recipe()
    weights.check(chosen)
    assert chosen.model.tokenizer_folder is not None
    family: Any = models.family(chosen.model, chosen.model.tokenizer_folder)
    assert family.image_token == "<image>"
    model: Any = family.build(0)
    state = model.state_dict()
    for folder, prefix in (("clip", "model.vision_tower."), ("llama", "model.language_model.")):
        kind: Any = CLIPVisionModel if folder == "clip" else LlamaForCausalLM
        theirs = kind.from_pretrained(saved / folder).state_dict()
        for name, expected in theirs.items():
            ours = state["lm_head.weight" if name == "lm_head.weight" else prefix + name.removeprefix("model.")]
            assert torch.equal(ours[: len(expected)] if expected.ndim else ours, expected), name
    table = state["model.language_model.embed_tokens.weight"]
    assert len(table) == len(state["lm_head.weight"]) == family.image_token_id + 1
    assert torch.allclose(table[-1], table[:-1].mean(dim=0))
    shapes = {name: value.shape for name, value in family.build_empty().state_dict().items()}
    assert shapes == {name: value.shape for name, value in state.items()}
    assert "USER: <image>\nWhat? ASSISTANT:" in family.prompt("What?", 1)


def test_everything_is_listed_with_its_size_and_its_hash(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    whole = weights.report(recipe())
    assert whole["ok"]
    text = whole["parts"]["text"]["files"]
    assert sum(file["name"].endswith(".safetensors") for file in text) > 1
    assert {file["sha256"] for file in text} == {"unknown"}
    path = tmp_path / "clip" / "model.safetensors"
    (tmp_path / "clip" / "SHA256SUMS").write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    path.with_name("config.json.sha256").write_text("0" * 64)
    vision = {file["name"]: file for file in weights.report(recipe())["parts"]["vision"]["files"]}
    assert vision["model.safetensors"]["sha256"] == "as it should be"
    assert vision["model.safetensors"]["bytes"] == path.stat().st_size
    assert "it should be 000000000000" in vision["config.json"]["fault"]
    assert not weights.report(recipe())["ok"]


def test_what_is_missing_or_cut_off_is_named_with_what_to_do(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    shard = sorted((tmp_path / "llama").glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-10])
    message = refusal(recipe())
    assert message.startswith(f"model.weights.text: {shard}: {len(data) - 10:,} bytes, it should have {len(data):,}")
    shard.unlink()
    message = refusal(recipe())
    assert f"{shard}: missing; put the files of lmsys/vicuna-7b-v1.5 there" in message
    assert f"hf download lmsys/vicuna-7b-v1.5 --local-dir {tmp_path}/llama" in message
    assert [(part, hub) for part, hub, _ in weights.missing(recipe().model)] == [("text", "lmsys/vicuna-7b-v1.5")]
    assert "no such folder" in refusal(recipe("model.weights.vision=/nowhere"))
    assert "nothing for the component 'vision'" in refusal(recipe(f"model.weights={{text: {tmp_path}/llama}}"))


def test_weights_of_another_kind_are_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    message = refusal(recipe(f"model.weights.vision={tmp_path}/llama"))
    assert "config.json says model_type 'llama'; family llava takes clip or clip_vision_model" in message
    assert "family mllama does not take weights.vision; allowed are a folder" in refusal(recipe("model.family=mllama"))
    assert "family swin_qwen takes swin" in refusal(recipe("model.family=swin_qwen"))
    assert "text.max_tokens 301: the model's context is 300 tokens" in refusal(recipe("text.max_tokens=301"))
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    (tmp_path / "llama" / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
    message = refusal(recipe("model.weights=" + str(tmp_path / "llama")))
    assert "no token <image> there; it is not the tokenizer of a llava model" in message


def test_a_hub_id_is_its_folder_in_the_cache_and_nothing_is_fetched(
    recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    message = refusal(recipe("model.weights.text=hub:lmsys/vicuna-7b-v1.5"))
    assert message.endswith(
        "hub:lmsys/vicuna-7b-v1.5: not on this machine; 'radhpc weights RECIPE --online' downloads it"
    )
    cache = tmp_path / "hub" / "models--lmsys--vicuna-7b-v1.5"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    (cache / "snapshots").mkdir()
    (tmp_path / "llama").rename(cache / "snapshots" / "abc")
    chosen = recipe("model.weights.text=hub:lmsys/vicuna-7b-v1.5")
    weights.check(chosen)
    assert chosen.model.folders["text"] == str(cache / "snapshots" / "abc")


def test_pickled_weights_are_converted_when_asked(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder, expected = tmp_path / "llama", {}
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        tensors = load_file(path)
        expected |= tensors
        torch.save(tensors, folder / f"pytorch_model-{number}.bin")
        path.unlink()
    (folder / weights.INDEX).unlink()
    assert "--convert writes safetensors" in refusal(recipe())
    assert len(weights.convert(folder)) > 1
    weights.check(recipe())
    result = {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}
    assert result.keys() == expected.keys()
    assert all(torch.equal(result[name], one) for name, one in expected.items())


def test_the_verb_says_it_in_one_object_and_by_its_exit_status(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe()
    command = [
        sys.executable, "launch.py", "weights", "recipes/tiny/gla.yaml", "model.config=null", "model.tokenizer={}",
        f"model.weights={{vision: {tmp_path}/clip, text: {tmp_path}/llama}}", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parts"].keys() == {"vision", "text"}
    (tmp_path / "clip" / "model.safetensors").unlink()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipes_family_knows_its_components(path: Path) -> None:
    model = load(path).model
    assert set(model.folders) <= set(families.entry(model.family).components)

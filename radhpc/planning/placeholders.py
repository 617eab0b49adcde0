"""What stands in for weights, tokenizers and shards that are not there yet, so that a plan needs none of them.

Between recipe/ and forecast.py:

    told(recipe)                            # a line for people for each thing that is not there
    model = configured(recipe.model, Path("/tmp/x"))   # folders with a config.json in the place of missing ones
    tokenizer(recipe, Path("/tmp/y"))       # one that has all the words of the recipe's prompts

A model's shapes follow from its config.json, and those of the models that recipes/ names are published: they lie in
models/families/configurations/, each under the name of its folder. What is known of no study is the largest that a
build makes.
"""

import importlib
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from radhpc.core import families
from radhpc.core.recipe import ModelSettings, Recipe, Shards, read_yaml
from radhpc.models import tokenizer as tokenizers

PUBLISHED = Path(str(files("radhpc.models.families"))) / "configurations"
PIXELS, VIEWS = 1120, 2  # each way, as shards.build shrinks to; a frontal view and a lateral one
WORDS = 2000  # entries at most: so many that each word of a prompt is one


def published(model: ModelSettings) -> dict[str, Path]:
    """The parts whose folder is not there, with the file that says what they look like."""
    files = {part: PUBLISHED / f"{Path(folder).name}.yaml" for part, folder in model.folders.items()}
    return {part: file for part, file in files.items() if not Path(model.folders[part]).exists() and file.exists()}


def configured(model: ModelSettings, folder: Path) -> ModelSettings:
    """The same model, but for missing parts, which become folders with a config.json inside of `folder`."""
    found = dict(model.folders)
    for part, file in published(model).items():
        found[part] = str(folder / part)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(read_yaml(file)))
    if found == model.folders:
        return model
    return model.model_copy(update={"weights": found["model"] if isinstance(model.weights, str) else found})


def tokenizer(recipe: Recipe, folder: Path) -> None:
    """Write one that turns each word of the recipe's prompts into one token, as real ones do with most words.

    Texts cannot be measured with it.
    """
    kind: Any = importlib.import_module(families.entry(recipe.model.family).module).Family
    template = recipe.model.chat_template or getattr(kind, "CHAT_TEMPLATE", None) or ""
    prompts = [task.prompt for stage in recipe.stages for task in recipe.text_of(stage).mixture().values()]
    tokenizers.train([template, *prompts, *recipe.findings.names], WORDS, folder)
    made = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    made.add_tokens([*getattr(kind, "IMAGE_TOKENS", ())[:1], *getattr(kind, "CHAT_TOKENS", ())], special_tokens=True)
    made.chat_template = template or made.chat_template
    made.save_pretrained(folder)


def missing(shards: Shards) -> list[str]:
    """Those folders of shards that do not exist. One that does, and is no dataset, is a mistake."""
    return [url for url in shards if "://" not in url and not Path(url.partition("#")[0]).exists()]


def told(recipe: Recipe) -> list[str]:
    """What is not there, and what stands in."""
    lines = [
        f"{_near(recipe.model.folders[part])}: not there yet; the published configuration of {file.stem} stands in"
        for part, file in published(recipe.model).items()
    ]
    if gone := list(dict.fromkeys(_near(url) for stage in recipe.stages for url in missing(recipe.shards_of(stage)))):
        lines.append(
            f"{', '.join(gone)}: not there yet; studies of images.views (or {VIEWS}) views of {PIXELS} x {PIXELS} "
            "pixels and text.max_tokens stand in; how many steps an epoch has is unknown"
        )
    elif published(recipe.model):
        lines.append("without a tokenizer, texts count as text.max_tokens")
    return lines


def _near(path: str) -> str:
    """As it was probably written: from the folder that we are in."""
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path

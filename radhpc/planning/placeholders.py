"""Stand in for weights, tokenizers and shards that are missing, so that a forecast needs none of them.

Stands between recipe/ and forecast.py:

    notes(recipe)                                               # a line for people for each missing thing
    model = fill_missing_folders(recipe.model, Path("/tmp/x"))  # folders with a config.json for missing ones
    write_tokenizer(recipe, Path("/tmp/y"))                     # it has all the words of the recipe's prompts

The shapes of a model follow from its config.json. The configurations of the models that recipes/ names are published:
they lie in models/families/configurations/, each under the name of its folder. Where no study is known, the largest
that a build makes stands in.
"""

import json
import os
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer

from radhpc.core.recipe import ModelSettings, Recipe, Shards, read_yaml
from radhpc.models import tokenizer as tokenizers
from radhpc.models.family import family_class

PUBLISHED = Path(str(files("radhpc.models.families"))) / "configurations"
PIXELS, VIEWS = 1120, 2  # of each side, to which shards.build shrinks; a frontal view and a lateral one
WORDS = 2000  # entries at most: enough for each word of a prompt to be one


def published_configurations(model: ModelSettings) -> dict[str, Path]:
    """Return the parts of a model whose folder is missing, each with the file of its published configuration."""
    files = {part: PUBLISHED / f"{Path(folder).name}.yaml" for part, folder in model.folders.items()}
    return {part: file for part, file in files.items() if not Path(model.folders[part]).exists() and file.exists()}


def fill_missing_folders(model: ModelSettings, folder: Path) -> ModelSettings:
    """Return the model with folders inside of `folder`, which hold a config.json alone, for its missing parts."""
    folders = dict(model.folders)
    for part, file in published_configurations(model).items():
        folders[part] = str(folder / part)
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(read_yaml(file)))
    if folders == model.folders:
        return model
    return model.model_copy(update={"weights": folders["model"] if isinstance(model.weights, str) else folders})


def write_tokenizer(recipe: Recipe, folder: Path) -> None:
    """Write a tokenizer that turns each word of the recipe's prompts into one token, as real ones do with most words.

    The length of texts cannot be measured with it.
    """
    family = family_class(recipe.model.family)
    template = recipe.model.chat_template or getattr(family, "CHAT_TEMPLATE", None) or ""
    prompts = [task.prompt for stage in recipe.stages for task in recipe.text_of(stage).mixture().values()]
    tokenizers.train([template, *prompts, *recipe.findings.names], WORDS, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    image_tokens = [*getattr(family, "IMAGE_TOKENS", ())[:1], *getattr(family, "CHAT_TOKENS", ())]
    tokenizer.add_tokens(image_tokens, special_tokens=True)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)


def missing_shards(shards: Shards) -> list[str]:
    """Return the folders of shards that do not exist. One that exists without being a dataset is a mistake."""
    return [url for url in shards if "://" not in url and not Path(url.partition("#")[0]).exists()]


def notes(recipe: Recipe) -> list[str]:
    """Return a line for each missing thing: its name, and what stands in."""
    lines = [
        f"{_relative(recipe.model.folders[part])}: not there yet; the published configuration of {file.stem} stands in"
        for part, file in published_configurations(recipe.model).items()
    ]
    shards = [url for stage in recipe.stages for url in missing_shards(recipe.shards_of(stage))]
    if missing := list(dict.fromkeys(_relative(url) for url in shards)):
        lines.append(
            f"{', '.join(missing)}: not there yet; studies of images.views (or {VIEWS}) views of {PIXELS} x {PIXELS} "
            "pixels and text.max_tokens stand in; how many steps an epoch has is unknown"
        )
    elif published_configurations(recipe.model):
        lines.append("without a tokenizer, texts count as text.max_tokens")
    return lines


def _relative(path: str) -> str:
    """Return a path as it was probably written: relative to the current folder."""
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path

"""Writes the model card of exported weights: origin, training data, scores, and terms of use.

Folders of the training site are named by their last part alone: a card can be passed on.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from radhpc.core.files import read_json
from radhpc.core.run_folder import by_step
from radhpc.engine.checkpoint import Cursor
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder, build_family
from radhpc.training.sources import open_source

# The terms of an archive for a model that was trained on it, by the beginning of the dataset's name.
REMINDERS = {
    "mimic": "MIMIC-CXR: credentialed access under a data use agreement. Ask PhysioNet before you pass on a model that "
    "was trained on it.",
    "padchest": "PadChest: research use under its agreement with BIMCV, no redistribution of the data.",
    "chexpert": "CheXpert: Stanford's research use agreement, no commercial use.",
    "chestxray14": "ChestX-ray14: name the NIH Clinical Center as the source and cite Wang et al., 2017.",
    "openi": "Open-i (Indiana University): cite Demner-Fushman et al., 2016; look up the licence on its page.",
    "roco": "ROCO v2: each picture has a licence of its own, listed in attribution.jsonl beside the shards.",
    "vqa_rad": "VQA-RAD: cite Lau et al., 2018; look up the licence on its page.",
    "slake": "SLAKE: cite Liu et al., 2021; look up the licence on its page.",
    "pathvqa": "PathVQA: cite He et al., 2020; look up the licence on its page.",
    "phantom": "Phantoms are drawn, nobody's data: a model of them knows nothing of patients.",
}


def card(context: RunContext, cursor: Cursor, kind: str, base: str | None, dtype: str) -> str:
    """Return the card as Markdown, with the front matter that model hubs read."""
    recipe, prompt = context.recipe, build_encoder(context, cursor.stage).tasks.default_prompt()
    sections = [
        _front(recipe.model, kind),
        f"# {recipe.name}",
        "**Research use only. Not for clinical use:** nothing that this model writes was checked for the care of a "
        "patient.",
        _description(context, cursor, kind, base, dtype),
        "## How to use it\n\n```\npython example.py frontal.png"
        f"{' --base FOLDER' if kind == 'adapter' and base != 'base' else ''}\n```\n\n"
        f"Its prompt for a report: {prompt!r}.{_code(context)} {_images(context, cursor)}",
        "## Lineage\n\n" + _lineage(context, cursor),
        "## Data\n\n" + _data(context, cursor),
        "## Scores\n\n" + _scores(context),
        "## Terms\n\n" + _terms(context, cursor),
        "## Recipe\n\n```yaml\n" + _recipe(context) + "```",
    ]
    return "\n\n".join(sections) + "\n"


def base_folder(model: Any) -> str | None:
    """Return the local folder of the whole base; None if it is random, or composed of several."""
    return model.weights if isinstance(model.weights, str) else None


def origins(model: Any) -> list[str]:
    """Return the names of the weights that a model started from."""
    folders = model.weights.values() if isinstance(model.weights, dict) else [model.weights]
    return [Path(str(folder)).name for folder in folders if folder is not None]


def _front(model: Any, kind: str) -> str:
    front: dict[str, Any] = {"library_name": "peft" if kind == "adapter" else "transformers", "license": "other"}
    if names := origins(model):
        front["base_model"] = names
    front |= {"pipeline_tag": "image-text-to-text", "tags": ["radiology", "research-use-only"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _description(context: RunContext, cursor: Cursor, kind: str, base: str | None, dtype: str) -> str:
    model = context.recipe.model
    origin = f"the weights {' and '.join(origins(model))}" if origins(model) else "random weights"
    how = {
        "model": f"Whole weights in {dtype}, adapters added in.",
        "adapter": "An adapter for PEFT. "
        + (
            f"It goes on base/ ({dtype}), which the run has changed from where it began."
            if base == "base"
            else f"It goes on {Path(str(base)).name}, as it was."
        ),
    }[kind]
    return f"A model of the family {model.family}, begun from {origin}; optimizer step {cursor.step}. {how}"


def _images(context: RunContext, cursor: Cursor) -> str:
    build = open_source(context, cursor.stage, "train").datasets[0].manifest.build
    side, images = build.get("longest_side"), build_encoder(context, cursor.stage).images
    text = f"Images were shrunk to {side} pixels on their longest side by area averages and stored as 8 bits"
    text += ", those of more bits between their 0.5% and 99.5% percentiles or by the window of the file."
    if images.limit:
        text += f" At most {images.limit} views of a study{', stitched side by side' if images.stitch else ''}."
    return text


def _code(context: RunContext) -> str:
    """Name the classes that are exported as files, and the heads' own file."""
    text = ""
    if modules := getattr(build_family(context), "modules", ()):
        files = " and ".join(f"{name.rpartition('.')[2]}.py" for name in modules)
        text += f" Its classes are not all transformers' own: {files} hold the others, so load it with "
        text += "`trust_remote_code=True`, as example.py does; read them first."
    if context.recipe.heads:
        text += " heads.safetensors keeps the heads of its objectives, which answers do not need."
    return text


def _lineage(context: RunContext, cursor: Cursor) -> str:
    rows = ["| stage | steps | batch | trained whole | adapters | checkpoint |", "|---|---|---|---|---|---|"]
    names = (*cursor.lineage, f"step-{cursor.step:06d}")
    for number, stage in enumerate(context.recipe.stages[: cursor.stage + 1]):
        lora = f"rank {stage.lora.rank}, alpha {stage.lora.alpha:g}" if stage.lora else ""
        if stage.adapters:
            lora += f" ({stage.adapters})"
        length = stage.steps if stage.steps is not None else f"{stage.epochs} epochs"
        trained = f"{len(stage.train)} pattern(s)" if stage.train else ""
        rows.append(f"| {stage.name} | {length} | {stage.batch} | {trained} | {lora} | {names[number]} |")
    if not cursor.stage_done:
        rows.append(f"\nThe last stage was not at its end: {cursor.stage_step} of its steps were made.")
    environment = read_json(context.run.code / "environment.json") or {}
    hashes = [f"recipe {cursor.recipe[:16]}", f"base {cursor.base[:16]}"]
    hashes += [f"manifest {data[:16]}" for data in cursor.data]
    if environment.get("code"):
        hashes.append(f"code {environment['code']}" + (f" (commit {c})" if (c := environment.get("commit")) else ""))
    rows += ["", f"Hashes: {', '.join(hashes)}. The run began {context.run.lives} time(s)."]
    return "\n".join(rows)


def _manifests(context: RunContext, cursor: Cursor) -> dict[str, Any]:
    """Return the manifests of all stages so far, each once."""
    result = {}
    for stage in range(cursor.stage + 1):
        for part in open_source(context, stage, "train").datasets:
            result[part.manifest.hash] = part
    return result


def _data(context: RunContext, cursor: Cursor) -> str:
    rows = ["| dataset | train | validate | test | patients | manifest |", "|---|---|---|---|---|---|"]
    for digest, part in _manifests(context, cursor).items():
        splits, patients = part.manifest.splits, sum(part.manifest.patients.values())
        counts = " | ".join(str(splits.get(split, 0)) for split in ("train", "validate", "test"))
        rows.append(f"| {part.manifest.dataset} | {counts} | {patients} | {digest[:16]} |")
    return "\n".join([*rows, "", "Trained on the split train alone. No patient is in two splits."])


def _scores(context: RunContext) -> str:
    folders = sorted((context.run.path / "evaluation").glob("step-*"), key=by_step)
    tables = [folder / "table.md" for folder in folders if (folder / "scores.json").exists()]
    if not tables:
        return "None: the run was not evaluated."
    # The table's own heading becomes plain text.
    return re.sub(r"^#+ (.*)$", r"\1:", tables[-1].read_text(encoding="utf-8").strip(), flags=re.M)


def _terms(context: RunContext, cursor: Cursor) -> str:
    lines = []
    for name in origins(context.recipe.model):
        lines.append(f"{name}: the licence of these weights holds for what was made of them.")
        if "llama" in name.lower():
            lines[-1] += (
                " Llama's wants 'Built with Llama' shown, 'Llama' at the beginning of the name and its acceptable use "
                "policy kept, and Llama 3.2 Vision is not licensed to those domiciled in the European Union."
            )
    for part in _manifests(context, cursor).values():
        name = part.manifest.dataset
        known = next((text for start, text in REMINDERS.items() if name.startswith(start)), None)
        lines.append(known or f"{name}: read its terms before you pass the model on.")
    lines.append("A model can repeat texts that it was trained on. Treat it as confidential as its data are.")
    return "\n".join(f"- {line}" for line in dict.fromkeys(lines))


def _recipe(context: RunContext) -> str:
    """Return the frozen recipe, with each path of the site reduced to its last part."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {bare(key): bare(item) for key, item in value.items()}
        if isinstance(value, list):
            return [bare(item) for item in value]
        if isinstance(value, str) and (value.startswith("/") or re.match(r"[a-z0-9]+://", value)):
            return value.rstrip("/").rsplit("/", 1)[-1]
        return value

    return str(yaml.safe_dump(bare(context.recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True))

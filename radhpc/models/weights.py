"""Check the files of a recipe's model: where they are, whether they are complete, and what is missing.

    check(recipe)                       # raises UserError with one line: before anything is queued, and without torch
    listing(recipe)                     # every component's files with sizes and faults, for `radhpc weights`
    fetch("Qwen/Qwen3-0.6B", folder)    # the one place where a network is used, and only when asked for

The components of each family and their model types are in radhpc/core/families.py: a login node needs no torch.
"""

import hashlib
import json
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.core import families
from radhpc.core.errors import UserError, first_line
from radhpc.core.files import read_json
from radhpc.core.recipe import HUB, ModelSettings, Recipe

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
INDEX = "model.safetensors.index.json"
DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin")  # of a hub's files
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class WeightFile:
    """One file of a component's weights."""

    component: str
    path: Path
    bytes: int | None  # None: it is missing
    fault: str = ""
    sha256: str = ""  # "as it should be", "unknown" (nothing to compare with) or "" (not compared)


def check(recipe: Recipe) -> None:
    """Raise UserError for weights that are missing, cut off or of another architecture, and for too long a text."""
    model = recipe.model
    check_architecture(model)
    for component, path in model.folders.items():
        for file in _files(component, Path(path)):
            if file.fault:
                raise UserError(f"{_key(model, component)}: {file.path}: {file.fault}; {_remedy(model, component)}")
    known = families.entry(model.family).components
    for component, path in model.folders.items():
        _check_image_token(model, Path(model.tokenizer.folder or path), known[component].image_token)
    context = _context(model)
    for stage in recipe.stages:
        if context is not None and (longest := recipe.text_of(stage).max_tokens) > context:
            raise UserError(f"text.max_tokens {longest}: the model's context is {context} tokens")


def check_architecture(model: ModelSettings) -> None:
    """Raise UserError where a folder is missing or has another kind of model; only config.json is read."""
    known = families.entry(model.family).components
    allowed = ", ".join("a folder" if component == "model" else f"weights.{component}" for component in known)
    if unknown := [component for component in model.folders if component not in known]:
        where = "a folder" if unknown[0] == "model" else f"weights.{unknown[0]}"
        raise UserError(f"model.weights: family {model.family} does not take {where}; allowed are {allowed}")
    if isinstance(model.weights, dict) and ("model" in model.weights or set(known) == {"model"}):
        raise UserError(
            f"model.weights {model.weights}: a mapping names components in folders of their own; allowed with "
            f"family {model.family} are {allowed}"
        )
    if model.weights is not None and "model" not in model.folders:
        for component in known:
            if component not in ("model", *model.folders, *(model.config or {})):
                raise UserError(
                    f"model.weights: nothing for the component '{component}'; give its folder, or its keys in "
                    "model.config"
                )
    for component, path in model.folders.items():
        config = _config(model, component, Path(path))
        if (model_type := config.get("model_type")) not in known[component].types:
            raise UserError(
                f"{_key(model, component)}: {path}: config.json says model_type '{model_type}'; family {model.family} "
                f"takes {' or '.join(known[component].types)}"
            )


def listing(recipe: Recipe, hashes: bool = True) -> list[WeightFile]:
    """Return every file of every component, including those that are missing or faulty."""
    return [file for component, path in recipe.model.folders.items() for file in _files(component, Path(path), hashes)]


def missing(model: ModelSettings) -> list[tuple[str, str, Path | None]]:
    """Return what to download: component, hub id, and the folder that the recipe names; None: the hub's own cache."""
    result: list[tuple[str, str, Path | None]] = []
    for component, path in model.folders.items():
        if path.startswith(HUB):
            result.append((component, path.removeprefix(HUB), None))
        elif any(file.fault == "missing" or not file.path.exists() for file in _files(component, Path(path))):
            result.append((component, families.entry(model.family).components[component].hub, Path(path)))
    return result


def report(recipe: Recipe, hashes: bool = True) -> dict[str, Any]:
    """Return what `radhpc weights` prints: ok, fault (of all, in one line), parts (the components) and their files."""
    files = listing(recipe, hashes)
    fault = ""
    try:
        check(recipe)
    except UserError as error:
        fault = str(error)
    return {
        "ok": not fault and not any(file.fault for file in files),
        "family": recipe.model.family,
        "fault": fault,
        "parts": {
            component: {
                "folder": folder,
                "bytes": sum(file.bytes or 0 for file in files if file.component == component),
                "files": [
                    {"name": file.path.name, "bytes": file.bytes, "fault": file.fault, "sha256": file.sha256}
                    for file in files
                    if file.component == component
                ],
            }
            for component, folder in recipe.model.folders.items()
        },
    }


def fetch(hub_id: str, folder: Path | None = None) -> Path:
    """Download what a model needs, into a folder or into the hub's own cache; existing files are kept."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(DOWNLOADED), local_dir=folder))
    except Exception as error:  # network, licence, spelling: the hub's client has a class for each
        raise UserError(f"{hub_id}: {first_line(error)}") from error


def convert(folder: Path) -> list[Path]:
    """Write pytorch_model*.bin as safetensors next to them; only tensors are read from the pickles."""
    import torch
    from safetensors.torch import save_file

    written: list[Path] = []
    file_of: dict[str, str] = {}  # by the tensor's name
    for path in sorted(folder.glob("pytorch_model*.bin")):
        out = folder / path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, out, {"format": "pt"})
        file_of |= dict.fromkeys(tensors, out.name)
        written.append(out)
    if len(written) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    return written


def _files(component: str, folder: Path, hashes: bool = False) -> list[WeightFile]:
    """Return the files of a component: its config.json, those that its index names or that exist, and its tokenizer."""
    if not folder.is_dir():
        return [WeightFile(component, folder / name, None, "missing") for name in ("config.json", "model.safetensors")]
    index = read_json(folder / INDEX)
    named = sorted(set(index["weight_map"].values())) if index else []
    names = named or sorted(path.name for path in folder.glob("*.safetensors")) or ["model.safetensors"]
    files = [_file(component, folder / name, hashes) for name in ["config.json", *names]]
    if component in ("model", "text"):
        files += [_file(component, folder / name, hashes) for name in TOKENIZERS if (folder / name).exists()]
    return files


def _file(component: str, path: Path, hashes: bool) -> WeightFile:
    if not path.exists():
        fault = "missing"
        if path.suffix == ".safetensors" and sorted(path.parent.glob("pytorch_model*.bin")):
            fault = "only pytorch_model*.bin exists, and a pickle may run code; --convert writes safetensors of it"
        return WeightFile(component, path, None, fault)
    size = path.stat().st_size
    fault = _length_fault(path, size) if path.suffix == ".safetensors" else ""
    verdict = ""
    if hashes and not fault:
        expected = expected_sha256(path)
        verdict = "unknown" if expected is None else "as it should be"
        if expected is not None and (actual := _sha256(path)) != expected:
            verdict = ""
            fault = f"sha256 is {actual[:12]}..., it should be {expected[:12]}...: damaged, or another release"
    return WeightFile(component, path, size, fault, verdict)


def _length_fault(path: Path, size: int) -> str:
    """Compare a safetensors file's length with what its first bytes say: 8 bytes, a header of that length, tensors."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < 1 << 28 else {}
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return "not a safetensors file"
    return "" if size == expected else f"{size:,} bytes, it should have {expected:,}: cut off"


def expected_sha256(path: Path) -> str | None:
    """Return the sha256 that a file should have, by FILE.sha256, SHA256SUMS or the hub's client; None: unknown."""
    own, sums = path.with_name(path.name + ".sha256"), path.with_name("SHA256SUMS")
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if own.exists() and (match := _SHA256.search(own.read_text())):
        return match.group()
    for line in sums.read_text().splitlines() if sums.exists() else []:
        if line.split()[-1:] in ([path.name], [f"*{path.name}"], [f"./{path.name}"]) and (match := _SHA256.match(line)):
            return match.group()
    if path.is_symlink() and (match := _SHA256.fullmatch(Path(os.readlink(path)).name)):
        return match.group()  # the cache names a blob by its content
    if note.exists() and (match := _SHA256.search(note.read_text())):
        return match.group()
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(model: ModelSettings, component: str, folder: Path) -> dict[str, Any]:
    """Return the config.json of a component. Raises UserError where it is missing or no JSON."""
    path, key = folder / "config.json", _key(model, component)
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {path}: {first_line(error)}") from error
    if config is None:
        fault = "no such folder" if not folder.is_dir() else "no config.json there"
        if model.folders[component].startswith(HUB):
            raise UserError(f"{key}: {model.folders[component]}: not on this machine; {_remedy(model, component)}")
        raise UserError(f"{key}: {folder}: {fault}; {_remedy(model, component)}")
    return dict(config)


def _key(model: ModelSettings, component: str) -> str:
    return "model.weights" if component == "model" else f"model.weights.{component}"


def _remedy(model: ModelSettings, component: str) -> str:
    """Say how to get weights that are missing."""
    path = model.folders[component]
    usual = families.entry(model.family).components[component].hub
    if path.startswith(HUB):
        return "'radhpc weights RECIPE --online' downloads it"
    return (
        f"put the files of {usual} there, where there is a network: hf download {usual} --local-dir {path}, or "
        "'radhpc weights RECIPE --online'"
    )


def _check_image_token(model: ModelSettings, folder: Path, tokens: tuple[str, ...]) -> None:
    """Check the tokenizer as far as JSON files tell; a mere tokenizer.model is checked when the model is built."""
    if not tokens or not (path := folder / "tokenizer.json").exists():
        return
    known = {token["content"] for token in (read_json(path) or {}).get("added_tokens", [])}
    if not known & set(tokens):
        raise UserError(
            f"{path}: no token {tokens[0]} there; it is not the tokenizer of a {model.family} model that sees images"
        )


def _context(model: ModelSettings) -> int | None:
    """Return the number of tokens that the language model has positions for."""
    component = next((component for component in ("text", "model") if component in model.folders), None)
    if component is not None:
        config = _config(model, component, Path(model.folders[component]))
    else:
        config = dict((model.config or {}).get("text", {}))
    context = config.get("text_config", config).get("max_position_embeddings")
    return int(context) if context is not None else None

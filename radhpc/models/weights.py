"""The files that a recipe's model is made of: where they lie, whether they are whole, and what is missing.

    check(recipe)                       # raises UserError with one line: before anything is queued, and without torch
    listing(recipe)                     # every part's files with sizes and faults, for `radhpc weights`
    fetch("Qwen/Qwen3-0.6B", folder)    # the one place where a network is used, and only when asked for

Which components a family has, of which model types, stands in radhpc/core/families.py: a login node needs no torch.
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
PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "pytorch_model*.bin")  # of a hub's files
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


@dataclass(frozen=True)
class File:
    """One file of a part."""

    part: str
    path: Path
    bytes: int | None  # None: it is missing
    fault: str = ""
    sha256: str = ""  # "as it should be", "unknown" (nothing says how it should be) or "" (not looked at)


def check(recipe: Recipe) -> None:
    """Raise UserError for weights that are missing, cut off or of another architecture, and for too long a text."""
    check_architecture(recipe.model)
    for part, path in recipe.model.folders.items():
        for file in _files(part, Path(path)):
            if file.fault:
                raise UserError(f"{_key(recipe.model, part)}: {file.path}: {file.fault}; {_put(recipe.model, part)}")
    known = families.entry(recipe.model.family).components
    for part, path in recipe.model.folders.items():
        _check_image_token(recipe.model, part, Path(recipe.model.tokenizer.folder or path), known[part].image_token)
    context = _context(recipe.model)
    for stage in recipe.stages:
        if context is not None and (longest := recipe.text_of(stage).max_tokens) > context:
            raise UserError(f"text.max_tokens {longest}: the model's context is {context} tokens")


def check_architecture(model: ModelSettings) -> None:
    """Raise UserError where a folder is not there or is that of another kind of model; only config.json is read."""
    known = families.entry(model.family).components
    told = ", ".join("a folder" if part == "model" else f"weights.{part}" for part in known)
    if unknown := [part for part in model.folders if part not in known]:
        where = "a folder" if unknown[0] == "model" else f"weights.{unknown[0]}"
        raise UserError(f"model.weights: family {model.family} does not take {where}; allowed are {told}")
    if isinstance(model.weights, dict) and ("model" in model.weights or set(known) == {"model"}):
        raise UserError(
            f"model.weights {model.weights}: a mapping names parts in folders of their own; allowed with family "
            f"{model.family} are {told}"
        )
    if model.weights is not None and "model" not in model.folders:
        for part in known:
            if part not in ("model", *model.folders, *(model.config or {})):
                raise UserError(
                    f"model.weights: nothing for the part '{part}'; give its folder, or its keys in model.config"
                )
    for part, path in model.folders.items():
        config = _config(model, part, Path(path))
        if (found := config.get("model_type")) not in known[part].types:
            raise UserError(
                f"{_key(model, part)}: {path}: config.json says model_type '{found}'; family {model.family} wants "
                f"{' or '.join(known[part].types)}"
            )


def listing(recipe: Recipe, hashes: bool = True) -> list[File]:
    """Every file of every part, those that are missing and faulty among them."""
    return [file for part, path in recipe.model.folders.items() for file in _files(part, Path(path), hashes)]


def missing(model: ModelSettings) -> list[tuple[str, str, Path | None]]:
    """What to download: part, hub id, and the folder where the recipe wants it; None: the hub's own cache."""
    found: list[tuple[str, str, Path | None]] = []
    for part, path in model.folders.items():
        if path.startswith(HUB):
            found.append((part, path.removeprefix(HUB), None))
        elif any(file.fault == "missing" or not file.path.exists() for file in _files(part, Path(path))):
            found.append((part, families.entry(model.family).components[part].hub, Path(path)))
    return found


def report(recipe: Recipe, hashes: bool = True) -> dict[str, Any]:
    """What `radhpc weights` says: ok, fault (of the whole, in one line), parts and their files."""
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
            part: {
                "folder": folder,
                "bytes": sum(file.bytes or 0 for file in files if file.part == part),
                "files": [
                    {"name": file.path.name, "bytes": file.bytes, "fault": file.fault, "sha256": file.sha256}
                    for file in files
                    if file.part == part
                ],
            }
            for part, folder in recipe.model.folders.items()
        },
    }


def fetch(hub_id: str, folder: Path | None = None) -> Path:
    """Download what a model needs, into a folder or into the hub's own cache; what is there already stays."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(PATTERNS), local_dir=folder))
    except Exception as error:  # network, licence, spelling: the hub's client has a class for each
        raise UserError(f"{hub_id}: {first_line(error)}") from error


def convert(folder: Path) -> list[Path]:
    """Write pytorch_model*.bin as safetensors beside it; nothing but tensors is read from the pickles."""
    import torch
    from safetensors.torch import save_file

    written: list[Path] = []
    placed: dict[str, str] = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        out = folder / path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        save_file({name: one.contiguous().clone() for name, one in tensors.items()}, out, {"format": "pt"})
        placed |= dict.fromkeys(tensors, out.name)
        written.append(out)
    if len(written) > 1:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return written


def _files(part: str, folder: Path, hashes: bool = False) -> list[File]:
    """The files of a part: those that its index names or that are there, its config.json and its tokenizer."""
    if not folder.is_dir():
        return [File(part, folder / name, None, "missing") for name in ("config.json", "model.safetensors")]
    index = read_json(folder / INDEX)
    named = sorted(set(index["weight_map"].values())) if index else []
    names = named or sorted(path.name for path in folder.glob("*.safetensors")) or ["model.safetensors"]
    files = [_file(part, folder / name, hashes) for name in ["config.json", *names]]
    if part in ("model", "text"):
        there = [name for name in TOKENIZERS if (folder / name).exists()]
        files += [_file(part, folder / name, hashes) for name in there]
    return files


def _file(part: str, path: Path, hashes: bool) -> File:
    if not path.exists():
        fault = "missing"
        if path.suffix == ".safetensors" and sorted(path.parent.glob("pytorch_model*.bin")):
            fault = "only pytorch_model*.bin is there, and a pickle may run code; --convert writes safetensors of it"
        return File(part, path, None, fault)
    size = path.stat().st_size
    fault = _cut(path, size) if path.suffix == ".safetensors" else ""
    told = ""
    if hashes and not fault:
        wanted = expected_sha256(path)
        told = "unknown" if wanted is None else "as it should be"
        if wanted is not None and (found := _sha256(path)) != wanted:
            fault, told = f"sha256 is {found[:12]}..., it should be {wanted[:12]}...: damaged, or another release", ""
    return File(part, path, size, fault, told)


def _cut(path: Path, size: int) -> str:
    """A safetensors file says in its first bytes how long it is: 8 bytes, a header of so many bytes, the tensors."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < 1 << 28 else {}
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return "not a safetensors file"
    return "" if size == wanted else f"{size:,} bytes, it should have {wanted:,}: cut off"


def expected_sha256(path: Path) -> str | None:
    """What says how a file should be: FILE.sha256, SHA256SUMS, or where the hub's client put it."""
    beside, sums = path.with_name(path.name + ".sha256"), path.with_name("SHA256SUMS")
    note = path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"
    if beside.exists() and (found := _SHA256.search(beside.read_text())):
        return found.group()
    for line in sums.read_text().splitlines() if sums.exists() else []:
        if line.split()[-1:] in ([path.name], [f"*{path.name}"], [f"./{path.name}"]) and (found := _SHA256.match(line)):
            return found.group()
    if path.is_symlink() and (found := _SHA256.fullmatch(Path(os.readlink(path)).name)):
        return found.group()  # the cache names a blob by its content
    if note.exists() and (found := _SHA256.search(note.read_text())):
        return found.group()
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _config(model: ModelSettings, part: str, folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{_key(model, part)}: {path}: {first_line(error)}") from error
    if found is None:
        what = "no such folder" if not folder.is_dir() else "no config.json there"
        if model.folders[part].startswith(HUB):
            raise UserError(f"{_key(model, part)}: {model.folders[part]}: not on this machine; {_put(model, part)}")
        raise UserError(f"{_key(model, part)}: {folder}: {what}; {_put(model, part)}")
    return dict(found)


def _key(model: ModelSettings, part: str) -> str:
    return "model.weights" if part == "model" else f"model.weights.{part}"


def _put(model: ModelSettings, part: str) -> str:
    """What to do about weights that are not there."""
    path = model.folders[part]
    usual = families.entry(model.family).components[part].hub
    if path.startswith(HUB):
        return "'radhpc weights RECIPE --online' downloads it"
    return (
        f"put the files of {usual} there, where there is a network: hf download {usual} --local-dir {path}, or "
        "'radhpc weights RECIPE --online'"
    )


def _check_image_token(model: ModelSettings, part: str, folder: Path, wanted: tuple[str, ...]) -> None:
    """As far as files of JSON tell; a tokenizer.model alone is looked into when the model is built."""
    if not wanted or not (path := folder / "tokenizer.json").exists():
        return
    known = {token["content"] for token in (read_json(path) or {}).get("added_tokens", [])}
    if not known & set(wanted):
        raise UserError(
            f"{path}: no token {wanted[0]} there; it is not the tokenizer of a {model.family} model that sees images"
        )


def _context(model: ModelSettings) -> int | None:
    """Tokens that the language model has positions for."""
    part = next((part for part in ("text", "model") if part in model.folders), None)
    if part is not None:
        config = _config(model, part, Path(model.folders[part]))
    else:
        config = dict((model.config or {}).get("text", {}))
    found = config.get("text_config", config).get("max_position_embeddings")
    return int(found) if found is not None else None

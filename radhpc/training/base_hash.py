"""Identify the base model of a run by a hash, which checkpoints name instead of copying frozen weights.

compute_base_hash(context, model)     # "9f2c...": over the files of the weights, or over random values themselves
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from radhpc.core.errors import UserError
from radhpc.core.files import read_json, write_atomically
from radhpc.distributed.background import run_on_first
from radhpc.engine.checkpoint import sha256
from radhpc.training.context import RunContext


def compute_base_hash(context: RunContext, model: torch.nn.Module) -> str:
    """Return the identity of the base, as hex digits; all ranks call it."""
    settings, remembered = context.recipe.model, context.run.path / "base.json"
    folders = [Path(folder) for _, folder in sorted(settings.folders.items())]
    # A model that is put together from folders has random values, too: they are a function of the recipe, whose own
    # hash is checked as well.
    return run_on_first(
        lambda: _hash_files(folders, remembered) if folders else _hash_tensors(model), context.ranks, context.stop
    )


def _hash_tensors(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_files(folders: list[Path], remembered: Path) -> str:
    """Return the sha256 over the files of the weights. Twenty gigabytes take some ten seconds, so the result is kept in
    base.json and trusted while sizes and times of change stay the same.
    """
    files: list[Path] = []
    for folder in folders:
        weights = sorted(folder.glob("*.safetensors"))
        if not weights:
            raise UserError(f"model.weights: {folder}: no .safetensors file there")
        files += weights
    stats = [[file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
    before = read_json(remembered)
    if before and before["files"] == stats:
        return str(before["hash"])
    digest = hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
    write_atomically(remembered, json.dumps({"hash": digest, "files": stats}).encode())
    return digest

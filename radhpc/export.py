"""Adapters as PEFT reads them: adapter_config.json and adapter_model.safetensors."""

import shutil
from pathlib import Path

import peft
from safetensors.torch import save_file

from radhpc.adapters import Tensors


def write_adapter(folder: Path, config: peft.LoraConfig, weights: Tensors) -> None:
    """Replace the folder by this adapter. Base parameters that were trained whole are no part of an adapter."""
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    # PEFT keeps names as its wrapper sees them, with the wrapper's own prefix.
    lora = {f"base_model.model.{name}": tensor for name, tensor in weights.items() if ".lora_" in name}
    save_file(lora, temporary / "adapter_model.safetensors", {"format": "pt"})
    config.save_pretrained(str(temporary))
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old)
    else:
        temporary.rename(folder)

"""List the model families: where each is implemented, and which components its weights have.

    entry("mllama").implementation             # "radhpc.models.families.mllama:MllamaFamily", its module and class
    entry("llava").components["vision"].types  # ("clip", "clip_vision_model"): model types its config.json may have

A login node reads this without importing torch. A new family is one file in radhpc/models/families/ and one entry here;
a family of another package is announced by an entry point (radhpc/core/plugins.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from radhpc.core import plugins
from radhpc.core.errors import UserError


@dataclass(frozen=True)
class Component:
    """One folder of weights of a family."""

    types: tuple[str, ...]  # model types that its config.json may have
    hub: str  # id of the usual weights on the Hugging Face hub
    image_token: tuple[str, ...] = ()  # names; its tokenizer must have one of them


@dataclass(frozen=True)
class FamilyEntry:
    """The class that implements a family, as MODULE:CLASS, and its components by name.

    `model` is the complete model in one folder.
    """

    implementation: str
    components: Mapping[str, Component]


BUILT_IN: Mapping[str, FamilyEntry] = {
    "llava": FamilyEntry(
        "radhpc.models.families.llava:LlavaFamily",
        {
            "model": Component(("llava",), "llava-hf/llava-1.5-7b-hf", ("<image>", "<|image|>")),
            "vision": Component(("clip", "clip_vision_model"), "openai/clip-vit-large-patch14-336"),
            "text": Component(("llama",), "lmsys/vicuna-7b-v1.5"),
        },
    ),
    "mllama": FamilyEntry(
        "radhpc.models.families.mllama:MllamaFamily",
        {"model": Component(("mllama",), "meta-llama/Llama-3.2-11B-Vision-Instruct", ("<|image|>",))},
    ),
    "qwen3_vl": FamilyEntry(
        "radhpc.models.families.qwen3_vl:Qwen3VLFamily",
        {"model": Component(("qwen3_vl",), "Qwen/Qwen3-VL-4B-Instruct", ("<|image_pad|>",))},
    ),
    "swin_qwen": FamilyEntry(
        "radhpc.models.families.swin_qwen:SwinQwenFamily",
        {
            "vision": Component(("swin",), "microsoft/swin-base-patch4-window7-224"),
            "text": Component(("qwen3", "llama"), "Qwen/Qwen3-0.6B"),
        },
    ),
}


def names() -> list[str]:
    """Return every family that a recipe may name."""
    return sorted({*BUILT_IN, *plugins.installed(plugins.FAMILIES)})


def entry(name: str) -> FamilyEntry:
    """Return the entry of a family in names(). Raises UserError for a plugin that announces something else."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    announced = plugins.installed(plugins.FAMILIES)[name]
    result = plugins.load(announced)
    if not isinstance(result, FamilyEntry):
        raise UserError(f"plugin '{name}' ({announced.value}) is {type(result).__name__}; allowed is a FamilyEntry")
    return result

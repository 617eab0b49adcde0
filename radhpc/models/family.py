"""What a model family is, and how the one that a recipe names is found (radhpc/core/families.py)."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from radhpc.core import families
from radhpc.core.recipe import ModelSettings
from radhpc.models import weights

Arrays = dict[str, npt.NDArray[Any]]
# (what makes a part without values, its folder, its name) -> the part; None where its folder must be read at once.
Load = Callable[[Callable[[], Any], str, str], Any]


class Taps(NamedTuple):
    """Where a model's features are, for objectives that need more than its answers. A family that has them says so by
    a method `taps(model)`; those without it learn by generation alone.
    """

    image: torch.nn.Module  # gives image tokens
    text: torch.nn.Module  # gives (batch, length, width) of what is said, before any of it has met an image
    last: torch.nn.Module  # is called behind both, in each forward pass
    width: int
    pool: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]  # image tokens, batch -> (batch, width)


class ModelFamily(Protocol):
    """What the rest of radhpc needs to know of a kind of model."""

    tokenizer: Any
    blocks: tuple[type[torch.nn.Module], ...]  # the layers that are sharded and recomputed one by one

    def build(self, seed: int, load: "Load | None" = None) -> torch.nn.Module:
        """The whole model on the CPU, in float32 and in evaluation mode. `load`: for what is put together from several
        folders, how each is read, where not at once.
        """
        ...

    def build_empty(self) -> torch.nn.Module:
        """The same without values, on the meta device; of a local folder it needs the configuration alone."""
        ...

    def finish(self, model: torch.nn.Module) -> torch.nn.Module:
        """A model of build_empty() that has got a folder's values, made ready as build() does."""
        ...

    def processor(self) -> Any:
        """transformers' own processor, which `export` lays beside the weights."""
        ...

    def prompt(self, text: str, images: int) -> str:
        """The chat-formatted prompt for a number of images, up to where the answer begins."""
        ...

    def place_images(self, ids: list[int], images: Arrays) -> list[int]:
        """A prompt's token ids, with as many image tokens as its images take positions in the text."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """One study's views as arrays, each with the views as its first axis."""
        ...

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """encode_images turned back: the views of one study as the model sees them."""
        ...

    def collate_images(self, studies: Sequence[Arrays], input_ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """The image inputs of a batch, given its padded token ids of shape (batch, length)."""
        ...


def family(model: ModelSettings, tokenizer_folder: str) -> ModelFamily:
    """Load a family's file and bind it to a recipe's model and tokenizer."""
    weights.check_architecture(model)
    module = importlib.import_module(families.entry(model.family).module)
    if model.attention == "auto":
        model = model.model_copy(update={"attention": getattr(module.Family, "attention", "sdpa")})
    result: ModelFamily = module.Family(model, tokenizer_folder)
    return result

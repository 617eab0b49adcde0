"""Define what a model family is, and load the one that a recipe names (radhpc/core/families.py)."""

import pkgutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from radhpc.core import families
from radhpc.core.errors import UserError
from radhpc.core.recipe import ModelSettings
from radhpc.models import weights

Arrays = dict[str, npt.NDArray[Any]]
# (function that makes a component without values, its folder, its key such as ".text") -> the component with lazy
# parameters; None where its folder must be read at once.
Load = Callable[[Callable[[], Any], str, str], Any]


class FeaturePoints(NamedTuple):
    """The modules whose outputs are a model's features, for objectives that need more than its answers. A family that
    has them has a method `feature_points(model)`; the others are trained by generation only.
    """

    image: torch.nn.Module  # returns image tokens
    text: torch.nn.Module  # returns (batch, length, width) of the text, before any of it has seen an image
    last: torch.nn.Module  # is called after both, in each forward pass
    width: int
    pool: Callable[[torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]  # image tokens, batch -> (batch, width)


class ModelFamily(Protocol):
    """The interface of a kind of model to the rest of radhpc."""

    tokenizer: Any
    blocks: tuple[type[torch.nn.Module], ...]  # the layers that are sharded and recomputed one by one

    def build(self, seed: int, load: "Load | None" = None) -> torch.nn.Module:
        """Build the whole model on the CPU, in float32 and in evaluation mode. `load`: makes a component of a model of
        several folders with lazy parameters.
        """
        ...

    def build_empty(self) -> torch.nn.Module:
        """Build the model without values, on the meta device; of a local folder it needs only the configuration."""
        ...

    def finish(self, model: torch.nn.Module) -> torch.nn.Module:
        """Make a model of build_empty() ready as build() does, once it has a folder's values."""
        ...

    def processor(self) -> Any:
        """Return the transformers processor that `export` saves with the weights."""
        ...

    def prompt(self, text: str, images: int) -> str:
        """Return the chat-formatted prompt for a number of images, up to where the answer begins."""
        ...

    def expand_image_tokens(self, ids: list[int], images: Arrays) -> list[int]:
        """Return a prompt's token ids, with as many image tokens as its images take positions in the text."""
        ...

    def encode_images(self, images: Sequence[Image.Image]) -> Arrays:
        """Return one study's views as arrays, each with the views as its first axis."""
        ...

    def show_images(self, images: Arrays) -> list[Image.Image]:
        """Invert encode_images: return the views of one study as the model sees them."""
        ...

    def collate_images(self, studies: Sequence[Arrays], input_ids: npt.NDArray[np.int64]) -> dict[str, torch.Tensor]:
        """Return the image inputs of a batch, given its padded token ids of shape (batch, length)."""
        ...


def family_class(name: str) -> Any:
    """Import the class that implements a family. Raises UserError for an entry that names none."""
    implementation = families.entry(name).implementation
    try:
        return pkgutil.resolve_name(implementation)
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        raise UserError(
            f"model.family: {name}: no class {implementation} ({error}); allowed is MODULE:CLASS"
        ) from error


def family(model: ModelSettings, tokenizer_folder: str) -> ModelFamily:
    """Import a family and create the family for a recipe's model and tokenizer."""
    weights.check_architecture(model)
    implementation = family_class(model.family)
    if model.attention == "auto":
        model = model.model_copy(update={"attention": getattr(implementation, "attention", "sdpa")})
    result: ModelFamily = implementation(model, tokenizer_folder)
    return result

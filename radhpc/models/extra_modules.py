"""What a recipe adds to the base model: the fusion of hierarchical_fusion.py, and the heads that objectives need.

Between models/, which builds the base, and adapters.py, which chooses what is trained. Additions belong to the model
in every stage of a run: `model.fusion.*`, trained where a stage's `train` says so, and `heads.*`, trained where a term
of its objective needs them. Their random start is a pure function of the seed.

    attach(model, family, recipe, seed)
    with heads.listening(batch) as heard:              # objective.py
        model(**inputs)
        heard["image"], heard["text"], heard["findings"]   # (B, DIMENSION), (B, DIMENSION), (B, names)

Heads are called inside the model's own forward pass, by hooks, because sharding engines have weights only there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize

from radhpc.core.batch import IGNORE, Batch
from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe
from radhpc.models.family import ModelFamily, Taps
from radhpc.models.portable import hierarchical_fusion

DIMENSION = 256  # of the space that images and answers meet in


class Heads(nn.Module):
    """Pooled image features -> an embedding and the findings; pooled text states -> an embedding."""

    def __init__(self, taps: Taps, findings: int) -> None:
        super().__init__()
        self.image, self.text = _projection(taps.width), _projection(taps.width)
        self.findings = nn.Sequential(nn.LayerNorm(taps.width), nn.Linear(taps.width, findings))
        self._batch: Batch | None = None
        self._heard: dict[str, torch.Tensor] = {}
        self._pool = taps.pool
        taps.image.register_forward_hook(self._on_image)
        taps.text.register_forward_hook(self._on_text)
        taps.last.register_forward_hook(self._on_last)

    @contextmanager
    def listening(self, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
        """What the heads say of the next forward pass, once it is over."""
        self._batch, self._heard = batch, {}
        try:
            yield self._heard
        finally:
            self._batch, self._heard = None, {}

    def _on_image(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        if self._batch is not None:
            pooled = self._pool(output, self._batch)
            self._heard["image"] = normalize(self.image(pooled).float(), dim=-1)
            self._heard["findings"] = self.findings(pooled).float()

    def _on_text(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._batch is not None:
            self._heard["states"] = output[0] if isinstance(output, tuple) else output

    def _on_last(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Not where the states come up: that layer may be computed again in the backward pass."""
        if self._batch is not None:
            states = self._heard.pop("states")
            answer = (self._batch["labels"] != IGNORE).to(states.dtype)
            share = answer / answer.sum(1, keepdim=True).clamp_min(1)
            self._heard["text"] = normalize(self.text((share[:, None] @ states).squeeze(1)).float(), dim=-1)


def attach(model: nn.Module, family: ModelFamily, recipe: Recipe, seed: int) -> None:
    """Add to the base model what the recipe's stages need, in place. Raises UserError where its family has no place."""
    torch.manual_seed(seed)
    if recipe.model.fusion is not None:
        config: Any = model.config
        config.fusion = recipe.model.fusion.model_dump()  # it travels with the weights
        hierarchical_fusion.attach(model, hierarchical_fusion.from_config(config).eval())
    if recipe.heads:
        if not hasattr(family, "taps"):
            raise UserError(
                f"objective.contrastive and objective.clinical: family '{recipe.model.family}' does not say where its "
                "features are"
            )
        model.heads = Heads(family.taps(model), len(recipe.findings.names)).eval()


def _projection(width: int) -> nn.Module:
    """Two layers, as SimCLR and its kin have them before the loss."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, DIMENSION))

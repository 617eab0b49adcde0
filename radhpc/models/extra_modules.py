"""Add modules to the base model: the fusion of hierarchical_fusion.py, and the heads that objectives need.

Between families/, which build the base, and adapters.py, which chooses what is trained. Extra modules belong to the
model in every stage of a run: `model.fusion.*`, trained where a stage's `train` says so, and `heads.*`, trained where a
term of its objective needs them. Their random start is a pure function of the seed.

    attach(model, family, recipe, seed)
    with heads.capture(batch) as outputs:              # objective.py
        model(**inputs)
        outputs["image"], outputs["text"], outputs["findings"]   # (B, DIMENSION), (B, DIMENSION), (B, names)

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
from radhpc.models.family import FeaturePoints, ModelFamily
from radhpc.models.portable import hierarchical_fusion

DIMENSION = 256  # of the joint embedding space of images and answers


class Heads(nn.Module):
    """Compute an embedding and the findings of pooled image features, and an embedding of pooled text states."""

    def __init__(self, points: FeaturePoints, findings: int) -> None:
        super().__init__()
        self.image, self.text = _projection(points.width), _projection(points.width)
        self.findings = nn.Sequential(nn.LayerNorm(points.width), nn.Linear(points.width, findings))
        self._batch: Batch | None = None
        self._outputs: dict[str, torch.Tensor] = {}
        self._pool = points.pool
        points.image.register_forward_hook(self._on_image)
        points.text.register_forward_hook(self._on_text)
        points.last.register_forward_hook(self._on_last)

    @contextmanager
    def capture(self, batch: Batch) -> Iterator[dict[str, torch.Tensor]]:
        """Collect the heads' outputs of the next forward pass; they are complete when it has ended."""
        self._batch, self._outputs = batch, {}
        try:
            yield self._outputs
        finally:
            self._batch, self._outputs = None, {}

    def _on_image(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> None:
        if self._batch is not None:
            pooled = self._pool(output, self._batch)
            self._outputs["image"] = normalize(self.image(pooled).float(), dim=-1)
            self._outputs["findings"] = self.findings(pooled).float()

    def _on_text(self, module: nn.Module, arguments: Any, output: Any) -> None:
        if self._batch is not None:
            self._outputs["states"] = output[0] if isinstance(output, tuple) else output

    def _on_last(self, module: nn.Module, arguments: Any, output: Any) -> None:
        """Embed the text here and not in _on_text: that layer may be computed again in the backward pass."""
        if self._batch is not None:
            states = self._outputs.pop("states")
            answer = (self._batch["labels"] != IGNORE).to(states.dtype)
            share = answer / answer.sum(1, keepdim=True).clamp_min(1)
            self._outputs["text"] = normalize(self.text((share[:, None] @ states).squeeze(1)).float(), dim=-1)


def attach(model: nn.Module, family: ModelFamily, recipe: Recipe, seed: int) -> None:
    """Add the modules that the recipe's stages need, in place. Raises UserError if the family has no features."""
    torch.manual_seed(seed)
    if recipe.model.fusion is not None:
        config: Any = model.config
        config.fusion = recipe.model.fusion.model_dump()  # saved with the weights
        hierarchical_fusion.attach(model, hierarchical_fusion.from_config(config).eval())
    if recipe.heads:
        if not hasattr(family, "feature_points"):
            raise UserError(
                f"objective.contrastive and objective.clinical: family '{recipe.model.family}' does not say where its "
                "features are"
            )
        model.heads = Heads(family.feature_points(model), len(recipe.findings.names)).eval()


def _projection(width: int) -> nn.Module:
    """Return the two layers that contrastive methods such as SimCLR have before the loss."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, DIMENSION))

"""Hierarchical cross-modal fusion (HCF): look up what the prompt asks for in three levels of Mllama's vision encoder.

It needs only PyTorch and transformers, and is exported with a model's weights (export.py):

    fusion = HierarchicalFusion(vision=1280, hidden=4096, width=4096, heads=16)
    attach(model, fusion)             # from now on the model's forward pass and generate() use it
    with fusion.prompted(mask): ...   # training: mask (B, S) of 0 and 1 says which tokens are the prompt

Mllama's vision encoder gives each patch 6 x 1280 numbers: its final state, and the states after layers 3, 7, 15, 23
and 30, interleaved: number 1280 + 5 d + i is entry d of the i-th of these. Low level: layers 3 and 7; mid: 15 and 23;
high: 30 and the final one. Each level is projected to `width` and attends to the embeddings of the prompt's tokens, and
never to an answer's, which would reveal what has to be generated. A gate weighs the levels by their means and that of
the prompt; their sum is projected to the language model's width and added to what its cross-attention layers see, times
tanh(gate), where the gate starts at zero: at first the model computes exactly what it did without the fusion.

After Radixpert (github.com/abdurafeyf/RadixpertV2, models/hcf_fusion.py and assets/architecture.png), whose code cannot
run. From there: three levels, 16 heads, one attention for all levels, a gate of two layers with softmax, and the mix
that it starts from, 0.7 ** (level + 1). Ours: the levels are Mllama's, and see only the prompt.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from transformers import MllamaConfig, MllamaForConditionalGeneration

AUTO_MAP = {"AutoModelForImageTextToText": "FusedMllama"}

LEVELS = ((1, 2), (3, 4), (5, 0))  # of the states [final, 3, 7, 15, 23, 30]
MIX = 0.7


class HierarchicalFusion(nn.Module):
    """Compute what is added to Mllama's image tokens."""

    def __init__(self, vision: int, hidden: int, width: int, heads: int, states: int = 6) -> None:
        """`vision`: width of the vision encoder; `hidden`: of the language model; `states`: how many each patch comes
        with, the final one first. If they are not six, the levels are parts of them of nearly equal size.
        """
        super().__init__()
        self.vision, self.states, self.heads = vision, states, heads
        self.levels = LEVELS if states == 6 else _levels(states)
        self.inward = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(vision * len(level)), nn.Linear(vision * len(level), width))
            for level in self.levels
        )
        self.prompt = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, width))
        self.query_norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.level_gate = nn.Sequential(
            nn.Linear(width * (len(self.levels) + 1), width), nn.GELU(), nn.Linear(width, len(self.levels))
        )
        self.outward = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        self.gate = nn.Parameter(torch.zeros(1))
        with torch.no_grad():
            mix = torch.tensor([MIX ** (n + 1) for n in range(len(self.levels))])
            last: Any = self.level_gate[2]
            last.bias.copy_(mix.log() - mix.log().logsumexp(0))
        self._mask: torch.Tensor | None = None  # which tokens are the prompt, inside prompted()
        self.measures: dict[str, torch.Tensor] = {}  # of the newest forward pass, each (B,): see below

    @contextmanager
    def prompted(self, mask: torch.Tensor) -> Iterator[None]:
        """Say which tokens of the next forward pass are the prompt: (B, S). Otherwise all that are not padding are, as
        in generation.
        """
        self._mask = mask
        try:
            yield
        finally:
            self._mask = None
            self.measures = {}

    def prompt_mask(self, attention_mask: torch.Tensor | None, tokens: torch.Tensor) -> torch.Tensor:
        """Return (B, S), true for the tokens that may be attended to."""
        if self._mask is not None:
            return self._mask.bool()
        assert not self.training, "training needs prompted(): without it the answer would be part of the prompt"
        return torch.ones_like(tokens, dtype=torch.bool) if attention_mask is None else attention_mask.bool()

    def forward(
        self, features: torch.Tensor, valid: torch.Tensor, prompt: torch.Tensor, prompt_mask: torch.Tensor
    ) -> torch.Tensor:
        """Return what is added to the image tokens, (B, N, hidden), from features (B, N, states * vision), valid (B, N)
        of 0 and 1, prompt (B, S, hidden) and prompt_mask (B, S).

        Sets `measures`, each (B,): similarity, the mean cosine of each two levels' means; entropy of the attention to
        the prompt, as a share of the largest possible; imbalance, the divergence of the level gate from equal shares.
        """
        final, others = torch.split(features, [self.vision, self.vision * (self.states - 1)], dim=-1)
        states = [final, *others.reshape(*others.shape[:-1], self.vision, self.states - 1).unbind(-1)]
        prompt = self.prompt(prompt)
        key, value = self._heads(self.key(prompt)), self._heads(self.value(prompt))
        # A row without a prompt would attend to nothing, which gives NaN: it attends to its first token instead.
        first = torch.arange(prompt.shape[1], device=prompt.device) == 0
        seen = prompt_mask | (~prompt_mask.any(1, keepdim=True) & first)
        levels, entropies = [], []
        for level, inward in zip(self.levels, self.inward, strict=True):
            projected = inward(torch.cat([states[n] for n in level], dim=-1))
            query = self._heads(self.query(self.query_norm(projected)))
            attended = scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None])
            levels.append(projected + self.out(attended.transpose(1, 2).flatten(2)))
            entropies.append(self._entropy(levels[-1], key, seen, valid))
        means = [_mean(level, valid) for level in levels]
        shares = self.level_gate(torch.cat([*means, _mean(prompt, seen)], dim=-1)).softmax(-1)
        mixed = torch.stack(levels, dim=-1) @ shares[:, None, :, None].to(levels[0].dtype)
        self.measures = {
            "similarity": _similarity(means),
            "entropy": torch.stack(entropies).mean(0),
            "imbalance": -shares.float().clamp_min(1e-8).log().mean(-1) - torch.tensor(float(len(levels))).log().item(),
        }
        added: torch.Tensor = torch.tanh(self.gate) * self.outward(mixed.squeeze(-1))
        return added

    def _heads(self, states: torch.Tensor) -> torch.Tensor:
        """Reshape (B, S, width) to (B, heads, S, width / heads)."""
        return states.reshape(*states.shape[:-1], self.heads, -1).transpose(1, 2)

    def _entropy(self, level: torch.Tensor, key: torch.Tensor, seen: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """Return the entropy of a level's mean attending to the prompt: one query stands for thousands, whose weights
        are never kept.
        """
        query = self._heads(self.query(self.query_norm(_mean(level, valid)[:, None])))
        scores = (query @ key.transpose(-1, -2)).float() / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~seen[:, None, None], -torch.inf).softmax(-1)
        entropy: torch.Tensor = -(weights * weights.clamp_min(1e-8).log()).sum(-1).mean((1, 2))
        return entropy / seen.sum(-1).clamp_min(2).float().log()


def attach(model: Any, fusion: HierarchicalFusion) -> None:
    """Add the fusion to an MllamaForConditionalGeneration of transformers, as `model.model.fusion`."""
    inner: Any = model.model
    inputs: dict[str, Any] = {}
    inner.fusion = fusion

    def remember(module: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        order = ("input_ids", "pixel_values", "aspect_ratio_mask", "aspect_ratio_ids", "attention_mask")
        arguments = dict(zip(order, positional, strict=False)) | keywords
        inputs.clear()
        inputs.update({name: arguments.get(name) for name in order if name != "pixel_values"})

    def add(module: nn.Module, arguments: tuple[torch.Tensor], projected: torch.Tensor) -> torch.Tensor:
        (features,) = arguments  # (B, images, tiles, patches, states * vision)
        ids = inputs["input_ids"]
        tiles = inputs["aspect_ratio_mask"] * (inputs["aspect_ratio_ids"] > 0).unsqueeze(-1)
        valid = tiles.unsqueeze(-1).expand(features.shape[:-1]).flatten(1)
        mask = fusion.prompt_mask(inputs.get("attention_mask"), ids)
        prompt = inner.language_model.embed_tokens(ids)
        added: torch.Tensor = fusion(features.flatten(1, 3), valid, prompt.to(features.dtype), mask)
        return projected + added.reshape(projected.shape).to(projected.dtype)

    inner.register_forward_pre_hook(remember, with_kwargs=True)
    inner.multi_modal_projector.register_forward_hook(add)


class FusedMllama(MllamaForConditionalGeneration):  # type: ignore[no-untyped-call]
    """Mllama with the fusion of its configuration: the class that AutoModelForImageTextToText loads an export as."""

    def __init__(self, config: MllamaConfig) -> None:
        super().__init__(config)
        attach(self, from_config(config))


def from_config(config: Any) -> HierarchicalFusion:
    """Make the fusion of an MllamaConfig whose `fusion` is {"width": ..., "heads": ...}."""
    vision, states = config.vision_config.hidden_size, 1 + len(config.vision_config.intermediate_layers_indices)
    return HierarchicalFusion(vision, config.text_config.hidden_size, **config.fusion, states=states)


def _levels(states: int) -> tuple[tuple[int, ...], ...]:
    """Cut the states, in the order of depth, into three levels, or into as many as there are states."""
    order, count = [*range(1, states), 0], min(3, states)
    return tuple(tuple(order[n * states // count : (n + 1) * states // count]) for n in range(count))


def _mean(states: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return the mean of (B, N, width) where (B, N) is valid: (B, width)."""
    share = valid.to(states.dtype)
    share = share / share.sum(-1, keepdim=True).clamp_min(1)
    return (share[:, None] @ states).squeeze(1)


def _similarity(means: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean cosine of each two, (B,)."""
    if len(means) < 2:
        return means[0].new_zeros(len(means[0]))
    units = normalize(torch.stack(means, dim=1).float(), dim=-1)
    first, second = torch.triu_indices(len(means), len(means), 1, device=units.device)
    return (units @ units.transpose(1, 2))[:, first, second].mean(-1)

"""Turn a grid of a vision model's features into tokens for a language model. Plain torch, independent of radhpc.

    features (B, N, C), N a square number, such as 49 x 1024 of a Swin-B at 224 pixels
      -> tokens (B, T, D), T latents of the language model's width D

Norms are by group, not by batch: a batch's statistics would depend on the micro-batch, hence on the number of ranks,
and would have to be saved with the trained parameters.
"""

import math

import torch
from torch import nn

Features = torch.Tensor


class SpatialSemanticAbstractor(nn.Module):
    """LightMedVLM's Spatially-Aware Semantic Abstractor, SASA (Vu et al., 2025): convolutions, then latents that query
    them. In recipes: connector.kind "sasa".

    Two 3 x 3 convolutions refine the grid, a linear layer gives it the width D, and T latents attend to it; a residual
    MLP of width 4 D and a norm follow. The first latents may start from the embeddings of findings: set_concepts().
    For C = D = 1024 and T = 64 these are 32.6 million parameters, as published.
    """

    def __init__(self, channels: int, width: int, latents: int, heads: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.refine = nn.Sequential(*(layer for _ in range(2) for layer in _convolution(channels)))
        self.project = nn.Linear(channels, width)
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.attention = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.attended = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.done = nn.LayerNorm(width)

    def set_concepts(self, embeddings: torch.Tensor) -> None:
        """Start the first latents from embeddings (concepts, D): in their directions, and as long as the other latents.

        A token's embedding is tens of times shorter than a random latent: unscaled, it would have hardly any effect.
        """
        with torch.no_grad():
            length = self.latents.norm(dim=1).mean()
            self.latents[: len(embeddings)] = nn.functional.normalize(embeddings.to(self.latents), dim=1) * length

    def forward(self, features: Features) -> torch.Tensor:
        refined = self.project(_flat(self.refine(_grid(features))))
        latents = self.latents.expand(len(features), -1, -1)
        change, _ = self.attention(latents, refined, refined, need_weights=False)
        attended = self.attended(latents + change)
        return torch.as_tensor(self.done(attended + self.mlp(attended)))


class Abstractor(nn.Module):
    """Honeybee's C-Abstractor (Cha et al., CVPR 2024, arXiv:2312.06742): convolutions, pooling, convolutions.

    As in khanrc/honeybee, projectors.py: learned positions, three RegNet blocks on either side of an average pooling to
    sqrt(T) x sqrt(T), and a readout of two linear layers. The inner width is theirs, too: 1024.
    """

    def __init__(
        self, channels: int, width: int, latents: int, features: int, inner: int = 1024, depth: int = 3
    ) -> None:
        super().__init__()
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(features, channels), std=0.02))
        side = math.isqrt(latents)
        self.before = nn.Sequential(*(RegBlock(inner if n else channels, inner) for n in range(depth)))
        self.pool = nn.AdaptiveAvgPool2d((side, side))
        self.after = nn.Sequential(*(RegBlock(inner, inner) for _ in range(depth)))
        self.read = nn.Sequential(nn.Linear(inner, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, features: Features) -> torch.Tensor:
        grid = _grid(features + self.positions)
        return torch.as_tensor(self.read(_flat(self.after(self.pool(self.before(grid))))))


class RegBlock(nn.Module):
    """RegNet's block (Radosavovic et al., 2020) with timm's defaults: 1 x 1, depthwise 3 x 3, squeeze, 1 x 1."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        squeezed = max(1, round(channels * 0.25))
        self.narrow = nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), _Norm(out), nn.SiLU())
        self.spatial = nn.Sequential(nn.Conv2d(out, out, 3, padding=1, groups=out, bias=False), _Norm(out), nn.SiLU())
        self.gate = nn.Sequential(nn.Conv2d(out, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, out, 1), nn.Sigmoid())
        self.widen = nn.Sequential(nn.Conv2d(out, out, 1, bias=False), _Norm(out))
        self.around = (
            nn.Identity() if channels == out else nn.Sequential(nn.Conv2d(channels, out, 1, bias=False), _Norm(out))
        )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        inside = self.spatial(self.narrow(grid))
        inside = inside * self.gate(inside.mean((2, 3), keepdim=True))
        return nn.functional.silu(self.widen(inside) + self.around(grid))


class _Norm(nn.LayerNorm):
    """A layer norm over the channels of (B, C, H, W)."""

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        return super().forward(grid.movedim(1, -1)).movedim(-1, 1)


def _convolution(channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(math.gcd(32, channels), channels), nn.SiLU()


def _grid(features: Features) -> torch.Tensor:
    """Reshape (B, N, C) to (B, C, rows, columns)."""
    batch, count, channels = features.shape
    side = math.isqrt(count)
    return features.transpose(1, 2).reshape(batch, channels, side, side)


def _flat(grid: torch.Tensor) -> Features:
    return grid.flatten(2).transpose(1, 2)

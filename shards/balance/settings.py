"""The settings of a balanced subset, and the summary of what was kept."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from radhpc.core.errors import UserError
from radhpc.core.manifest import INDEX, MANIFEST


@dataclass(frozen=True)
class BalanceSettings:
    """The settings of a balanced subset. Raises UserError for a value that is not allowed.

    Their names stand in the subset's manifest, as do those of BalanceResult and ClusterSummary.
    """

    name: str = "balanced"  # of the subset: what follows the # in its URL
    cap: int | str = "50%"  # studies of a cluster that stay: a count, or the quantile of the clusters' sizes
    rare: float = 0.01  # a label that fewer than this share of the training studies have is rare, and they stay
    vocabulary: str | None = None  # of the labels; default: chexpert, unless another labels twice as many studies
    label_weight: float = 0.5  # length of the labels' vector; the report's has length 1
    embeddings: Path | None = None  # .npz of the user's own vectors: key (n,) and vector (n, d); instead of TF-IDF
    min_cluster_size: int = 10  # of HDBSCAN: distinct reports that make a cluster
    min_samples: int = 3  # of HDBSCAN: neighbours that make a point dense; more give more noise
    fit: int = 20_000  # distinct reports that are clustered; time grows with the square
    seed: int = 0  # of the choice within a cluster, and of the points that are clustered

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]*", self.name) or f"{self.name}.json" == MANIFEST:
            raise UserError(f"name: '{self.name}'; allowed are lower-case letters, digits, - and _, but not 'manifest'")
        if f"{self.name}.npz" == INDEX:
            raise UserError(f"name: '{self.name}' is the file of the full index; allowed is another name")
        for key, least in (("min_cluster_size", 2), ("min_samples", 1), ("fit", 2), ("seed", 0)):
            if getattr(self, key) < least:
                raise UserError(f"{key}: {getattr(self, key)}; allowed are whole numbers from {least}")
        if not 0 <= self.rare <= 1:
            raise UserError(f"rare: {self.rare}; allowed is a share of the studies from 0 to 1, such as 0.01")
        if not 0 <= self.label_weight < float("inf"):
            raise UserError(f"label_weight: {self.label_weight}; allowed are numbers from 0")
        self.cap_for([1])

    def cap_for(self, sizes: list[int]) -> int:
        """Return how many studies of a cluster stay, for clusters of these sizes."""
        text = str(self.cap).strip()
        if re.fullmatch(r"[1-9]\d*", text):
            return int(text)
        if (share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text)) and float(share[1]) <= 100:
            return int(np.quantile(sizes, float(share[1]) / 100, method="lower")) if sizes else 0
        raise UserError(f"cap: '{self.cap}'; allowed are a count such as 200 or a quantile of the sizes such as 50%")


@dataclass(frozen=True)
class ClusterSummary:
    """One cluster: the words that distinguish it from the rest, and its training studies."""

    terms: str
    samples: int
    kept: int


@dataclass(frozen=True)
class BalanceResult:
    """The outcome of balancing; counts are training studies."""

    url: str  # of the subset
    kept: int
    dropped: int
    clusters: int
    noise: int  # studies that are like no other
    rare: tuple[str, ...]  # labels
    cap: int  # studies of a cluster
    labels: dict[str, tuple[int, int]]  # with the label: before, after
    largest: tuple[ClusterSummary, ...]
    picture: str  # file beside the shards
    seconds: float = field(compare=False)

"""Models that judge reports, each from a folder on this machine, and what to put there.

    scorers = ModelScorers({"chexbert": "/weights/chexbert"}, {}, "cpu")
    scorers.measures(generated, references)          # {"chexbert/micro_f1_14": Measure(..., weights="9f86d0..."), ...}
    scorers.missing()                                # {"radgraph": "name in ... a folder with ..."}

Nothing is downloaded, and no score replaces another: without its weights a score is left out by name. A score carries
the sha256 of its weights. This module handles names, folders and hashes; torch is imported only where a model is.
"""

import hashlib
import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

from radhpc.core.errors import UserError
from radhpc.evaluation.metrics.conventions import Measure

CHEXBERT_KINDS = ("micro_f1_14", "macro_f1_14", "micro_f1_5", "macro_f1_5")


@dataclass(frozen=True)
class Kind:
    """One scorer: its scores, its module in metrics/, the contents of its folder, and the package it needs."""

    scores: tuple[str, ...]
    module: str
    files: tuple[str, ...]  # patterns, of which each must match
    weights: tuple[str, ...]  # patterns of what is hashed
    hint: str
    package: str | None = None


_SAVED = ("*.safetensors", "pytorch_model*.bin")
KINDS: dict[str, Kind] = {
    "chexbert": Kind(
        tuple(f"chexbert/{kind}" for kind in CHEXBERT_KINDS), "chexbert", ("chexbert.pth", "vocab.txt"),
        ("chexbert.pth",), "chexbert.pth of CheXbert (Smit et al., 2020), and vocab.txt of bert-base-uncased",
    ),
    "bertscore": Kind(
        ("bertscore/f1",), "embeddings", ("config.json",), _SAVED,
        "distilbert-base-uncased as transformers saves it, and baseline.tsv of the package bert-score (its file "
        "rescale_baseline/en/distilbert-base-uncased.tsv)",
    ),
    "clinicalbert": Kind(
        ("clinicalbert/cosine",), "embeddings", ("config.json",), _SAVED,
        "Bio_ClinicalBERT as transformers saves it",
    ),
    "radgraph": Kind(
        ("radgraph/simple", "radgraph/partial", "radgraph/complete"), "clinical", ("radgraph-xl/*",),
        ("radgraph-xl/*",),
        "radgraph-xl/ (config.json, vocabulary/, weights.th), and hub/ with the tokenizer that its config.json names",
        "radeval",
    ),
    "radcliq": Kind(
        ("radcliq/v1",), "clinical", ("*",), ("**/*.pth", "**/*.th", "**/*.safetensors", "**/*.bin"),
        "a Hugging Face cache (hub/) with chexbert, radgraph and distilroberta-base, as the package fills it",
        "radeval",
    ),
    "ratescore": Kind(
        ("ratescore/mean",), "clinical", ("*",), ("**/*.safetensors", "**/*.bin"),
        "a Hugging Face cache (hub/) with its two models, as the package fills it", "radeval",
    ),
    "green": Kind(
        ("green/mean",), "clinical", ("config.json",), ("*.safetensors", "*.bin"),
        "GREEN-radllama2-7b as transformers saves it (it wants a GPU)", "radeval",
    ),
}  # fmt: skip
NAMES: dict[str, tuple[str, ...]] = {name: kind.scores for name, kind in KINDS.items()}


class ModelScorer(Protocol):
    """A loaded model."""

    def measures(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
        """Return its scores by the names in KINDS."""
        ...


class ModelScorers:
    """The scorers whose folders are configured. Raises UserError for a folder without its files or of another hash."""

    def __init__(self, folders: Mapping[str, str], expected: Mapping[str, str], device: str) -> None:
        self.folders = {name: Path(folder) for name, folder in folders.items()}
        self.expected, self.device = expected, device
        self._loaded: dict[str, ModelScorer] = {}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """sha256 of the weights by scorer."""
        return {name: check(name, folder, self.expected.get(name)) for name, folder in self.folders.items()}

    def missing(self) -> dict[str, str]:
        """Return by scorer what has to be put where."""
        return {
            name: f"name in evaluation.scorers.{name} a folder with {kind.hint}"
            + (f"; and pip install {kind.package}" if kind.package else "")
            for name, kind in KINDS.items()
            if name not in self.folders
        }

    def measures(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
        """Return the scores of all scorers."""
        result: dict[str, Measure] = {}
        for name, folder in self.folders.items():
            digest = self.hashes[name]
            if name not in self._loaded:
                module = importlib.import_module(f"radhpc.evaluation.metrics.{KINDS[name].module}")
                self._loaded[name] = module.load(name, folder, self.device)
            for score, measure in self._loaded[name].measures(generated, references).items():
                assert score in KINDS[name].scores, score
                result[score] = replace(measure, weights=digest)
        return result


def check(name: str, folder: Path, expected: str | None) -> str:
    """Return the sha256 of a scorer's weights: of the file, or of the names and sums of several. Raises UserError."""
    kind, key = KINDS[name], f"evaluation.scorers.{name}"
    if not folder.is_dir():
        raise UserError(f"{key}: {folder}: no such folder; it holds {kind.hint}")
    for pattern in kind.files:
        if not any(folder.glob(pattern)):
            raise UserError(f"{key}: {folder}: no {pattern} there; it holds {kind.hint}")
    if kind.package is not None and importlib.util.find_spec(kind.package) is None:
        raise UserError(f"{key}: the package {kind.package} is not installed; pip install {kind.package}")
    files = sorted({path for pattern in kind.weights for path in folder.glob(pattern) if path.is_file()})
    if not files:
        raise UserError(f"{key}: {folder}: no weights there ({', '.join(kind.weights)}); it holds {kind.hint}")
    sums = [(str(path.relative_to(folder)), _sha256(path)) for path in files]
    digest = sums[0][1] if len(sums) == 1 else hashlib.sha256(repr(sums).encode()).hexdigest()
    if expected is not None and digest != expected:
        raise UserError(f"{key}: {folder}: weights of sha256 {digest}; evaluation.scorers.sha256 wants {expected}")
    return digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

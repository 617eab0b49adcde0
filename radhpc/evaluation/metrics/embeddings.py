"""Scores two texts by a language model's vectors: BERTScore (Zhang et al., ICLR 2020), and a cosine of mean vectors.

    scorer = load("bertscore", Path("/weights/distilbert-base-uncased"), "cpu")
    scorer.measures(generated, references)["bertscore/f1"]

BERTScore as RRG24 and RadEval use it: distilbert-base-uncased, its fifth layer, no idf, rescaled by the baseline that
the package bert-score ships, where baseline.tsv is in the folder. The cosine has no published standard.
"""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from radhpc.core.errors import UserError, first_line
from radhpc.evaluation.metrics.bootstrap import Array, mean
from radhpc.evaluation.metrics.conventions import Measure

_LAYER = 5  # of distilbert-base-uncased, the default of bert-score
_BATCH = 32


class _Encoder:
    """A language model from a folder. Vectors are cached by text, because every baseline has the same references."""

    def __init__(self, name: str, folder: Path, device: str) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self.model: Any = AutoModel.from_pretrained(folder, local_files_only=True).eval().to(device)
        except (OSError, ValueError) as error:
            raise UserError(f"evaluation.scorers.{name}: {folder}: {first_line(error)}") from error
        self.device = device
        self.longest = min(512, self.model.config.max_position_embeddings)
        self._known: dict[tuple[str, int], torch.Tensor] = {}

    @torch.no_grad()
    def vectors(self, texts: Sequence[str], layer: int) -> list[torch.Tensor]:
        """(tokens, width) of each text at a layer, its first and last special token included."""
        new = sorted({text for text in texts if (text, layer) not in self._known}, key=len)
        for start in range(0, len(new), _BATCH):
            some = new[start : start + _BATCH]
            inputs = self.tokenizer(some, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
            inputs = {key: inputs[key].to(self.device) for key in ("input_ids", "attention_mask")}
            states = self.model(**inputs, output_hidden_states=True).hidden_states[layer].float().cpu()
            for text, row, length in zip(some, states, inputs["attention_mask"].sum(1).tolist(), strict=True):
                self._known[text, layer] = row[:length].clone()
        return [self._known[text, layer] for text in texts]


class BertScore:
    """BERTScore's F1."""

    def __init__(self, encoder: _Encoder, baseline: Array | None, layer: int) -> None:
        self.encoder, self.baseline, self.layer = encoder, baseline, layer

    def measures(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
        candidates, targets = (self.encoder.vectors(texts, self.layer) for texts in (generated, references))
        each = np.asarray([_precision_recall_f1(*pair) for pair in zip(candidates, targets, strict=True)])
        if self.baseline is not None:
            each = (each - self.baseline) / (1 - self.baseline)
        about = "rescaled by baseline.tsv" if self.baseline is not None else "not rescaled: no baseline.tsv"
        return {"bertscore/f1": Measure(mean(each[:, 2]), f"BERTScore F1, layer {self.layer}, no idf, {about}")}


def _precision_recall_f1(candidate: torch.Tensor, reference: torch.Tensor) -> tuple[float, float, float]:
    """Greedy matches by cosine. The special tokens at both ends may be matched, but have no score of their own."""
    if len(candidate) <= 2 or len(reference) <= 2:
        return 0.0, 0.0, 0.0
    similarity = _normalised(candidate) @ _normalised(reference).T
    precision, recall = float(similarity.max(1).values[1:-1].mean()), float(similarity.max(0).values[1:-1].mean())
    total = precision + recall
    return precision, recall, 2 * precision * recall / total if total else 0.0


def _normalised(vectors: torch.Tensor) -> torch.Tensor:
    """Scale each vector to length one."""
    return torch.as_tensor(vectors / vectors.norm(dim=-1, keepdim=True))


class MeanCosine:
    """The cosine between the means of two texts' last vectors."""

    def __init__(self, encoder: _Encoder) -> None:
        self.encoder = encoder

    def measures(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
        means = [
            _normalised(torch.stack([rows.mean(0) for rows in self.encoder.vectors(texts, -1)]))
            for texts in (generated, references)
        ]
        about = "cosine of the mean vectors of the last layer, all tokens; no published standard"
        return {"clinicalbert/cosine": Measure(mean((means[0] * means[1]).sum(1).numpy()), about)}


def load(name: str, folder: Path, device: str) -> BertScore | MeanCosine:
    """Load the scorer that scorers.KINDS has under this name. Raises UserError."""
    encoder = _Encoder(name, folder, device)
    if name == "clinicalbert":
        return MeanCosine(encoder)
    layer = min(_LAYER, encoder.model.config.num_hidden_layers)
    path = folder / "baseline.tsv"
    if not path.exists():
        return BertScore(encoder, None, layer)
    with open(path, newline="") as file:
        rows = {row["LAYER"]: [float(row[key]) for key in "PRF"] for row in csv.DictReader(file)}
    if str(layer) not in rows:
        raise UserError(f"evaluation.scorers.{name}: {path}: no layer {layer} there")
    return BertScore(encoder, np.asarray(rows[str(layer)]), layer)

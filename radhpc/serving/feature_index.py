"""Indexes training studies by the model's pooled vision features, and finds those nearest to a study.

    build(context, engine, cursor)                   # RUN/index/: vectors.npy, studies.json, index.json
    index = FeatureIndex.load(context, cursor)
    index.nearest(features(engine, encoder, [views])[0], 3)

A vector is the mean of the vision encoder's last hidden states over patches, tiles and views, minus the mean of all
training studies; similarity is the cosine. A study is called far if its distance to the nearest training study is
longer than theirs to each other. Measured on the quickstart's model: of 100 unseen phantoms none is far, of 12 pictures
that are no radiographs all are, and of 22 real radiographs, which it has never seen, 20 (by the cosine, none of the 12
and one of the 22). The index belongs to one checkpoint and one set of manifests.
"""

import inspect
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from radhpc.core.batch import Batch
from radhpc.core.errors import UserError
from radhpc.core.files import read_json, write_atomically
from radhpc.data.collate import StudyEncoder
from radhpc.data.source import BadSample, DecodedStudy
from radhpc.engine.checkpoint import Cursor
from radhpc.engine.fsdp import Engine
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.sources import open_source

log = logging.getLogger("radhpc")

FAR = 0.005  # share of the training studies that are themselves farther from all others than the limit
MARGIN = 1.25  # times the limit: an estimate from few studies is not exact
CALIBRATED = 1000  # training studies that the limit is measured on

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Neighbour:
    """A similar training study."""

    key: str
    number: int  # in the training split
    similarity: float  # cosine, up to 1
    text: str


def features(
    engine: Engine, encoder: StudyEncoder, studies: Sequence[Sequence[Image.Image]], batch: int = 8
) -> Vectors:
    """Return pooled vision features, (studies, D). Raises UserError for a model without a vision encoder."""
    model: Any = engine.model
    vision = model.get_encoder(modality="image") if hasattr(model, "get_encoder") else model
    if vision is model:
        raise UserError(f"{type(model).__name__}: no vision encoder that `index` knows of")
    parameters = inspect.signature(vision.forward).parameters
    pooled = []
    for start in range(0, len(studies), batch):
        rows = [encoder.encode_prompt("", None, views) for views in studies[start : start + batch]]
        inputs = engine.to_device(encoder.batch(rows))
        with torch.no_grad(), engine.autocast:
            output = vision(**{name: value for name, value in inputs.items() if name in parameters})
        states = getattr(output, "last_hidden_state", output)
        pooled.append(_pool(states, inputs).float().cpu().numpy())
    return np.concatenate(pooled)


def _pool(states: torch.Tensor, inputs: Batch) -> torch.Tensor:
    """Return the mean over all positions that belong to an image, (batch, D)."""
    if states.ndim == 5:  # Mllama's (batch, views, tiles, patches, D): views and tiles that are padding do not count
        present = (inputs["aspect_ratio_mask"] * (inputs["aspect_ratio_ids"] > 0)[..., None]).to(states.dtype)
        return (states.mean(dim=3) * present[..., None]).sum(dim=(1, 2)) / present.sum(dim=(1, 2))[:, None]
    rows = len(inputs["input_ids"])
    return states.reshape(rows, -1, states.shape[-1]).mean(dim=1)


def build(
    context: RunContext,
    engine: Engine,
    cursor: Cursor,
    samples: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> "FeatureIndex":
    """Write the index of a checkpoint over the training split, or the first `samples` studies of a random order."""
    from radhpc.data import sampler

    source, encoder = open_source(context, cursor.stage, "train"), build_encoder(context, cursor.stage)
    count = min(samples or len(source), len(source))
    numbers = np.sort(sampler.permute(np.arange(count), len(source), sampler.number("index")))
    vectors: list[Vectors] = []
    described: list[dict[str, Any]] = []
    left_out = 0
    for start in range(0, count, 32):
        studies: list[tuple[int, DecodedStudy]] = []
        for number in numbers[start : start + 32]:
            try:
                studies.append((int(number), source.read(int(number))))
            except BadSample as error:
                log.warning("left out of the index: %s", error)
                left_out += 1
        if studies:
            vectors.append(features(engine, encoder, [views for _, (_, _, views) in studies]))
            described += [
                {"key": key, "number": number, "text": encoder.reference(sample)}
                for number, (key, sample, _) in studies
            ]
        progress(min(start + 32, count), count)
    if not described:
        raise UserError(f"{context.run.path}: none of {count} training studies could be read")
    raw = np.concatenate(vectors)
    centre = raw.mean(axis=0)
    centred = raw - centre
    folder = context.run.path / "index"
    temporary = context.run.path / ".index.writing"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    np.save(temporary / "vectors.npy", centred, allow_pickle=False)
    np.save(temporary / "centre.npy", centre, allow_pickle=False)
    write_atomically(temporary / "studies.json", json.dumps(described).encode(), 0o600)
    about = {
        "step": cursor.step,
        "base": cursor.base,
        "data": list(cursor.data),
        "studies": len(described),
        "left_out": left_out,
        "far": _far_limit(centred),
    }
    write_atomically(temporary / "index.json", json.dumps(about, indent=1).encode(), 0o600)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return FeatureIndex(centred, centre, described, about)


def _lengths(vectors: Vectors) -> Vectors:
    return np.asarray(np.maximum(np.linalg.norm(vectors, axis=-1), 1e-12), np.float32)


def _far_limit(vectors: Vectors) -> float:
    """Return the distance to the nearest other study that all but a share FAR of the training studies stay within."""
    some = np.random.default_rng(0).permutation(len(vectors))[:CALIBRATED]
    nearest = []
    for n in some:
        distances = np.linalg.norm(vectors - vectors[n], axis=1)
        distances[n] = np.inf
        nearest.append(float(distances.min()))
    return float(np.quantile(nearest, 1 - FAR)) if len(vectors) > 1 else float("inf")


@dataclass(frozen=True)
class FeatureIndex:
    """Vectors of training studies, (studies, D), around their centre."""

    vectors: Vectors
    centre: Vectors
    studies: list[dict[str, Any]]  # key, number and text
    about: dict[str, Any]

    @classmethod
    def load(cls, context: RunContext, cursor: Cursor, required: bool = True) -> "FeatureIndex | None":
        """Load the index of this checkpoint; None if there is none. Raises UserError if one is `required`."""
        folder = context.run.path / "index"
        about = read_json(folder / "index.json")
        fault = None
        if about is None:
            fault = "no index"
        elif (about["step"], about["base"], tuple(about["data"])) != (cursor.step, cursor.base, cursor.data):
            fault = f"the index is of step {about['step']}, the newest checkpoint of step {cursor.step}"
        if fault is not None:
            if required:
                raise UserError(f"{context.run.path}: {fault}; make one: radhpc index {context.run.path}")
            return None
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        centre = np.load(folder / "centre.npy", allow_pickle=False)
        return cls(vectors, centre, read_json(folder / "studies.json"), about)

    def nearest(self, vector: Vectors, count: int) -> list[Neighbour]:
        """Return the most similar training studies, the most similar first."""
        query = vector - self.centre
        similar = self.vectors @ query / (_lengths(self.vectors) * _lengths(query))
        best = np.argsort(-similar, kind="stable")[:count]
        return [Neighbour(**{**self.studies[n], "similarity": round(float(similar[n]), 4)}) for n in best.tolist()]

    def describe_distance(self, vector: Vectors) -> str | None:
        """Describe how far a study is from all training studies; None if it is as near as they are to each other."""
        distance, limit = float(np.linalg.norm(self.vectors - (vector - self.centre), axis=1).min()), self.about["far"]
        if distance <= MARGIN * limit:
            return None
        return (
            f"{distance / limit:.1f} times as far from the nearest training study as {1 - FAR:.1%} of those are from "
            "theirs"
        )

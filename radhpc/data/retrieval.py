"""Find the training studies with the most similar images. A report copied from the nearest one is the baseline that a
model has to beat, and a model may be trained to read such reports (`text.neighbours`).

    index = RetrievalIndex.build(training, answer, 1024, folder, ranks, stop)
    index.nearest([encode_thumbnail(views) for views in studies])          # a training report for each
    index.most_similar(encode_thumbnail(views), 2, patient)                       # two of other patients

An image is 16 by 16 gray pixels of its first view, less their mean and of length one; similarity is the cosine.
That is coarse on purpose: it needs no weights and is the same for every model. Thumbnails of training studies are made
once and kept in the run folder, in a file whose name and bytes follow from the data alone.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from radhpc.core.files import write_atomically
from radhpc.core.sample import Sample
from radhpc.data import sampler
from radhpc.data.source import BadSample, Source
from radhpc.distributed.background import run_in_background
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Stop

SIDE = 16


def encode_thumbnail(views: Sequence[Image.Image]) -> str:
    """Return the first view, small, as text for a JSON file."""
    small = views[0].convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    return base64.b64encode(small.tobytes()).decode()


@dataclass(frozen=True)
class RetrievalIndex:
    """Thumbnails and reports of training studies."""

    thumbnails: list[str]
    texts: list[str]
    patients: list[str]  # salted hashes

    @classmethod
    def build(
        cls, training: Source, answer: Callable[[Sample], str], count: int, folder: Path, ranks: Ranks, stop: Stop
    ) -> "RetrievalIndex":
        """Build the index from `count` training studies, the same ones in every evaluation; all ranks read their share.
        Complete on rank 0 only. Studies with a question, without a text, or that cannot be read are passed over.
        """
        path = cls.path(training, count, folder)
        known = ranks.broadcast(path.exists())
        if known:
            return cls.load(path) if ranks.first else cls([], [], [])
        count = min(count, len(training))
        chosen = [int(n) for n in sampler.permute(np.arange(count), len(training), sampler.number("neighbours"))]

        def read() -> list[tuple[str, str, str]]:
            rows = []
            for number in chosen[ranks.rank :: ranks.world]:
                try:
                    _, sample, views = training.read(number)
                except BadSample:  # the stream names it when its turn comes
                    continue
                if sample.question is None and (text := answer(sample)):
                    rows.append((encode_thumbnail(views), text, sample.patient))
            return rows

        local = run_in_background(read, ranks, stop) or []
        # Sorted, so that the file is the same whatever the number of ranks.
        rows = sorted(one for shard in ranks.gather(local) for one in shard)
        index = cls(*(list(column) for column in zip(*rows, strict=True))) if rows else cls([], [], [])
        if ranks.first:
            index._save(path)
        return index

    def nearest(self, thumbnails: Sequence[str]) -> list[str]:
        """Return for each the text of the most similar training study."""
        return [self.texts[int(np.argmax(self._known @ vector))] for vector in _vectors(thumbnails)]

    def most_similar(self, thumbnail: str, count: int, patient: str) -> list[str]:
        """Return the texts of the most similar studies, most similar first, without this patient's."""
        similar = self._known @ _vectors([thumbnail])[0]
        similar[self._rows.get(patient, [])] = -np.inf
        # Called for each sample of a training: only the few that are similar enough are sorted.
        least = np.partition(similar, -count)[-count] if count < len(similar) else -np.inf
        enough = np.flatnonzero((similar >= least) & np.isfinite(similar))
        return [self.texts[n] for n in enough[np.argsort(-similar[enough], kind="stable")][:count]]

    @cached_property
    def _known(self) -> npt.NDArray[Any]:
        return _vectors(self.thumbnails)

    @cached_property
    def _rows(self) -> dict[str, list[int]]:
        """Return the rows of each patient's studies."""
        rows: dict[str, list[int]] = {}
        for row, patient in enumerate(self.patients):
            rows.setdefault(patient, []).append(row)
        return rows

    @staticmethod
    def path(training: Source, count: int, folder: Path) -> Path:
        """Return the file of the index of `count` of these studies."""
        identity = hashlib.sha256(repr((training.hashes, count, SIDE, "patients")).encode()).hexdigest()[:16]
        return folder / f"neighbours-{identity}.npz"

    @classmethod
    def load(cls, path: Path) -> "RetrievalIndex":
        with np.load(path, allow_pickle=False) as data:
            return cls(*([str(one) for one in data[name]] for name in ("thumbnails", "texts", "patients")))

    def _save(self, path: Path) -> None:
        buffer = io.BytesIO()
        columns = {name: np.asarray(getattr(self, name), str) for name in ("thumbnails", "texts", "patients")}
        np.savez_compressed(buffer, **columns)  # type: ignore[arg-type]
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, buffer.getvalue(), 0o600)


def _vectors(thumbnails: Sequence[str]) -> npt.NDArray[Any]:
    """Return (n, SIDE * SIDE), each without its mean and of length one; a picture of one gray is all zeros."""
    pixels = np.asarray([np.frombuffer(base64.b64decode(one), np.uint8) for one in thumbnails], np.float32)
    pixels = pixels.reshape(len(thumbnails), SIDE * SIDE)
    pixels = pixels - pixels.mean(1, keepdims=True)
    return np.asarray(pixels / np.maximum(1e-6, np.linalg.norm(pixels, axis=1, keepdims=True)))

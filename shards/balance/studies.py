"""The training studies of a dataset: their reports and labels, read from finished shards without any image.

studies = read_studies(store, manifest, index, rows, "chexpert", progress)
studies.texts[studies.text[0]], studies.labels[studies.label[0]]       # report and labels of the first study
"""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from awscrt.checksums import crc32c
from pydantic import ValidationError

from radhpc.core.errors import UserError, first_line, nearest
from radhpc.core.manifest import Manifest, SampleIndex
from radhpc.core.sample import Sample
from radhpc.storage.store import Store

BalanceProgress = Callable[[int, int, str], None]  # (done, in all, what is being done)
Ints = npt.NDArray[np.int64]

THREADS, CHUNK = 8, 512  # readers, and descriptions that are under way: an object store is slow to answer


@dataclass
class TrainingStudies:
    """The training studies: each distinct report and set of labels once, and the indices of every study."""

    texts: list[str]
    text: Ints  # (n,) index into `texts`
    labels: list[tuple[tuple[str, int], ...]]  # distinct sets of (name, 1 or -1)
    label: Ints  # (n,) index into `labels`


def read_studies(
    store: Store, manifest: Manifest, index: SampleIndex, rows: Ints, vocabulary: str | None, progress: BalanceProgress
) -> TrainingStudies:
    """Read the descriptions, but no image. The labels are those of one vocabulary, by default the one most used.

    Raises UserError for an unknown vocabulary, and where there are neither reports nor labels.
    """
    texts: dict[str, int] = {}
    text = np.zeros(len(rows), np.int64)
    labels: dict[str, dict[tuple[tuple[str, int], ...], int]] = {}  # vocabulary -> distinct sets -> number
    label: dict[str, Ints] = {}
    labelled: Counter[str] = Counter()  # studies with any label of a vocabulary
    for position, sample in enumerate(_read_samples(store, manifest, index, rows)):
        report = _learnt_text(sample)
        text[position] = texts.setdefault(report, len(texts))
        for name, values in sample.labels.items():
            present = tuple(sorted((finding, value) for finding, value in values.items() if value in (1, -1)))
            sets = labels.setdefault(name, {(): 0})
            label.setdefault(name, np.zeros(len(rows), np.int64))[position] = sets.setdefault(present, len(sets))
            labelled[name] += any(value is not None for value in values.values())
        if position % CHUNK == 0 or position == len(rows) - 1:
            progress(position + 1, len(rows), "reading reports")
    if vocabulary is not None and vocabulary not in labels:
        allowed = ", ".join(sorted(labels)) or "none, as the samples have no labels"
        raise UserError(f"vocabulary: '{vocabulary}'{nearest(vocabulary, labels)}; allowed are {allowed}")
    if not any(texts) and not any(labelled.values()):
        raise UserError(f"{store.url}: neither reports nor labels to cluster by")
    most = max(sorted(labels), key=lambda name: labelled[name], default=None)
    chosen = vocabulary or ("chexpert" if most and 2 * labelled["chexpert"] >= labelled[most] > 0 else most)
    if chosen is None:
        return TrainingStudies(list(texts), text, [()], np.zeros(len(rows), np.int64))
    return TrainingStudies(list(texts), text, list(labels[chosen]), label[chosen])


def _learnt_text(sample: Sample) -> str:
    """Return the text that a model learns, without the headings that all reports have."""
    sections = (sample.report.findings, sample.report.impression, sample.report.other)
    return "\n".join(filter(None, (sample.question, sample.answer) if sample.question else sections))


def _read_samples(store: Store, manifest: Manifest, index: SampleIndex, rows: Ints) -> Iterator[Sample]:
    """Yield the samples in the order of the rows, read by several threads. Raises UserError for a damaged shard."""

    def load(row: int) -> Sample:
        key = index.key[row].decode()
        for member in index.members(row):
            if member.name == f"{key}.json":
                shard = manifest.shards[member.shard].name
                try:
                    data = store.read_range(shard, member.offset, member.length)
                    if crc32c(data) == member.crc32c:
                        return Sample.model_validate_json(data)
                    fault = "checksum differs from the index's"
                except (FileNotFoundError, ValidationError) as error:
                    fault = first_line(error)
                raise UserError(f"{store.url}/{shard}: {member.name}: {fault}; 'radhpc verify' names every fault")
        raise UserError(f"{store.url}: {key}: no description; 'radhpc verify' names every fault")

    with ThreadPoolExecutor(THREADS, thread_name_prefix="balance") as pool:
        for start in range(0, len(rows), CHUNK):
            yield from pool.map(load, rows[start : start + CHUNK].tolist())


def load_embeddings(path: Path, keys: npt.NDArray[np.bytes_]) -> npt.NDArray[np.float32]:
    """Load the user's vectors: (keys, dimensions), in the order of the keys. Raises UserError."""
    try:
        with np.load(path, allow_pickle=False) as columns:
            names, vectors = columns["key"].astype("S").tolist(), np.asarray(columns["vector"], np.float32)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"embeddings: {path}: {first_line(error)}; allowed is a .npz of key and vector") from error
    if vectors.ndim != 2 or len(names) != len(vectors) or not np.isfinite(vectors).all():
        raise UserError(
            f"embeddings: {path}: {len(names)} keys, vector {vectors.shape}; allowed is one finite row each"
        )
    position = {key: number for number, key in enumerate(names)}
    missing = [key for key in keys.tolist() if key not in position]
    if missing:
        raise UserError(f"embeddings: {path}: no vector of {missing[0].decode()}, nor of {len(missing) - 1} others")
    return vectors[[position[key] for key in keys.tolist()]]


def studies_with_label(studies: TrainingStudies) -> dict[str, npt.NDArray[np.bool_]]:
    """Map each label to a mask of the studies that have it; uncertain ones do not count."""
    names = {name for labels in studies.labels for name, value in labels if value == 1}
    return {name: np.array([(name, 1) in labels for labels in studies.labels], bool)[studies.label] for name in names}

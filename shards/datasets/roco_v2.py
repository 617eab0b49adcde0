"""ROCO v2: figures of open-access articles with their captions and UMLS concepts (Rueckert et al., 2024).

    train_captions.csv           ID,Caption              ROCOv2_2023_train_000001,"Head CT demonstrating ..."
    train_concepts.csv           ID,CUIs                 ROCOv2_2023_train_000001,C0040405;C0018670
    train_concepts_manual.csv    ID,CUIs                 ... and the same for valid and test
    cui_mapping.csv              CUI,Canonical name      C0040405,"X-Ray Computed Tomography"
    license_information.csv      ID,PMCID,Attribution,Link   ROCOv2_2023_train_000001,PMC1,CC BY-NC A et al. (2022),...
    train_images/ROCOv2_2023_train_000001.jpg            also train_images/train/..., as the zip file unpacks

The caption is the report (section `other`); concepts are labels in the vocabularies `umls` (automatic) and
`umls-manual` (modality, and for X-rays region and projection), by canonical name. 59,958 images train, 9,904
validate, 9,927 test.

No patients are known, so an article (PMCID) stands for its patient. Where an article has figures in several official
splits:

    split=disjoint   (the default) test keeps its figures, else validate; the other splits go without, and a warning
                     counts them. The official test set stays whole, so results on it compare with published ones
    split=official   as published; the article counts as another patient in each split, and a warning counts those
    split=article    no official split: each article in one split, by its hash and the build's ratios

An attribution begins with its licence, CC BY or CC BY-NC; `licenses=commercial` leaves the latter out.
"""

import functools
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import Report, Split
from shards.datasets.helpers import layout, vqa
from shards.datasets.helpers.overlap import SharedGroups
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import cells, external_sort, table

SYNTHETIC = False
WORDS: dict[Split, str] = {"train": "train", "validate": "valid", "test": "test"}
CAPTIONS: dict[Split, tuple[str, ...]] = {split: (f"{word}_captions.csv",) for split, word in WORDS.items()}
VOCABULARIES = {"umls": "concepts.csv", "umls-manual": "concepts_manual.csv"}
CACHED = 1 << 13  # names of concepts: the set has about two thousand
UNLICENSED = (None, "", "")  # article, attribution, link
LICENSES, MAPPING = "license_information.csv", "cui_mapping.csv"


class RocoV2Options(ReaderOptions):
    """roco_v2: ROCO v2 as published on Zenodo."""

    split: Literal["disjoint", "official", "article"] = Field(
        "disjoint",
        description="disjoint: official, without figures of articles that the test set has; official: as published; "
        "article: by the hash of the article",
    )
    licenses: Literal["all", "commercial"] = Field(
        "all", description="all, or commercial: images whose licence allows commercial use"
    )

    @property
    def shares_images(self) -> bool:
        """Return True for the official split: its articles have figures in several splits, and repeat figures."""
        return self.split == "official"


OPTIONS = RocoV2Options


class Concepts:
    """The labels of images by vocabulary, stored on the disk."""

    def __init__(self, folder: Path, splits: Sequence[Split]) -> None:
        mapping = table.find_one(folder, [MAPPING])
        self._mapped = mapping is not None
        names = external_sort.Lookup(_pairs(mapping, "CUI", "Canonical name") if mapping else ())
        self._name = functools.lru_cache(CACHED)(names.get)
        self._of = {
            vocabulary: external_sort.Lookup(_concept_rows(folder, splits, ending))
            for vocabulary, ending in VOCABULARIES.items()
        }
        self.unknown = 0  # concepts without a canonical name

    def labels(self, image: str) -> dict[str, dict[str, int | None]]:
        """Return {"umls": {"X-Ray Computed Tomography": 1}, ...}; a concept without a name is labelled by its CUI."""
        concepts = {vocabulary: lookup.get(image, "") for vocabulary, lookup in self._of.items()}
        return {vocabulary: self._named(cuis) for vocabulary, cuis in concepts.items() if cuis}

    def _named(self, cuis: str) -> dict[str, int | None]:
        named: dict[str, int | None] = {}
        for cui in filter(None, map(str.strip, cuis.split(";"))):
            name = self._name(cui)
            self.unknown += name is None
            named[name or cui] = 1
        return named

    def warn(self) -> None:
        """Warn of concepts without a name."""
        if not self._mapped:
            _warn(f"ROCO v2: no {MAPPING}, so concepts are called by their CUIs")
        elif self.unknown:
            _warn(f"{MAPPING}: {self.unknown} concepts of images are not in it; they are called by their CUIs")


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the images with captions. Raises UserError for files that are missing or no ROCO v2."""
    assert isinstance(options, RocoV2Options)
    folder, files = layout.split_files(raw, CAPTIONS, "ROCO v2")
    images = {split: _images(folder, WORDS[split]) for split in files}
    licences = _read_licences(folder, options)
    concepts = Concepts(folder, list(files))
    overlap = SharedGroups((_article(licences, image), split) for split, path in files.items() for image in _ids(path))
    counts: Counter[str] = Counter()
    for split, path in files.items():
        for record, (image, caption) in _rows(path, "ID", "Caption"):
            name = f"{path.name} {record.where}"
            try:
                if record.fault:
                    raise UnusableRecord(record.fault)
                image = vqa.image_name(image)
                article, attribution, link = licences.get(image, UNLICENSED)
                counts["images"] += 1
                counts["unknown"] += article is None
                counts["non-commercial"] += not _commercial(attribution)
                if options.licenses == "commercial" and not _commercial(attribution):
                    continue
                patient = article or image
                if options.split == "disjoint" and overlap.keeper(patient, split) != split:
                    counts["shared"] += 1
                    continue
                yield RawStudy(
                    study=image,
                    patient=f"{patient}\x1f{split}" if options.split == "official" else patient,
                    views=((images[split] / f"{image}.jpg", None),),
                    name=f"{name}: {image}",
                    split=None if options.split == "article" else split,
                    report=Report(other=vqa.required_text(caption, "text")),
                    labels=concepts.labels(image),
                    attribution=f"{attribution} {link}".strip() or None,
                )
            except UnusableRecord as fault:
                yield unusable_study(name, fault)
    concepts.warn()
    _warn_of_counts(options, len(licences) > 0, len(overlap), counts)


def _warn_of_counts(options: RocoV2Options, licensed: bool, shared: int, counts: Counter[str]) -> None:
    """Warn of articles in several splits, and of licences."""
    if not licensed:
        _warn(
            f"ROCO v2: no {LICENSES}, so articles and licences are unknown: each image counts as a patient of its "
            "own, and figures of one article may stand in several splits"
        )
        return
    if shared and options.split == "official":
        _warn(f"ROCO v2: {shared} articles have figures in several official splits; split=disjoint parts them")
    if shared and options.split == "disjoint":
        _warn(
            f"ROCO v2: {shared} articles have figures in several official splits: {counts['shared']} images were left "
            "out so that test, then validate, keep theirs; split=official takes all"
        )
    if counts["unknown"]:
        _warn(f"{LICENSES}: {counts['unknown']} images are not in it; each counts as a patient of its own")
    left_out = options.licenses == "commercial"
    done = "were left out" if left_out else "are in: licenses=commercial leaves them out"
    _warn(
        f"ROCO v2: {counts['non-commercial']} of {counts['images']} images, not licensed for commercial use, {done}; "
        "CC BY and CC BY-NC both ask for attribution, which goes to attribution.jsonl beside the shards"
    )


def _commercial(attribution: str) -> bool:
    """Return whether the licence at the start of an attribution allows commercial use: CC BY does, CC BY-NC not."""
    return bool(re.match(r"CC[ -]?(0|BY)\b", attribution)) and not re.search(r"\bNC\b", attribution)


def _article(licences: external_sort.Lookup, image: str) -> str:
    """Return the article of an image, or the image itself where it has none."""
    article: str | None
    article, *_ = licences.get(image, UNLICENSED)
    return article or image


def _read_licences(folder: Path, options: RocoV2Options) -> external_sort.Lookup:
    """Map images to (article or None, attribution, link); empty without such a file."""
    path = table.find_one(folder, [LICENSES])
    if path is None and (options.licenses == "commercial" or options.split == "article"):
        option = "licenses=commercial" if options.licenses == "commercial" else "split=article"
        raise UserError(f"{folder}: no {LICENSES}; {option} needs it")
    if path is None:
        return external_sort.Lookup(())
    rows = _rows(path, "ID", "PMCID", "Attribution", "Link")
    return external_sort.Lookup((image, (article or None, *rest)) for _, (image, article, *rest) in rows)


def _concept_rows(folder: Path, splits: Sequence[Split], ending: str) -> Iterator[tuple[str, str]]:
    """Yield (image, its CUIs joined by semicolons) of all splits."""
    for split in splits:
        name = f"{WORDS[split]}_{ending}"
        if path := table.find_one(folder, [name]):
            yield from _pairs(path, "ID", "CUIs")
        else:
            _warn(f"ROCO v2: no {name}, so images of '{split}' go without these labels")


def _pairs(path: Path, key: str, value: str) -> Iterator[tuple[str, str]]:
    for _, (first, second) in _rows(path, key, value):
        yield first, second


def _ids(path: Path) -> Iterator[str]:
    for _, (image,) in _rows(path, "ID"):
        yield image


def _rows(path: Path, *names: str) -> Iterator[tuple[table.Record, list[str]]]:
    """Yield the cells of these columns, row by row. Some releases spell their headers differently: " id" for ID."""
    spelled = {name.lower(): name for name in table.read(path).columns}
    columns = [spelled.get(name.lower(), name) for name in names]
    for record in table.stream(path, columns):
        yield record, [cells.known(record.values.get(name, "")) for name in columns]


def _images(folder: Path, word: str) -> Path:
    """Return the folder of a split's images: the zip files hold a folder of their own, which some tools drop."""
    return layout.image_folder(folder, (f"{word}_images/{word}", f"{word}_images", word, "images"), f"{word} images")


def _warn(message: str) -> None:
    warnings.warn(message, DatasetWarning, stacklevel=3)

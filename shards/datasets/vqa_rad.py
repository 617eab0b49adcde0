"""VQA-RAD: questions that clinicians asked about radiographs, CT and MR images of MedPix (Lau et al., 2018).

    VQA_RAD Dataset Public.json     [{"qid": 1, "phrase_type": "freeform", "qid_linked_id": ..., "image_name":
    VQA_RAD Image Folder/            "synpic54610.jpg", "image_organ": "CHEST", "question": "Is there a mass?",
        synpic54610.jpg              "question_type": "PRES", "answer": "yes", "answer_type": "CLOSED", ...}, ...]

The public file has 2,248 questions on 315 images: 451 are the official test set (phrase_type test_freeform and
test_para), the others train. The official split is by question, so an image has questions in both, and a question
may stand in one with its paraphrase (of the same qid_linked_id) in the other. Three ways to take it:

    split=official   as published; an image counts as another patient in each split, and the overlap is reported
    split=disjoint   the official test set whole; train without the images and the paraphrases that test has
    split=image      no official split: each image in one split, by its hash and the build's ratios

There is no official validate split. `validation=0.1` takes the questions of a tenth of the images out of train, the
same images for everyone. One question is one sample, and its image is stored with each. No patients are known: an
image stands for its patient. Labels: answer type (open, closed), question type, organ and phrase type.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import Split, salted_hash
from shards import splits
from shards.datasets.helpers import layout, vqa
from shards.datasets.helpers.overlap import SharedGroups
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import table

SYNTHETIC = False
TABLE = "VQA_RAD Dataset Public.json"
IMAGES = ("VQA_RAD Image Folder", "images")
PHRASES: dict[str, Split] = {"freeform": "train", "para": "train", "test_freeform": "test", "test_para": "test"}
COLUMNS = ("qid", "phrase_type", "image_name", "question", "answer")


class VqaRadOptions(ReaderOptions):
    """vqa_rad: VQA-RAD as published on OSF."""

    split: Literal["official", "disjoint", "image"] = Field(
        "official",
        description="official: as published, by question; disjoint: without train questions on images of the test "
        "set; image: by the hash of the image",
    )
    validation: float = Field(
        0.0, ge=0, le=0.5, description="the share of images, 0 to 0.5, whose train questions validate instead"
    )

    @property
    def shares_images(self) -> bool:
        """Return True for the official split, where images have questions in train and in test."""
        return self.split == "official"


OPTIONS = VqaRadOptions


@dataclass(frozen=True)
class Question:
    """One record, parsed."""

    question_id: str
    linked: str  # the questions that ask the same
    image: str
    official: Split
    question: str
    answer: str
    labels: dict[str, dict[str, int | None]]


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the questions. Raises UserError for files that are missing or no VQA-RAD."""
    assert isinstance(options, VqaRadOptions)
    if options.split == "image" and options.validation:
        raise UserError(
            f"vqa_rad: validation={options.validation} goes with split=official or split=disjoint; "
            "with split=image the build's ratios decide"
        )
    if raw and raw.exists() and not (raw / TABLE).is_file():
        layout.refuse_parquet(raw, "VQA-RAD", [TABLE])
    rows = table.read(table.locate(raw, [TABLE], "VQA-RAD"))
    if missing := [name for name in COLUMNS if name not in rows.columns]:
        raise UserError(f"{rows.path}: no {', '.join(missing)} in the records; found are {table.listed(rows.columns)}")
    folder = layout.image_folder(rows.path.parent, IMAGES, "VQA-RAD's images")
    images = SharedGroups((item.image, _split(item, options)) for item in _questions(rows))
    questions = SharedGroups((item.linked, item.official) for item in _questions(rows) if item.linked)
    left_out = 0
    for record in rows.records:
        name = f"{rows.path.name} {record.where}"
        try:
            item = _parse_question(record)
        except UnusableRecord as fault:
            yield unusable_study(name, fault)
            continue
        split = _split(item, options)
        kept = images.keeper(item.image, split), questions.keeper(item.linked, item.official)
        if options.split == "disjoint" and split != "test" and "test" in kept:
            left_out += 1
        else:
            yield _study(item, split, folder, name, options)
    _warn_of_overlap(options, len(images), len(questions), left_out)


def _warn_of_overlap(options: VqaRadOptions, images: int, questions: int, left_out: int) -> None:
    """Warn of overlaps of the test set with the rest, and of the missing validate split."""
    both = f"{images} images and {questions} questions with paraphrases stand in the official test set and outside it"
    if options.split == "official" and (images or questions):
        message = f"VQA-RAD: {both}; split=disjoint leaves those out of train, split=image splits by image"
    elif options.split == "disjoint" and left_out:
        message = f"VQA-RAD: {both}; {left_out} questions of train were left out for that"
    else:
        message = ""
    if options.split != "image" and not options.validation:
        message += "; " if message else "VQA-RAD: "
        message += "there is no official validate split: validation=0.1 takes a tenth of the images out of train for it"
    if message:
        warnings.warn(message, DatasetWarning, stacklevel=2)


def _questions(rows: table.Table) -> Iterator[Question]:
    """Yield the records that can be used."""
    for record in rows.records:
        try:
            yield _parse_question(record)
        except UnusableRecord:  # the loop that yields the studies names it
            continue


def _parse_question(record: table.Record) -> Question:
    """Parse one record. Raises UnusableRecord."""
    values = record.values
    phrase = vqa.to_text(values.get("phrase_type"), "phrase type").lower()
    if phrase not in PHRASES:
        raise UnusableRecord("unknown phrase type")
    return Question(
        question_id=vqa.required_text(values.get("qid"), "question identifier"),
        linked=vqa.to_text(values.get("qid_linked_id"), "question identifier"),
        image=vqa.image_name(values.get("image_name")),
        official=PHRASES[phrase],
        question=vqa.required_text(values.get("question"), "question"),
        answer=vqa.required_text(values.get("answer"), "answer"),
        labels=vqa.labels(
            answer_type=[vqa.to_text(values.get("answer_type"), "answer type").lower()],
            question_type=[
                kind.strip() for kind in vqa.to_text(values.get("question_type"), "question type").split(",")
            ],
            organ=[vqa.to_text(values.get("image_organ"), "organ")],
            phrase_type=[phrase.removeprefix("test_")],
        ),
    )


def _split(item: Question, options: VqaRadOptions) -> Split:
    """Return the official split, or validate for the chosen share of train's images."""
    place = splits.position(salted_hash(b"vqa_rad validation", item.image))
    return "validate" if item.official == "train" and place < options.validation else item.official


def _study(item: Question, split: Split, folder: Path, name: str, options: VqaRadOptions) -> RawStudy:
    return RawStudy(
        study=f"{item.image}\x1f{item.question_id}",
        patient=f"{item.image}\x1f{split}" if options.split == "official" else item.image,
        views=((folder / item.image, None),),
        name=f"{name}: {item.image}",
        split=None if options.split == "image" else split,
        labels=item.labels,
        question=item.question,
        answer=item.answer,
    )

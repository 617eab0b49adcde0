"""SLAKE: questions in English and Chinese about CT, MR and chest X-ray images (Liu et al., 2021).

    train.json, validate.json, test.json      [{"img_id": 1, "img_name": "xmlab1/source.jpg", "qid": 0,
    imgs/xmlab1/source.jpg                      "question": "What modality is used to take this image?",
                                                "answer": "MRI", "q_lang": "en", "location": "Abdomen",
                                                "modality": "MRI", "answer_type": "OPEN", "base_type": "vqa",
                                                "content_type": "Modality", ...}, ...]

642 images with 14,028 questions, about half of them in each language. `languages=en` (as most published results),
`zh`, or `en,zh`; Chinese needs `--unscrubbed`. The official split is by image; no patients are known, so an image
stands for its patient, and an image in two splits is refused. One question is one sample, and its image is stored with
each. Labels: answer
type (open, closed), question type (the set's content_type), organ (its location), modality, and base type (vqa, or
kvqa: it needs knowledge that is not in the image).
"""

import warnings
from collections.abc import Iterator
from pathlib import Path

from pydantic import Field

from radhpc.core.errors import UserError
from radhpc.core.sample import Split
from shards.datasets.helpers import layout, vqa
from shards.datasets.reader import DatasetWarning, RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import table

SYNTHETIC = False
FILES: dict[Split, tuple[str, ...]] = {
    "train": ("train.json",),
    "validate": ("validate.json", "validation.json", "val.json"),
    "test": ("test.json",),
}
INNER = ("Slake1.0", "Slake", "SLAKE")  # as the published zip file unpacks
IMAGES = ("imgs", "images")
COLUMNS = ("img_name", "question", "answer", "q_lang")
LANGUAGES = ("en", "zh")


class SlakeOptions(ReaderOptions):
    """slake: SLAKE as published."""

    languages: str = Field("en", pattern=r"^(en|zh|en,zh|zh,en)$", description="of the questions: en, zh or en,zh")


OPTIONS = SlakeOptions


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the questions in the chosen languages. Raises UserError for files that are missing or no SLAKE."""
    assert isinstance(options, SlakeOptions)
    folder, files = layout.split_files(raw, FILES, "SLAKE", INNER)
    images = layout.image_folder(folder, IMAGES, "SLAKE's images")
    languages = options.languages.split(",")
    left_out = 0
    for split, path in files.items():
        rows = table.read(path)
        if missing := [name for name in COLUMNS if name not in rows.columns]:
            raise UserError(f"{path}: no {', '.join(missing)} in the records; found are {table.listed(rows.columns)}")
        for record in rows.records:
            name = f"{path.name} {record.where}"
            try:
                language = _language(record)
                if language in languages:
                    yield _study(record, language, split, images, name)
                else:
                    left_out += 1
            except UnusableRecord as fault:
                yield unusable_study(name, fault)
    if left_out:
        others = ",".join(language for language in LANGUAGES if language not in languages)
        warnings.warn(
            f"SLAKE: {left_out} questions in another language than {options.languages} were left out; "
            f"languages={','.join(LANGUAGES)} takes all, languages={others} those alone",
            DatasetWarning,
            stacklevel=2,
        )


def _language(record: table.Record) -> str:
    language = vqa.to_text(record.values.get("q_lang"), "language").lower()
    if language not in LANGUAGES:
        raise UnusableRecord("unknown language")
    return language


def _study(record: table.Record, language: str, split: Split, images: Path, name: str) -> RawStudy:
    """Parse one record. Raises UnusableRecord."""
    values = record.values
    image = vqa.image_name(values.get("img_name"))
    question = vqa.required_text(values.get("question"), "question")
    identifier = vqa.to_text(values.get("qid"), "question identifier") or question
    return RawStudy(
        study=f"{image}\x1f{language}\x1f{identifier}",
        patient=image,
        views=((images / image, None),),
        name=f"{name}: {image}",
        split=split,
        language=language,
        labels=vqa.labels(
            answer_type=[vqa.to_text(values.get("answer_type"), "answer type").lower()],
            question_type=[vqa.to_text(values.get("content_type"), "question type")],
            organ=[vqa.to_text(values.get("location"), "organ")],
            modality=[vqa.to_text(values.get("modality"), "modality")],
            base_type=[vqa.to_text(values.get("base_type"), "base type").lower()],
        ),
        question=question,
        answer=vqa.required_text(values.get("answer"), "answer"),
    )

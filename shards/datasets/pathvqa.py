"""PathVQA: questions about the figures of pathology textbooks (He et al., 2020).

    qas/train/train_qa.pkl       [{"image": "train_0422", "question": "Where are liver stem cells located?",
    images/train/train_0422.jpg    "answer": "in the canals of hering"}, ...]

Three splits, train, val and test, by image; no patients are known, so an image stands for its patient. The pickles
are read as plain data (shards/tabular/safe_pickle.py): nothing in them is ever run. JSON of the same records is read
as well, under the same name or as pathvqa_train.json beside the images. Some 160 of about 32,800 records stand
twice: the second is left out as a duplicate. The same question with another answer stays.

One question is one sample, and its image is stored with each. Label: answer type, which the set does not tell: closed
where the answer is yes or no, as its authors count, else open.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.sample import Split
from shards.datasets.helpers import layout, vqa
from shards.datasets.reader import RawStudy, ReaderOptions, UnusableRecord, unusable_study
from shards.tabular import safe_pickle, table

SYNTHETIC = False
WORDS: dict[Split, str] = {"train": "train", "validate": "val", "test": "test"}
FILES: dict[Split, tuple[str, ...]] = {
    split: (f"qas/{word}/{word}_qa.pkl", f"qas/{word}/{word}_qa.json", f"pathvqa_{word}.json")
    for split, word in WORDS.items()
}
INNER = ("pvqa",)  # as the published zip file unpacks
SUFFIXES = (".jpg", ".jpeg", ".png")
COLUMNS = ("image", "question", "answer")


class PathVqaOptions(ReaderOptions):
    """pathvqa: PathVQA as published."""


OPTIONS = PathVqaOptions


def read(raw: Path | None, options: ReaderOptions) -> Iterator[RawStudy]:
    """Yield the questions. Raises UserError for files that are missing, no PathVQA, or pickles that hold code."""
    folder, files = layout.split_files(raw, FILES, "PathVQA", INNER)
    images = layout.image_folder(folder, ("images",), "PathVQA's images")
    for split, path in files.items():
        for number, record in enumerate(_records(path), 1):
            name = f"{path.name} record {number}"
            try:
                yield _study(record, split, images, name)
            except UnusableRecord as fault:
                yield unusable_study(name, fault)


def _records(path: Path) -> list[dict[str, Any]]:
    """Read all records of one split. Raises UserError."""
    if path.suffix == ".pkl":
        records = safe_pickle.load(path)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise UserError(f'{path}: the records must be a list of dictionaries such as {{"image": ..., ...}}')
    else:
        records = [record.values for record in table.read(path).records]
    columns = dict.fromkeys(key for record in records for key in record if isinstance(key, str))
    if missing := [name for name in COLUMNS if name not in columns]:
        raise UserError(f"{path}: no {', '.join(missing)} in the records; found are {table.listed(columns)}")
    return records


def _study(record: dict[str, Any], split: Split, images: Path, name: str) -> RawStudy:
    """Parse one record. Raises UnusableRecord."""
    image = _image(record.get("image"), split)
    question = vqa.required_text(record.get("question"), "question")
    answer = vqa.required_text(record.get("answer"), "answer")
    return RawStudy(
        study=f"{image}\x1f{question}\x1f{answer}",
        patient=image,
        views=((images / image, None),),
        name=f"{name}: {image}",
        split=split,
        labels=vqa.labels(answer_type=["closed" if answer.lower() in ("yes", "no") else "open"]),
        question=question,
        answer=answer,
    )


def _image(value: Any, split: Split) -> str:
    """Return the path in the folder of images: "train_0422" -> "train/train_0422.jpg". Raises UnusableRecord."""
    name = vqa.image_name(value)
    if not name.lower().endswith(SUFFIXES):  # a dot in the name is no suffix
        name += ".jpg"
    return name if len(PurePosixPath(name).parts) > 1 else f"{WORDS[split]}/{name}"

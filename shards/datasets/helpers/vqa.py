"""Parses the cells of visual question answering records: texts, image names and labels.

One question is one sample, so an image is stored once for each of its questions.
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from shards.datasets.reader import UnusableRecord
from shards.tabular import cells


def to_text(value: Any, column: str) -> str:
    """Return a cell as one line of text, empty for a missing one; 7.0 becomes 7. Raises UnusableRecord.

    `None` and `NA` are texts: they are answers to questions, and these sets write null for what is missing.
    """
    if cells.is_missing(value):
        return ""
    if not isinstance(value, (str, int, float)):
        raise UnusableRecord(f"{column} is no text")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    try:
        words = " ".join(str(value).split())
        words.encode()
    except ValueError:  # half of a surrogate pair, which JSON can spell, or a number of thousands of digits
        raise UnusableRecord(f"{column} is no text") from None
    return words


def required_text(value: Any, column: str) -> str:
    """Return the text of a cell that must not be empty. Raises UnusableRecord."""
    if not (words := to_text(value, column)):
        raise UnusableRecord(f"empty {column}")
    return words


def image_name(value: Any) -> str:
    """Return a path relative to the folder of images, with its spaces and dots. Raises UnusableRecord."""
    if not isinstance(value, str) or cells.is_missing(value):
        raise UnusableRecord("no image named")
    if "\0" in value:
        raise UnusableRecord("image path with a zero byte")
    required_text(value, "image path")
    path = PurePosixPath(value.strip())
    if path.is_absolute() or ".." in path.parts:
        raise UnusableRecord("image path that leaves the folder")
    return str(path)


def labels(**names: Sequence[str]) -> dict[str, dict[str, int | None]]:
    """Return the labels of a question by vocabulary: answer_type=["closed"] -> {"answer type": {"closed": 1}}.

    The vocabularies are the same in all sets: `answer type` (closed: the answer is one of few, such as yes and
    no; or open), `question type`, `organ`, `modality`, `base type`, `phrase type`.
    """
    present = {vocabulary.replace("_", " "): [name for name in own if name] for vocabulary, own in names.items()}
    return {vocabulary: dict.fromkeys(own, 1) for vocabulary, own in present.items() if own}

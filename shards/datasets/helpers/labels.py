"""Writes labels as findings, for datasets that have labels and no reports.

sentence({"Cardiomegaly": 1, "Edema": -1, "Pneumothorax": 0, "Fracture": None})
"Cardiomegaly; possible edema; no pneumothorax."
"""

import warnings
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from radhpc.core.sample import Report
from shards.datasets.reader import DatasetWarning, ReaderOptions

NO_FINDING = "No Finding"


class LabelOptions(ReaderOptions):
    """The options of a reader whose dataset has labels and no reports."""

    text: Literal["none", "labels"] = Field(
        "none", description="none: reports stay empty; labels: the findings are a list of what the labels say"
    )


def sentence(labels: Mapping[str, int | None], absent: bool = True) -> str | None:
    """Write the labels as one sentence, in their order; None where none is set.

    `absent=False` leaves out absent findings, for labels where 0 only means that nobody mentioned it. "No Finding" is
    written where it is 1; its absence adds nothing to the other labels.
    """
    phrases = []
    for name, value in labels.items():
        words = name.replace("_", " ").lower()
        if value == 1:
            phrases.append(words)
        elif name != NO_FINDING and value == -1:
            phrases.append(f"possible {words}")
        elif name != NO_FINDING and value == 0 and absent:
            phrases.append(f"no {words}")
    text = "; ".join(phrases)
    return f"{text[0].upper()}{text[1:]}." if phrases else None


def report(labels: Mapping[str, int | None], options: LabelOptions, absent: bool = True) -> Report:
    """Return the report of a study without one: empty, unless the option asks for the labels in words."""
    return Report(findings=sentence(labels, absent)) if options.text == "labels" else Report()


def warn_of_empty_reports(dataset: str, options: LabelOptions) -> None:
    """Warn that no report writing can be learnt from this dataset, unless the labels are written out."""
    if options.text == "none":
        warnings.warn(
            f"{dataset} has labels and no reports: its samples have an empty report, which trains no model to write; "
            "text=labels writes the labels out as findings, or take a dataset with reports",
            DatasetWarning,
            stacklevel=3,
        )

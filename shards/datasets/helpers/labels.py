"""What datasets of labels without reports share: how their labels may be read as a plain list of findings.

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
    """What the labels say, in their order, or None where they say nothing.

    `absent=False` leaves out what is not there: for labels where 0 means no more than that nobody mentioned it.
    "No Finding" is said where it is 1; its absence says nothing that the others do not.
    """
    said = []
    for name, value in labels.items():
        words = name.replace("_", " ").lower()
        if value == 1:
            said.append(words)
        elif name != NO_FINDING and value == -1:
            said.append(f"possible {words}")
        elif name != NO_FINDING and value == 0 and absent:
            said.append(f"no {words}")
    text = "; ".join(said)
    return f"{text[0].upper()}{text[1:]}." if said else None


def report(labels: Mapping[str, int | None], options: LabelOptions, absent: bool = True) -> Report:
    """The report of a study without one: empty, unless the user wants the labels' words."""
    return Report(findings=sentence(labels, absent)) if options.text == "labels" else Report()


def warn_of_empty_reports(dataset: str, options: LabelOptions) -> None:
    """Say that nothing can be learnt word by word from this dataset, where that is so."""
    if options.text == "none":
        warnings.warn(
            f"{dataset} has labels and no reports: its samples have an empty report, which trains no model to write; "
            "text=labels writes the labels out as findings, or take a dataset with reports",
            DatasetWarning,
            stacklevel=3,
        )

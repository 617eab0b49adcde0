"""The description of a sample: fields that an archive does not have leave no trace, wrong ones are refused by name."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from radhpc.core.sample import Sample

PLAIN: dict[str, Any] = {
    "dataset": "set", "patient": "0" * 16, "study": "1" * 16, "split": "train",
    "images": [{"view": "PA", "width": 100, "height": 80, "source_bits": 8, "window": None}],
    "report": {"findings": "Clear.", "impression": None, "other": None}, "language": "en", "labels": {},
    "question": None, "answer": None,
}  # fmt: skip
BOX = {"label": "nodule", "image": 0, "x0": 1.0, "y0": 2.5, "x1": 100.0, "y1": 80.0}
CONTEXT: dict[str, Any] = {
    "person": "a" * 16, "boxes": [{**BOX, "source": "radiologist"}], "study_rank": 1, "prior": f"set-{'2' * 16}",
    "days_since_prior": "8-30",
}  # fmt: skip


def described(**changes: Any) -> Sample:
    return Sample.model_validate_json(json.dumps({**PLAIN, **changes}))


def test_absent_fields_leave_the_bytes_as_they_were() -> None:
    assert json.loads(described().model_dump_json()) == PLAIN


def test_every_field_comes_back() -> None:
    report = {**PLAIN["report"], "indication": "Cough.", "history": "None.", "comparison": "None.", "technique": "PA."}
    sample = described(report=report, **CONTEXT)
    assert json.loads(sample.model_dump_json()) == {**PLAIN, "report": report, **CONTEXT}
    assert Sample.model_validate_json(sample.model_dump_json()) == sample
    assert sample.report.text() == "Findings: Clear."


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": [{**BOX, "image": 1}]}, "on image 1, but there are 1"),
        ({"boxes": [{**BOX, "x1": 101}]}, "beyond its image of 100 x 80 pixels"),
        ({"boxes": [{**BOX, "y1": 80.5}]}, "beyond its image"),
        ({"boxes": [{**BOX, "x0": 100}]}, "has no area"),
        ({"boxes": [{**BOX, "y0": -1}]}, "greater than or equal to 0"),
        ({"boxes": [{**BOX, "label": ""}]}, "at least 1 character"),
        ({"boxes": [{**BOX, "date": "2020"}]}, "Extra inputs are not permitted"),
        ({"study_rank": -1}, "greater than or equal to 0"),
        ({"study_rank": "first"}, "valid integer"),
        ({"prior": "set-1"}, "should match pattern"),
        ({"prior": f"set-{'1' * 16}"}, "cannot be its own"),
        ({"days_since_prior": "17"}, "Input should be"),
        ({"person": "7"}, "should match pattern"),
        ({"report": {"history": 7}}, "valid string"),
        ({"accession": "7"}, "Extra inputs are not permitted"),
    ],
)
def test_wrong_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        described(**changes)

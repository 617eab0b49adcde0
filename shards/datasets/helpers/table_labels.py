"""Reads the labels of somebody's table: from a column of labels, and from columns with CheXpert's names.

parse_labels({"Edema": 1}, record)          # {"chexpert": {"Edema": 1}}
parse_labels("nodule|mass", record)         # {"own": {"nodule": 1, "mass": 1}}; "['nodule', 'mass']" says the same
"""

from typing import Any

from radhpc.core.sample import CHEXPERT
from shards.tabular import cells
from shards.tabular.faults import UnusableRecord

VOCABULARY = "own"  # of labels that name none


def parse_labels(value: Any, record: dict[str, Any]) -> dict[str, dict[str, int | None]]:
    """Return labels by vocabulary, from the cell of a labels column and from the record. Raises UnusableRecord."""
    labels: dict[str, dict[str, int | None]] = {}
    value = cells.structure(value)
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("{"):
            raise UnusableRecord("labels that are no JSON")
        if value.startswith("["):
            raise UnusableRecord("labels that are no list")
        value = value.split("|")
    if isinstance(value, list):
        value = {name: 1 for name in map(cells.text, value) if name}
    if isinstance(value, dict) and value:
        nested = all(isinstance(inner, dict) for inner in value.values())
        plain = "chexpert" if set(value) <= set(CHEXPERT) else VOCABULARY
        for vocabulary, values in (value if nested else {plain: value}).items():
            labels[cells.spelled(vocabulary)] = {cells.spelled(name): _label(label) for name, label in values.items()}
    elif value and not cells.is_empty(value):
        raise UnusableRecord("labels that are no names")
    own = {name: _label(record[name]) for name in CHEXPERT if name in record}
    return {"chexpert": own, **labels} if own else labels


def _label(value: Any) -> int | None:
    if cells.is_empty(value):
        return None
    try:
        number = float(value.replace(",", ".") if isinstance(value, str) else value)  # a Spanish Excel writes 1,0
    except (TypeError, ValueError, OverflowError):
        raise UnusableRecord("a label other than 1, 0, -1 and empty") from None
    if number not in (1, 0, -1):
        raise UnusableRecord("a label other than 1, 0, -1 and empty")
    return int(number)

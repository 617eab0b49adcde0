"""Finds the columns of somebody's table by the letters of their usual names, or by the names that the user gives.

find_columns(rows, {"text": "Informe"})      # {"image": "Image Path", "text": "Informe", "patient": "PatientID"}
unused_columns(rows, columns)                # "column 'MRN' looks like the patient and is not used (...)"
"""

import re
import unicodedata
from collections.abc import Iterator, Mapping

from radhpc.core.errors import UserError, nearest
from shards import splits
from shards.tabular import cells, table

ALIASES: dict[str, tuple[str, ...]] = {
    "image": ("image", "images", "image_path", "image_paths", "path", "file", "file_name", "filename"),
    "text": ("text", "report", "caption"),
    "findings": ("findings",),
    "impression": ("impression",),
    "patient": ("patient", "patient_id", "subject_id", "subject"),
    "study": ("study", "study_id", "study_instance_uid"),
    "view": ("view", "view_position", "projection"),
    "split": ("split", "set", "partition", "subset", "fold"),
    "question": ("question",),
    "answer": ("answer",),
    "labels": ("labels",),
    "language": ("language",),
}
# Columns that look like one of these, by their letters without accents: they are named where they are not used.
_NUMBER = "(id|ids|uid|no|nr|num|number|nummer|numero|key|code|name|hash|index)?$"
LOOKS = {
    "patient": re.compile(
        f"(patient(en|in)?|paciente?|subject|person|participant|^case|^mrn|^pid|^ptid|medicalrecord|^nhc|^ipp|"
        f"prontuario|benhnhan){_NUMBER}"
    ),
    "study": re.compile(
        f"(study|studyinstance|exam|examen|examination|estudio|estudo|etude|accession|encounter){_NUMBER}"
    ),
    "split": re.compile(
        "(split|partition|particion|particao|conjunto|aufteilung|subset|fold|^set|trainvaltest|traintest)$"
    ),
}
NO_SPLIT = "none"  # for split=: the splits are made from the patients


def find_columns(rows: table.Table, named: Mapping[str, str | None]) -> dict[str, str]:
    """Map the names of ALIASES to the table's columns; `named`: those that the user names.

    Raises UserError that lists the columns found and expected.
    """
    by_letters = {table.letters(name): name for name in reversed(rows.columns)}
    columns = {}
    for ours, aliases in ALIASES.items():
        chosen = named.get(ours)
        if ours == "split" and chosen == NO_SPLIT and NO_SPLIT not in rows.columns:
            continue
        if chosen is not None and (ours != "language" or chosen in rows.columns):
            if chosen not in rows.columns:
                raise UserError(
                    f"{ours}={chosen}: no such column in {rows.path}{nearest(chosen, rows.columns)}; "
                    f"found are {table.listed(rows.columns)}"
                )
            if rows.header.count(chosen) > 1:
                table.refuse_repeated(rows.path, rows.header, chosen)
            columns[ours] = chosen
        elif theirs := _by_alias(rows, ours, [by_letters.get(table.letters(alias)) for alias in aliases]):
            table.refuse_repeated(rows.path, rows.header, theirs)
            columns[ours] = theirs
    has_text = bool({"text", "findings", "impression"} & columns.keys()) or {"question", "answer"} <= columns.keys()
    if "image" not in columns or not has_text:
        lacking = [name for name, present in (("image", "image" in columns), ("text", has_text)) if not present]
        raise UserError(
            f"{rows.path}: no column for {' and '.join(lacking)}; found are {table.listed(rows.columns)}; "
            f"expected {' or '.join(ALIASES['image'])} and {' or '.join(ALIASES['text'])} "
            "(or name them: image=COLUMN text=COLUMN)"
        )
    return columns


def _by_alias(rows: table.Table, ours: str, columns: list[str | None]) -> str | None:
    """Return the first of these columns; one of splits that is not called so must hold nothing but splits."""
    for column in filter(None, columns):
        if ours != "split" or table.letters(column) == ours or _holds_splits(rows, column):
            return column
    return None


def _holds_splits(rows: table.Table, column: str) -> bool:
    """Return whether all cells of a column that say something name a split."""
    any_split = False
    for record in rows.records:
        value = record.values.get(column)
        if record.fault or cells.is_empty(value):
            continue
        if str(value).strip().lower() not in splits.WORDS:
            return False
        any_split = True
    return any_split


def unused_columns(rows: table.Table, columns: Mapping[str, str]) -> Iterator[str]:
    """Yield a message on each column that looks like a patient, a study or a split, and is not used."""
    for name in rows.columns:
        plain = "".join(c for c in unicodedata.normalize("NFD", table.letters(name)) if not unicodedata.combining(c))
        role = next((role for role, look in LOOKS.items() if look.search(plain)), None)
        if role is None or name in columns.values():
            continue
        used = f"; '{columns[role]}' is" if role in columns else ""
        yield f"column '{name}' looks like the {role} and is not used{used} ({role}='{name}' uses it)"

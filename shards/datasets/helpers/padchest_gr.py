"""Reads PadChest-GR (Castro et al., 2024, arXiv:2411.05085): sentences and official splits of PadChest's studies.

grounded = read_grounded(Path("/data/padchest"), "en")
grounded.get("1200...")                 # (ImageID, "Sentences of the report.", "train"); the split may be None
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.core.sample import Split
from shards import splits
from shards.datasets.reader import DatasetWarning, UnusableRecord
from shards.tabular import cells, external_sort, identifiers, table

GROUNDED = "grounded_reports_20240819.json"
GROUNDED_SPLITS = "master_table.csv"


def read_grounded(folder: Path, language: str) -> external_sort.Lookup | None:
    """Map StudyID to PadChest-GR's (ImageID, sentences, split); None where the options do not ask for it."""
    path = table.find_one(folder, [GROUNDED])
    if language == "no":
        if path:
            _warn(f"padchest: {path.name} is there but not used; grounded=en or grounded=es takes its sentences")
        return None
    if path is None:
        raise UserError(f"padchest: grounded={language} needs {folder / GROUNDED}, which is not there")
    official = external_sort.Lookup(_read_splits(folder))

    def studies() -> Iterator[tuple[str, tuple[str, str, Split | None]]]:
        for record in table.read(path).records:
            values = record.values
            study = _identifier(values.get("StudyID"))
            findings = values.get("findings")
            sentences = [
                " ".join(cells.known(sentence).split())
                for finding in (findings if isinstance(findings, list) else [])
                if isinstance(finding, dict) and isinstance(sentence := finding.get(f"sentence_{language}"), str)
            ]
            yield study, (str(values.get("ImageID") or ""), " ".join(filter(None, sentences)), official.get(study))

    return external_sort.Lookup((study, value) for study, value in studies() if study)


def _read_splits(folder: Path) -> Iterator[tuple[str, Split]]:
    """Yield (StudyID, official split). Raises UserError where one study has two."""
    path = table.find_one(folder, [GROUNDED_SPLITS])
    if path is None:
        packed = f"; unpack {GROUNDED_SPLITS}.zip" if (folder / f"{GROUNDED_SPLITS}.zip").is_file() else ""
        _warn(f"padchest: no {GROUNDED_SPLITS} in {folder}{packed}: PadChest-GR's studies are split by patient hash")
        return
    rows = table.stream(path, ("StudyID", "split"))
    for study, words in external_sort.grouped(
        (_identifier(r.values["StudyID"]), r.values["split"]) for r in rows if not r.fault
    ):
        try:
            official = {splits.parse(word) for word in words if not cells.is_empty(word)}
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        if len(official) > 1:
            raise UserError(f"{path}: a study is in {' and '.join(sorted(official))}; allowed is one split each")
        if official:
            yield study, official.pop()


def _identifier(value: Any) -> str:
    """Return a study's identifier; empty for one that is no text, which no study of the table has."""
    try:
        return identifiers.identifier(value)
    except UnusableRecord:
        return ""


def _warn(message: str) -> None:
    warnings.warn(message, DatasetWarning, stacklevel=3)

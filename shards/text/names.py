"""Reads lists of names, and proposes names that stand alone, by a model for named entities.

    read(Path("names.tsv"))                                                # ["Kowalczyk", "Margaret"]
    load_finder(Path("/models/en_core_web_sm"))("Margaret was called")     # ["Margaret"]

The model is a folder of spaCy's, which presidio uses, too (the extra `names`). It is never needed, and nothing is
removed because a model says so: it takes many phrases that must stay for names.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError, first_line

Finder = Callable[[str], list[str]]
_PEOPLE = ("PERSON", "PER")  # of spaCy's models, by training set
_NAME = re.compile(r"[^\W\d_].*[^\W\d_]")  # begins and ends with a letter
_MOST = 100_000  # names in a list


def read(path: Path) -> list[str]:
    """Read a list of names, sorted. Raises UserError for a file that is missing, no text, or holds what is no name."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--remove-names {path}: {first_line(error)}; allowed is a UTF-8 text, one name a line"
        ) from error
    names = set()
    for number, line in enumerate(lines, 1):
        name = " ".join(line.split("\t")[0].split())
        if name and not name.startswith("#"):
            if not _NAME.fullmatch(name):
                raise UserError(
                    f"--remove-names {path}: line {number} is no name; allowed are two letters or more, "
                    "with a letter at both ends"
                )
            names.add(name)
    if not names or len(names) > _MOST:
        raise UserError(f"--remove-names {path}: {len(names)} names; allowed are 1 to {_MOST}")
    return sorted(names)


def load_finder(folder: Path) -> Finder:
    """Load a spaCy model from a folder. Raises UserError where spaCy or the model is not there, or finds no people."""
    if not (folder / "config.cfg").is_file():
        raise UserError(f"--names {folder}: no spaCy model; allowed is a folder with a config.cfg, as spaCy saves it")
    try:
        import spacy
    except ImportError as error:
        raise UserError("--names: needs spaCy, the extra `names`: make install EXTRAS=names") from error
    try:
        model: Any = spacy.load(folder)
    except Exception as error:  # spaCy's own, of many kinds
        raise UserError(f"--names {folder}: spaCy cannot load it: {first_line(error)}") from error
    labels = {label for pipe in model.pipe_names for label in getattr(model.get_pipe(pipe), "labels", ())}
    if labels.isdisjoint(_PEOPLE):
        raise UserError(f"--names {folder}: the model knows none of {', '.join(_PEOPLE)}")

    def find(text: str) -> list[str]:
        return [
            name
            for entity in model(text).ents
            if entity.label_ in _PEOPLE
            for name in map(str.strip, re.split(r"_+|\s{2,}|\n", entity.text))
            if _NAME.fullmatch(name) and any(word[0].isupper() for word in name.split())
        ]

    return find

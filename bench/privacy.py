"""Recall of the privacy gate by kind of identifier and by language, and what it takes out of phrases that must stay.

    python -m bench.privacy [--json] [--missed]

Two sets of synthetic sentences lie in bench/privacy_texts/: `open.tsv` was read while the rules were written;
`held.tsv` was written before them and its misses are never printed, so that no rule is made for a sentence of it. Each
line is a language and a sentence in which [kind:identifier] must go and {phrase} must stay. An identifier counts as
removed when none of its words of two or more letters or digits is left, words such as Hospital and de apart. One author
wrote both sets, knowing the kinds of rules: the figures rank kinds and languages, they are no estimate for an archive.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from bench.report import parser, run, show
from shards.text.deidentification import scrub

FOLDER = Path(__file__).parent / "privacy_texts"
HALVES = ("open", "held")
_GENERAL = frozenset(  # words of an identifier that tell nothing: kinds of places, titles, articles
    [
        "hospital",
        "medical",
        "center",
        "clinic",
        "rehabilitation",
        "general",
        "municipal",
        "clínica",
        "krankenhaus",
        "klinikum",
        "universitätsklinikum",
        "hôpital",
        "clinique",
        "chu",
        "bệnh",
        "viện",
        "calle",
        "dr",
        "docteur",
        "mr",
        "am",
        "an",
        "der",
        "des",
        "de",
        "del",
        "la",
        "le",
        "los",
        "las",
        "da",
        "do",
        "du",
        "das",
        "to",
        "of",
        "and",
        "from",
        "đa",
        "khoa",
        "số",
        "đường",
        "uhr",
    ]
)
_PART = re.compile(r"\[(\w+):([^\]]+)\]|\{([^}]+)\}")


class Sentence(NamedTuple):
    """A sentence, the identifiers in it (kind, words), and the phrases that must stay."""

    language: str
    text: str
    identifiers: list[tuple[str, str]]
    stays: list[str]


class Score(NamedTuple):
    """Counts by kind and language."""

    total: Counter[tuple[str, str]]
    removed: Counter[tuple[str, str]]
    stays: int
    missed: list[str]
    broken: list[str]


def sentences(half: str) -> list[Sentence]:
    """Read one of the two sets."""
    result = []
    for line in (FOLDER / f"{half}.tsv").read_text(encoding="utf-8").splitlines():
        language, marked = line.split("\t")
        identifiers = [(match[1], match[2]) for match in _PART.finditer(marked) if match[1]]
        stays = [match[3] for match in _PART.finditer(marked) if match[3]]
        text = _PART.sub(lambda match: match[2] or match[3], marked)
        result.append(Sentence(language, text, identifiers, stays))
    return result


def left(identifier: str, text: str) -> bool:
    """Return whether a word of the identifier is still in the text."""
    words = [word for word in re.findall(r"\w+", identifier) if len(word) > 1 and word.lower() not in _GENERAL]
    return any(re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) for word in words or [identifier])


def score(half: str) -> Score:
    """Scrub all sentences of a set."""
    result = Score(Counter(), Counter(), sum(len(sentence.stays) for sentence in sentences(half)), [], [])
    for language, text, identifiers, stays in sentences(half):
        clean = scrub(text)[0]
        for kind, identifier in identifiers:
            result.total[kind, language] += 1
            if left(identifier, clean):
                result.missed.append(f"{language} {kind}: {identifier} in: {clean}")
            else:
                result.removed[kind, language] += 1
        result.broken.extend(f"{language} {phrase} in: {clean}" for phrase in stays if phrase not in clean)
    return result


def main() -> None:
    options = parser("privacy", __doc__, "the same: it takes a second")
    options.add_argument("--missed", action="store_true", help="print what is missed in the open half")
    arguments = options.parse_args()
    scores = {half: score(half) for half in HALVES}
    ratios, figures = dict[str, float](), dict[str, float]()
    for half, result in scores.items():
        ratios[f"recall, {half} half"] = sum(result.removed.values()) / sum(result.total.values())
        ratios[f"must stay and did not, {half} half, of {result.stays}"] = len(result.broken)
    for position in (0, 1):
        for name in sorted({key[position] for result in scores.values() for key in result.total}):
            for half, result in scores.items():
                for column, counts in ((f"{half}: removed", result.removed), (f"{half}: of", result.total)):
                    figures[f"{name}/{column}"] = sum(count for key, count in counts.items() if key[position] == name)
    if arguments.missed:
        for line in (*scores["open"].missed, *scores["open"].broken):
            print(line)
    show("Recall of the privacy gate", ratios, figures, "", arguments.json)


if __name__ == "__main__":
    run(main)

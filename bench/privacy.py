"""Recall of the privacy gate by kind of identifier and by language, and what it takes out of phrases that must stay.

    python -m bench.privacy [--json] [--missed] [--presidio VENV/bin/python --model NAME] [--before COMMIT]

Two sets of synthetic sentences lie in bench/privacy_texts/. `open.tsv` was read while the rules were written.
`held.tsv` was written before them, or before they were widened, and its misses are never printed, so that no rule is
made for a sentence of it. Each line is a language and a sentence in which [kind:identifier] must go and {phrase} must
stay. An identifier counts as removed when none of its words of two or more letters or digits is left, words such as
Hospital and de apart. Whoever wrote the sentences knew the kinds of rules: the figures rank kinds and languages, they
are no estimate for an archive.

--presidio scores presidio-analyzer beside it, in an environment of its own, with the spaCy model that is named (for all
languages). --before compares the CPU time of the rules with those of a commit, in turns, on the real reports of Open-i
and of PadChest that come with torchxrayvision. The share of drawn texts that are noticed in pixels is measured on
phantoms.
"""

import csv
import gzip
import importlib.util
import io
import json
import re
import subprocess
import sys
import tarfile
import types
import xml.etree.ElementTree
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bench.report import interleaved, parser, run, show
from radhpc.core import sample
from radhpc.core.errors import UserError
from shards.datasets import phantom
from shards.images.text_in_pixels import find_text
from shards.text.deidentification import scrub

FOLDER = Path(__file__).parent / "privacy_texts"
HALVES = ("open", "held")
# Words of an identifier that tell nothing: kinds of places, titles, articles.
_GENERAL_WORDS = (
    "hospital medical center centre clinic rehabilitation general community municipal comarcal regional provincial"
    " clínica universitario hospitalier santa casa krankenhaus klinikum universitätsklinikum hôpital clinique chu bệnh"
    " viện calle dr docteur mr am an der des de del la le los las da do du das to of and from đa khoa số đường uhr"
)
_GENERAL = frozenset(_GENERAL_WORDS.split())
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


def score(half: str, clean: Callable[[list[Sentence]], list[str]]) -> Score:
    """Scrub all sentences of a set, and count."""
    marked = sentences(half)
    result = Score(Counter(), Counter(), sum(len(sentence.stays) for sentence in marked), [], [])
    for (language, _, identifiers, stays), text in zip(marked, clean(marked), strict=True):
        for kind, identifier in identifiers:
            result.total[kind, language] += 1
            if left(identifier, text):
                result.missed.append(f"{language} {kind}: {identifier} in: {text}")
            else:
                result.removed[kind, language] += 1
        result.broken.extend(f"{language} {phrase} in: {text}" for phrase in stays if phrase not in text)
    return result


def rules(marked: list[Sentence]) -> list[str]:
    """Return the sentences as the privacy gate leaves them."""
    return [scrub(sentence.text)[0] for sentence in marked]


PRESIDIO = Path(__file__).parent / "privacy_texts" / "presidio_peer.py"


def presidio(python: str, model: str, marked: list[Sentence]) -> list[str]:
    """Return the sentences as presidio leaves them, in the environment of `python`."""
    texts = json.dumps([sentence.text for sentence in marked])
    try:
        done = subprocess.run([python, str(PRESIDIO), model], input=texts, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--presidio {python} --model {model}: {getattr(error, 'stderr', error)}"[:400]) from error
    cleaned: list[str] = json.loads(done.stdout.splitlines()[-1])
    return cleaned


def earlier_rules(commit: str) -> Callable[[str], object]:
    """Return `scrub` of the rules of a commit in which they were one file, shards/privacy.py."""
    shown = subprocess.run(["git", "show", f"{commit}:shards/privacy.py"], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise UserError(f"--before {commit}: {shown.stderr.strip()}; allowed is a commit with shards/privacy.py")
    module = types.ModuleType("earlier_privacy")
    sys.modules |= {"radhpc.sample": sample, module.__name__: module}  # where that commit has the sample
    exec(compile(shown.stdout, "shards/privacy.py", "exec"), module.__dict__)
    scrub_before: Callable[[str], object] = module.__dict__["scrub"]
    return scrub_before


def real_reports() -> dict[str, list[str]]:
    """Return the reports of Open-i and every fortieth of PadChest, from the torchxrayvision package."""
    package = importlib.util.find_spec("torchxrayvision")
    if package is None or not package.submodule_search_locations:
        raise UserError("--before: needs torchxrayvision, whose reports are measured")
    folder = Path(package.submodule_search_locations[0]) / "data"
    openi, padchest = [], []
    with tarfile.open(folder / "NLMCXR_reports.tgz") as archive:
        for member in archive:
            if member.name.endswith(".xml") and (file := archive.extractfile(member)):
                sections = xml.etree.ElementTree.parse(file).iter("AbstractText")
                openi.append("\n".join(section.text or "" for section in sections))
    with gzip.open(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv.gz", "rt", newline="") as table:
        padchest = [row["Report"] for number, row in enumerate(csv.DictReader(table)) if number % 40 == 0]
    return {"Open-i": openi, "PadChest": padchest}


def cost(commit: str, rounds: int) -> tuple[dict[str, float], dict[str, float]]:
    """Return the CPU time of the rules as a ratio to that of a commit's, and in microseconds per text."""
    before = earlier_rules(commit)
    ratios, figures = {}, {}
    for name, texts in real_reports().items():
        seconds = interleaved(
            {
                "before": lambda texts=texts: list(map(before, texts)),
                "now": lambda texts=texts: list(map(scrub, texts)),
            },  # type: ignore[misc]
            rounds,
        )
        ratios[f"CPU time of the rules / those of {commit}, {name}"] = seconds["now"] / seconds["before"]
        figures[f"CPU microseconds per text, {name}"] = 1e6 * seconds["now"] / len(texts)
    return ratios, figures


WRITTEN = ("MEIER ANNA 1951", "12.03.2019 14:35", "ID 0048213-7", "St. Olaf Hospital")
SIZES = (8, 10, 12, 16, 24, 40, 64, 96)  # pixels


def pixels(images: int) -> dict[str, float]:
    """Return the share of texts drawn into corners of phantoms that are noticed, by size, and the false alarms."""
    shown: dict[str, float] = {}
    pictures = []
    for seed in range(images):
        drawn = phantom.Picture(0, seed, "PA", 1024)().pixels.astype(np.float64) / 16
        grain = np.random.default_rng(seed).normal(0, 4, drawn.shape)
        pictures.append(Image.fromarray(np.clip(drawn + grain, 0, 255).astype(np.uint8)))
    for size in SIZES:
        for name, (ink, paper) in {"white on black": (255, 0), "gray on dark": (140, 20)}.items():
            noticed = [
                bool(find_text(_written(picture, text, size, corner, ink, paper)))
                for picture in pictures
                for corner, text in enumerate(WRITTEN)
            ]
            shown[f"text of {size} pixels/noticed, {name}"] = sum(noticed) / len(noticed)
    shown["phantoms without text that are suspected"] = sum(bool(find_text(np.asarray(one))) for one in pictures)
    return shown


def _written(
    picture: Image.Image, text: str, size: int, corner: int, ink: int, paper: int
) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Write a text on a box of `paper` into a corner (0 to 3), and store it as a JPEG."""
    copy, font = picture.copy(), ImageFont.load_default(size)
    draw = ImageDraw.Draw(copy)
    box = draw.textbbox((0, 0), text, font)
    x, y = (6 if corner % 2 else copy.width - box[2] - 8), (6 if corner // 2 else copy.height - box[3] - 8)
    draw.rectangle((x + box[0] - 4, y + box[1] - 4, x + box[2] + 4, y + box[3] + 4), fill=paper)
    draw.text((x, y), text, ink, font)
    buffer = io.BytesIO()
    copy.save(buffer, "JPEG", quality=95)
    return np.asarray(Image.open(buffer))


def main() -> None:
    options = parser("privacy", __doc__, "fewer rounds and phantoms")
    options.add_argument("--missed", action="store_true", help="print what is missed in the open half")
    options.add_argument("--presidio", metavar="PYTHON", help="of an environment that has presidio-analyzer")
    options.add_argument("--model", default="en_core_web_sm", help="spaCy's, for presidio")
    options.add_argument("--before", metavar="COMMIT", help="compare the CPU time with the rules of this commit")
    arguments = options.parse_args()
    gates: dict[str, Callable[[list[Sentence]], list[str]]] = {"rules": rules}
    if arguments.presidio:
        gates["presidio"] = lambda marked: presidio(arguments.presidio, arguments.model, marked)
    scores = {(gate, half): score(half, clean) for gate, clean in gates.items() for half in HALVES}
    ratios, figures = dict[str, float](), dict[str, float]()
    for (gate, half), result in scores.items():
        ratios[f"recall, {gate}, {half} half"] = sum(result.removed.values()) / sum(result.total.values())
        figures[f"phrases that must stay/{half} half: of"] = result.stays
        figures[f"phrases that must stay/{half} half: removed by {gate}"] = len(result.broken)
    for position in (0, 1):
        for name in sorted({key[position] for result in scores.values() for key in result.total}):
            for half in HALVES:
                columns = {"of": scores["rules", half].total}
                columns |= {f"removed by {gate}": scores[gate, half].removed for gate in gates}
                for column, counts in columns.items():
                    total = sum(count for key, count in counts.items() if key[position] == name)
                    figures[f"{name}/{half} half: {column}"] = total
    if arguments.before:
        for into, measured in zip((ratios, figures), cost(arguments.before, 2 if arguments.quick else 5), strict=True):
            into.update(measured)
    figures |= pixels(2 if arguments.quick else 12)
    if arguments.missed:
        for line in (*scores["rules", "open"].missed, *scores["rules", "open"].broken):
            print(line)
    show("Recall of the privacy gate", ratios, figures, "", arguments.json)


if __name__ == "__main__":
    run(main)

"""Writes an evaluation as one page: scores, baselines, a bar per finding, the worst and the best cases with images.

    write(run / "evaluation/step-000430-test", held_out)      # -> report.html beside scores.json and reports.jsonl

Enters: what evaluate.py wrote, and the held-out studies for their images. Leaves: one HTML file without any script,
which opens without a network and loads nothing. It shows patients' data: only its owner may read it.
"""

import base64
import difflib
import html
import io
import re
import string
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from radhpc.core.files import read_json, read_lines, write_atomically
from radhpc.data.source import BadSample, Source
from radhpc.evaluation.metrics import findings, text

CASES = 8  # of the worst, and of the best
SIDE = 480  # pixels: the longer side of an image on the page
VIEWS = 3  # of a study
PER_FINDING = ("f1", "auroc", "auprc")  # what the names of such scores end with, before the finding's own

PAGE = "report.html"


def write(folder: Path, held_out: Source, cases: int = CASES) -> Path:
    """Write the page of a finished evaluation, and return its path."""
    scores, rows = read_json(folder / "scores.json"), list(read_lines(folder / "reports.jsonl"))
    ordered = sorted(rows, key=lambda row: (*_agreement(row), str(row["key"])))
    worst, best = ordered[:cases], ordered[cases:][::-1][:cases]
    pictures = _pictures(held_out, [row["key"] for row in (*worst, *best)])
    template = string.Template((files("radhpc.evaluation") / "report_page.html").read_text(encoding="utf-8"))
    known = any(drawn(row) is not None for row in rows)
    page = template.substitute(
        title=html.escape(f"Step {scores['step']}, split {scores['split']}"),
        about=_about(folder, scores),
        table=table(scores),
        bars="".join(bars(scores)),
        order="By agreement of the findings, then of the words." if known else "By agreement of the words (F1).",
        worst_count=len(worst),
        best_count=len(best),
        worst="".join(_case(row, pictures.get(row["key"], []), known) for row in worst),
        best="".join(_case(row, pictures.get(row["key"], []), known) for row in best),
    )
    write_atomically(folder / PAGE, page.encode(), 0o600)
    return folder / PAGE


def drawn(row: Mapping[str, Any]) -> set[str] | None:
    """Return the findings that a study is known to have and a rule can read back from a text: those of a phantom."""
    if "labels" not in row:
        return None if row.get("findings") is None else set(row["findings"])
    known = row["labels"].get("phantom")
    return None if known is None else {name for name, value in known.items() if value == 1}


def _agreement(row: Mapping[str, Any]) -> tuple[float, float]:
    """Return how well a case agrees with its reference: by its findings, if they are known, and by its words."""
    known = drawn(row)
    return (
        0.0 if known is None else _overlap(findings.read(row["generated"]), known),
        text.token_f1(row["generated"], row["reference"]),
    )


def _overlap(predicted: set[str], expected: set[str]) -> float:
    predicted, expected = predicted or {findings.NORMAL}, expected or {findings.NORMAL}
    return 2 * len(predicted & expected) / (len(predicted) + len(expected))


def _about(folder: Path, scores: Mapping[str, Any]) -> str:
    left_out = scores.get("left_out") or []
    about = f"{folder.parent.parent.name}: {scores['samples']} studies"
    if left_out:
        about += f"; {len(left_out)} could not be read and are left out: {', '.join(left_out[:5])}"
    return html.escape(about)


def table(scores: Mapping[str, Any]) -> str:
    """Return the scores that belong to no group, beside the baselines; those that beat no baseline are marked."""
    baselines = scores.get("baselines") or {}
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in baselines)
    lines = [f'<tr><th>score</th><th class="number">model</th><th>95% interval</th>{head}<th>convention</th></tr>']
    for name, score in scores["scores"].items():
        if _group(name) is not None:
            continue
        value = score.get("value")
        others = [values.get(name, {}).get("value") for values in baselines.values()]
        beaten = value is not None and any(other is not None and _not_better(name, value, other) for other in others)
        cells = "".join(f'<td class="number">{_number(other)}</td>' for other in others)
        limits = "" if score.get("low") is None else f"{_number(score['low'])} to {_number(score['high'])}"
        convention = score.get("convention") or score.get("weights") or ""
        mark = ' class="number below" title="no better than a baseline"' if beaten else ' class="number"'
        lines.append(
            f'<tr><td>{html.escape(name)}</td><td{mark}>{_number(value)}</td><td class="limits">{limits}</td>{cells}'
            f'<td class="quiet">{html.escape(str(convention))}</td></tr>'
        )
    notes = "".join(
        f'<p class="quiet">{html.escape(name)}: not scored: {html.escape(str(why))}</p>'
        for name, why in (scores.get("missing") or {}).items()
    )
    return f"<table>{''.join(lines)}</table>{notes}{_compared(scores.get('comparison'))}"


def _compared(comparison: Mapping[str, Any] | None) -> str:
    """Return the paired test against another run as HTML."""
    if not comparison:
        return ""
    lines = ['<tr><th>score</th><th class="number">difference</th><th>95% interval</th><th class="number">p</th></tr>']
    for name, entry in comparison["scores"].items():
        limits = f"{entry['low']:+.3f} to {entry['high']:+.3f}"
        lines.append(
            f'<tr><td>{html.escape(name)}</td><td class="number">{entry["difference"]:+.3f}</td><td>{limits}</td>'
            f'<td class="number">{entry["p"]:.3f}</td></tr>'
        )
    about = f"{comparison['test']}, {comparison['samples']} studies"
    return (
        f"<h2>Against {html.escape(str(comparison['against']))}</h2>"
        f'<p class="quiet">{html.escape(about)}</p><table>{"".join(lines)}</table>'
    )


def _group(name: str) -> str | None:
    """Return the group of a score per finding, such as findings_f1 of "findings_f1/cardiomegaly"; else None."""
    group, slash, _ = name.partition("/")
    return group if slash and group.rpartition("_")[2] in PER_FINDING else None


def _not_better(name: str, value: float, other: float) -> bool:
    lower_is_better = name == "loss" or "radcliq" in name.lower()
    return value >= other if lower_is_better else value <= other


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def bars(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield for each group of scores, such as findings_f1/NAME, a bar per name with interval and best baseline."""
    groups: dict[str, list[str]] = {}
    for name, score in scores["scores"].items():
        group = _group(name)
        if group is not None and isinstance(score.get("value"), int | float):
            groups.setdefault(group, []).append(name)
    for group, names in groups.items():
        lines = []
        for name in names:
            score = scores["scores"][name]
            others = [values.get(name, {}).get("value") for values in (scores.get("baselines") or {}).values()]
            best = max((other for other in others if other is not None), default=None)
            drawn = f'<span style="width:{_percent(score["value"])}"></span>'
            if score.get("low") is not None:
                width = _percent(score["high"] - score["low"])
                drawn += f'<b style="left:{_percent(score["low"])};width:{width}"></b>'
            if best is not None:
                drawn += f'<i style="left:{_percent(best)}" title="best baseline {best:.3f}"></i>'
            label = html.escape(name.partition("/")[2])
            lines.append(f'<div>{label}</div><div class="bar">{drawn}</div><div>{_number(score["value"])}</div>')
        convention = scores["scores"][names[0]].get("convention") or ""
        yield (
            f'<h2>{html.escape(group)}</h2><p class="quiet">{html.escape(str(convention))}. The line is '
            f'the 95% interval, the mark the best baseline.</p><div class="bars">{"".join(lines)}</div>'
        )


def _percent(share: float) -> str:
    return f"{100 * min(1.0, max(0.0, share)):.1f}%"


def _case(row: Mapping[str, Any], pictures: Sequence[str], known: bool) -> str:
    reference, generated = marked(row["reference"], row["generated"])
    head = [f"<span>{html.escape(str(row['key']))}</span>"]
    head.append(f"<span>words {text.token_f1(row['generated'], row['reference']):.2f}</span>")
    if row.get("question"):
        head.append(f"<span>{html.escape(row['question'])}</span>")
    if known and (expected := drawn(row)) is not None:
        predicted = findings.read(row["generated"])
        groups = {"right": predicted & expected, "missed": expected - predicted, "invented": predicted - expected}
        for kind, names in groups.items():
            head += [f'<span class="chip {kind}">{kind}: {html.escape(name)}</span>' for name in sorted(names)]
    images = "".join(f'<img alt="view" src="{picture}">' for picture in pictures)
    return (
        f'<div class="case"><div class="head">{"".join(head)}</div><div>{images or "(no image)"}</div>'
        f"<div><h3>Reference</h3><p>{reference}</p></div><div><h3>Generated</h3><p>{generated}</p></div></div>"
    )


def marked(reference: str, generated: str) -> tuple[str, str]:
    """Return both texts as HTML: words missing from the second within <del>, words new in it within <ins>.

    Words are compared without case and punctuation.
    """
    left, right = _pieces(reference), _pieces(generated)
    matcher = difflib.SequenceMatcher(None, [_bare(w) for w in left], [_bare(w) for w in right], autojunk=False)
    gone: list[str] = []
    new: list[str] = []
    for kind, a, b, c, d in matcher.get_opcodes():
        gone.append(_wrapped(left[a:b], "del" if kind != "equal" else ""))
        new.append(_wrapped(right[c:d], "ins" if kind != "equal" else ""))
    return " ".join(filter(None, gone)), " ".join(filter(None, new)) or "(nothing)"


def _pieces(words: str) -> list[str]:
    return words.split()


def _bare(word: str) -> str:
    return re.sub(r"\W+", "", word.lower()) or word


def _wrapped(words: Iterable[str], tag: str) -> str:
    joined = html.escape(" ".join(words))
    return f"<{tag}>{joined}</{tag}>" if tag and joined else joined


def _pictures(held_out: Source, keys: Sequence[str]) -> dict[str, list[str]]:
    """Return the images of these studies as data URLs; a study that cannot be read has none."""
    requested = set(keys)
    every = held_out.keys(np.arange(len(held_out)))
    result = {}
    for number, key in enumerate(every):
        if key in requested:
            try:
                _, _, views = held_out.read(number)
            except BadSample:
                continue
            result[key] = [data_url(view) for view in views[:VIEWS]]
    return result


def data_url(view: Image.Image, side: int = SIDE) -> str:
    """Return a picture, shrunk to `side` pixels, as a JPEG in a data URL."""
    small = view if view.mode in ("L", "RGB") else view.convert("RGB")
    if max(small.size) > side:
        factor = side / max(small.size)
        small = small.resize((max(1, round(small.width * factor)), max(1, round(small.height * factor))))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

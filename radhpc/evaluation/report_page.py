"""An evaluation as one page: scores beside baselines, a bar for each finding, the worst and the best cases with images.

    write(run / "evaluation/step-000430-test", held_out)      # -> report.html beside scores.json and reports.jsonl

Enters: what evaluate.py wrote, and the held-out studies for their images. Leaves: one HTML file without any script,
which opens without a network and loads nothing. It shows patients' data, so that only its owner may read it.
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
    """Write the page of an evaluation that is there, and return its path."""
    scores, rows = read_json(folder / "scores.json"), list(read_lines(folder / "reports.jsonl"))
    ordered = sorted(rows, key=lambda row: (*_worth(row), str(row["key"])))
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
    """The findings that a study is known to have, where a rule can read them back from a text: those of a phantom."""
    if "labels" not in row:
        return None if row.get("findings") is None else set(row["findings"])
    known = row["labels"].get("phantom")
    return None if known is None else {name for name, value in known.items() if value == 1}


def _worth(row: Mapping[str, Any]) -> tuple[float, float]:
    """How much of a case is right: of its findings, where they are known, and of its words."""
    known = drawn(row)
    return (
        0.0 if known is None else _overlap(findings.read(row["generated"]), known),
        text.token_f1(row["generated"], row["reference"]),
    )


def _overlap(mine: set[str], wanted: set[str]) -> float:
    mine, wanted = mine or {findings.NORMAL}, wanted or {findings.NORMAL}
    return 2 * len(mine & wanted) / (len(mine) + len(wanted))


def _about(folder: Path, scores: Mapping[str, Any]) -> str:
    left_out = scores.get("left_out") or []
    told = f"{folder.parent.parent.name}: {scores['samples']} studies"
    if left_out:
        told += f"; {len(left_out)} could not be read and are left out: {', '.join(left_out[:5])}"
    return html.escape(told)


def table(scores: Mapping[str, Any]) -> str:
    """The scores that are no part of a group, beside the baselines; what does not beat the best of them is marked."""
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
    said = "".join(
        f'<p class="quiet">{html.escape(name)}: not scored: {html.escape(str(why))}</p>'
        for name, why in (scores.get("missing") or {}).items()
    )
    return f"<table>{''.join(lines)}</table>{said}{_compared(scores.get('comparison'))}"


def _compared(comparison: Mapping[str, Any] | None) -> str:
    """The paired test against another run."""
    if not comparison:
        return ""
    lines = ['<tr><th>score</th><th class="number">difference</th><th>95% interval</th><th class="number">p</th></tr>']
    for name, found in comparison["scores"].items():
        limits = f"{found['low']:+.3f} to {found['high']:+.3f}"
        lines.append(
            f'<tr><td>{html.escape(name)}</td><td class="number">{found["difference"]:+.3f}</td><td>{limits}</td>'
            f'<td class="number">{found["p"]:.3f}</td></tr>'
        )
    about = f"{comparison['test']}, {comparison['samples']} studies"
    return (
        f"<h2>Against {html.escape(str(comparison['against']))}</h2>"
        f'<p class="quiet">{html.escape(about)}</p><table>{"".join(lines)}</table>'
    )


def _group(name: str) -> str | None:
    """findings_f1 of "findings_f1/cardiomegaly": what is measured for each finding; None of a score by itself."""
    group, slash, _ = name.partition("/")
    return group if slash and group.rpartition("_")[2] in PER_FINDING else None


def _not_better(name: str, value: float, other: float) -> bool:
    lower_is_better = name == "loss" or "radcliq" in name.lower()
    return value >= other if lower_is_better else value <= other


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else ""


def bars(scores: Mapping[str, Any]) -> Iterator[str]:
    """For each group of scores, such as findings_f1/NAME, a bar per name: interval and best baseline on it."""
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
    if known and (wanted := drawn(row)) is not None:
        mine = findings.read(row["generated"])
        for kind, names in (("right", mine & wanted), ("missed", wanted - mine), ("invented", mine - wanted)):
            head += [f'<span class="chip {kind}">{kind}: {html.escape(name)}</span>' for name in sorted(names)]
    images = "".join(f'<img alt="view" src="{picture}">' for picture in pictures)
    return (
        f'<div class="case"><div class="head">{"".join(head)}</div><div>{images or "(no image)"}</div>'
        f"<div><h3>Reference</h3><p>{reference}</p></div><div><h3>Generated</h3><p>{generated}</p></div></div>"
    )


def marked(reference: str, generated: str) -> tuple[str, str]:
    """Both texts as HTML: in the first what is left out of the second within <del>, in the second what is new in <ins>.

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
    """The images of these studies as data URLs; a study that cannot be read has none."""
    wanted = set(keys)
    every = held_out.keys(np.arange(len(held_out)))
    found = {}
    for number, key in enumerate(every):
        if key in wanted:
            try:
                _, _, views = held_out.read(number)
            except BadSample:
                continue
            found[key] = [data_url(view) for view in views[:VIEWS]]
    return found


def data_url(view: Image.Image, side: int = SIDE) -> str:
    """A picture, shrunk to `side` pixels, as a JPEG within the page."""
    small = view if view.mode in ("L", "RGB") else view.convert("RGB")
    if max(small.size) > side:
        factor = side / max(small.size)
        small = small.resize((max(1, round(small.width * factor)), max(1, round(small.height * factor))))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"

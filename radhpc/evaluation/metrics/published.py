"""Sets published scores (published.yaml) beside one's own: comparable, or flagged with the reason why not.

    for line in lines(scores, {"mimic_cxr_jpg"}, "test"): print(line)

A row is comparable if its test set is the evaluated one and its convention is among those scored; then it stands beside
the score of the same name. All other rows of the same data are listed separately, as not comparable.
"""

import functools
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

import yaml

from radhpc.evaluation.metrics.conventions import CONVENTIONS

FILE = files("radhpc.evaluation.metrics") / "published.yaml"


@functools.cache
def rows() -> tuple[dict[str, Any], ...]:
    """Return all published rows, as the file has them."""
    return tuple(yaml.safe_load(FILE.read_text(encoding="utf-8")))


def why_not(row: Mapping[str, Any], scores: Mapping[str, Any], datasets: set[str], split: str) -> str | None:
    """Return why a row cannot be compared with these scores; None if it can."""
    if row["dataset"] is None:
        return f"another test set: {row['test_set']}"
    if not any(name.startswith(row["dataset"]) for name in datasets):
        return f"another test set: {row['dataset']}"
    if len(datasets) > 1:
        return f"{row['dataset']} alone there, {len(datasets)} data sets here"
    if row.get("split", "test") != split:
        return f"of split '{row.get('split', 'test')}'"
    if row["convention"] is None:
        return "its convention is not stated"
    if not any(f"{row['convention']}/{kind}" in scores for kind in row["scores"]):
        return f"its convention, {row['convention']}, was not scored here"
    return None


def lines(scores: Mapping[str, Any], datasets: set[str], split: str) -> Iterator[str]:
    """Yield the comparison as Markdown; nothing if nothing is published on this data."""
    known = [(row, why_not(row, scores, datasets, split)) for row in rows()]
    comparable = [row for row, why in known if why is None]
    flagged = [(row, why) for row, why in known if why is not None and not why.startswith("another test set")]
    if comparable:
        yield from (
            "",
            f"Published by the same convention on split '{split}' of this data set (see that sections agree):",
            "",
        )
        yield from ("| system | score | published | here | source |", "|---|---|---|---|---|")
        for row in comparable:
            assert row["convention"] in CONVENTIONS
            for kind, value in row["scores"].items():
                name = f"{row['convention']}/{kind}"
                if name in scores:
                    ours = f"{scores[name]['value']:.3f}"
                    about = f"{row['source']}; {' and '.join(row['sections'])}"
                    yield f"| {row['system']} | {name} | {value:.3f} | {ours} | {about} |"
    if flagged:
        yield from ("", "Published on this data, not comparable:", "")
        for row, why in flagged:
            printed = ", ".join(f"{kind} {value:.3f}" for kind, value in row["scores"].items())
            yield f"- {row['system']}: {printed} ({row['source']}): {why}"

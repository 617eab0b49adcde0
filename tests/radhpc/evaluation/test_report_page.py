"""The page of an evaluation: what is marked, what is ordered, and that a text is text."""

import json
from pathlib import Path

import pytest

from radhpc.data.source import Source
from radhpc.evaluation.report_page import bars, marked, table, write


def test_differences_are_marked() -> None:
    reference, generated = marked("No effusion. The heart is large.", "No effusion. The heart is normal in size.")
    assert reference == "No effusion. The heart is <del>large.</del>"
    assert generated == "No effusion. The heart is <ins>normal in size.</ins>"
    assert marked("Same words.", "same words") == ("Same words.", "same words")
    assert marked("a", "") == ("<del>a</del>", "(nothing)")
    assert marked("<b>5 > 3</b>", "x")[0] == "<del>&lt;b&gt;5 &gt; 3&lt;/b&gt;</del>"


def score(value: float, low: float | None = None, high: float | None = None) -> dict[str, object]:
    return {"value": value, "low": low, "high": high, "convention": "as <it> is"}


@pytest.fixture
def folder(tmp_path: Path, phantom_shards: Path) -> Path:
    """An evaluation of five studies: two read well, two badly, one with a text that would be a script."""
    from radhpc.evaluation.metrics import findings

    source, rows = Source((str(phantom_shards),), "train"), []
    for number in range(5):
        key, sample, _ = source.read(number)
        text = sample.report.text()
        generated = {0: text, 1: text, 4: "<script>alert(1)</script>"}.get(number, "Nothing of this is true.")
        rows.append({"key": key, "reference": text, "generated": generated, "labels": sample.labels, "question": None})
    assert findings.read(rows[0]["reference"]) == {n for n, v in rows[0]["labels"]["phantom"].items() if v == 1}
    (tmp_path / "reports.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores = {
        "step": 7,
        "split": "validate",
        "samples": 5,
        "left_out": ["phantom-broken"],
        "scores": {
            "loss": score(1.5),
            "token_f1": score(0.4, 0.3, 0.5),
            "r2gen_mimic/cider": score(3.1),
            "findings_f1/effusion left": score(0.25, 0.1, 0.4),
        },
        "baselines": {"constant": {"token_f1": score(0.6), "findings_f1/effusion left": score(0.5)}},
        "missing": {"chexbert_f1": "put the weights there"},
        "comparison": {
            "against": "other",
            "test": "paired bootstrap",
            "samples": 5,
            "scores": {"token_f1": {"difference": -0.1, "low": -0.2, "high": 0.01, "p": 0.07}},
        },
    }
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    return tmp_path


def test_the_page_tells_all(folder: Path, phantom_shards: Path) -> None:
    path = write(folder, Source((str(phantom_shards),), "train"), cases=2)
    page = path.read_text()
    assert (path.stat().st_mode & 0o077) == 0
    for wanted in ("Step 7, split validate", "phantom-broken", "put the weights there", "paired bootstrap", "-0.100"):
        assert wanted in page, wanted
    assert "<script" not in page
    worst, best = page.split("The best 2")
    rows = [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]
    assert all(rows[n]["key"] in best for n in (0, 1)), "those that are right are not the best"
    assert all(rows[n]["key"] not in worst for n in (0, 1))
    assert page.count("data:image/jpeg;base64,") >= 4


def test_scores_stand_where_they_belong(folder: Path) -> None:
    scores = json.loads((folder / "scores.json").read_text())
    found = table(scores)
    assert "r2gen_mimic/cider" in found, "it may be above one: no bar"
    assert "effusion" not in found
    assert found.count("no better than a baseline") == 1
    (group,) = bars(scores)
    assert "width:25.0%" in group
    assert "left:50.0%" in group
    assert "as &lt;it&gt; is" in group

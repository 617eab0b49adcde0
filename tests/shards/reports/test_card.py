"""The summary counts exactly and adds up; the card and the contact sheet say what was counted, and no more."""

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from radhpc.core.manifest import Manifest, SampleIndex
from radhpc.core.sample import CHEXPERT, SPLITS, Report, Sample, View
from radhpc.storage.store import Store
from shards.build import BuildSettings, build
from shards.reports.card import render_card
from shards.reports.contact_sheet import choose_samples, contact_sheet
from shards.summary import LONGEST, Summary, percentile

pytestmark = pytest.mark.timeout(60)

VIEWS = (View(view="PA", width=900, height=1000, source_bits=12), View(width=256, height=20))
STUDY = Sample(
    dataset="own",
    patient="0" * 16,
    study="1" * 16,
    split="train",
    images=VIEWS,
    report=Report(findings="Clear lungs on both sides.", impression="Normal."),
    language="es",
    labels={"chexpert": {"Edema": 1, "Fracture": None, "Pneumonia": -1}, "own": {"scar": 0}},
)
ASKED = STUDY.model_copy(
    update={
        "split": "test",
        "report": Report(),
        "labels": {},
        "images": VIEWS[:1],
        "question": "Where?",
        "answer": "left lung",
    }
)


def test_one_sample_is_counted() -> None:
    summary = Summary.of(STUDY, {"date": 2})
    train = summary.splits["train"]
    assert (train.samples, train.images, train.without_report) == (1, 2, 0)
    assert train.labels["chexpert"]["Edema"] == {"1": 1, "0": 0, "-1": 0, "null": 0}
    assert train.labels["chexpert"]["Fracture"]["null"] == train.labels["chexpert"]["Pneumonia"]["-1"] == 1
    assert train.labels["own"]["scar"]["0"] == 1
    assert train.views == {"PA": 1, "unnamed": 1}
    assert train.images_per_study == {2: 1}
    assert train.languages == {"es": 1}
    assert train.words == {"findings": {5: 1}, "impression": {1: 1}}
    assert train.bits == {12: 1, 8: 1}
    assert train.sides == {1024: 1, 256: 1}
    assert (summary.scrubbed, summary.scrubbed_samples) == ({"date": 2}, 1)
    assert summary.splits["test"].samples == 0


def test_a_question_has_no_report_and_long_texts_are_counted_as_long() -> None:
    long = ASKED.model_copy(update={"answer": "word " * 5000})
    part = Summary.of(long, {}).splits["test"]
    assert part.without_report == 1
    assert part.words == {"question": {1: 1}, "answer": {LONGEST: 1}}


samples = st.lists(
    st.tuples(st.sampled_from([STUDY, ASKED]), st.sampled_from([{}, {"date": 1}, {"name": 2}])), max_size=8
)


@settings(max_examples=100, deadline=None)
@given(samples, samples)
def test_parts_add_up_to_the_whole(left: list[tuple[Sample, dict[str, int]]], right: list[Any]) -> None:
    first, second, both = Summary(), Summary(), Summary()
    for sample, scrubbed in left:
        first.count(sample, scrubbed)
        both.count(sample, scrubbed)
    for sample, scrubbed in right:
        second.count(sample, scrubbed)
        both.count(sample, scrubbed)
    kept = first.model_copy(deep=True)
    assert first + second == second + first == both
    assert first == kept  # not changed by the sum
    first.add(second)
    assert first == both
    assert Summary.model_validate_json(both.model_dump_json()) == both
    assert both.total.samples == len(left) + len(right)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.sampled_from([0.05, 0.5, 0.95, 1]))
def test_percentiles_are_exact(values: list[int], share: float) -> None:
    counts = {value: values.count(value) for value in values}
    assert percentile(counts, share) == np.quantile(values, share, method="inverted_cdf")


def test_counting_is_cheap() -> None:
    many = STUDY.model_copy(update={"labels": {"chexpert": dict.fromkeys(CHEXPERT, 0)}})
    summary = Summary()
    started = time.process_time()
    for _ in range(2000):
        summary.count(many, {})
    assert (time.process_time() - started) / 2000 < 200e-6  # seconds; 10 microseconds on an idle core


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, SampleIndex, Summary, list[Image.Image]]:
    """Forty phantoms, counted from their shards."""
    out = tmp_path_factory.mktemp("card") / "shards"
    build("phantom", None, str(out), {"studies": "40", "size": "64"}, BuildSettings(workers=1, shard_samples=10))
    store = Store(str(out))
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    summary, pictures = Summary(), []
    for n in range(len(index)):
        members = [store.read_range(manifest.shards[m.shard].name, m.offset, m.length) for m in index.members(n)]
        summary.count(Sample.model_validate_json(members[0]), {})
        pictures.append(Image.open(io.BytesIO(members[1])))
    return manifest, index, summary, pictures


def test_the_card_says_what_the_manifest_says(built: tuple[Manifest, SampleIndex, Summary, Any]) -> None:
    manifest, _, summary, _ = built
    text = render_card(manifest, summary, [], [])
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in text.splitlines()
        if (cells := line.split("|"))[2:]
    }
    for split in SPLITS:
        assert rows[split][:2] == [str(manifest.splits[split]), str(manifest.patients[split])]
    assert rows["**all**"][:2] == ["40", str(sum(manifest.patients.values()))]
    present = {name: summary.total.labels["chexpert"][name]["1"] for name in CHEXPERT}
    assert {name: int(rows[name][0]) for name in CHEXPERT} == present
    assert sum(present.values()) > 10
    assert "For research only. Not for clinical use" in text
    assert rows["reader"] == ["phantom"]
    assert manifest.build["salt"] not in text
    assert text == render_card(manifest, Summary.model_validate_json(summary.model_dump_json()), [], [])
    assert "Nothing was found." in text
    assert "\n## Notes" not in text


def test_the_card_names_what_was_left_out_by_hash_and_reason(built: tuple[Manifest, SampleIndex, Summary, Any]) -> None:
    manifest, _, summary, _ = built
    skipped = [{"study": f"{n:016x}", "reason": "missing image file"} for n in range(13, 0, -1)]
    skipped += [{"study": "", "reason": "empty text"}, {"study": "f" * 16, "reason": "near-duplicate of another split"}]
    text = render_card(manifest, summary + Summary.of(STUDY, {"date": 3, "name": 1}), skipped, ["a | b <c>"])
    left_out = text[text.index("## What was left out") :]
    assert left_out.index("missing image file") < left_out.index("empty text")
    assert left_out.index(f"{1:016x}") < left_out.index(f"{13:016x}")
    assert left_out.count("f" * 16) == 1
    assert left_out.count("```") == 4
    assert "a \\| b &lt;c&gt;" in text
    assert "date" in text[text.index("## What was scrubbed") : text.index("## What was left out")]
    assert text == render_card(
        manifest, summary + Summary.of(STUDY, {"name": 1, "date": 3}), skipped[::-1], ["a | b <c>"]
    )


def test_the_card_shows_no_path_and_the_most_frequent_labels(built: tuple[Manifest, SampleIndex, Summary, Any]) -> None:
    manifest, _, _, _ = built
    names = {f"sign {n:03d}": int(n < 3) for n in range(100)}
    summary = Summary.of(STUDY.model_copy(update={"labels": {"rare": names, "chexpert": {"Edema": 1}}}), {})
    options = {"table": "/data/patients/list.csv", "delimiter": "\t", "view": "side"}
    text = render_card(
        manifest.model_copy(update={"build": {"reader": "image_text", "options": options}}), summary, [], []
    )
    assert "/data" not in text
    assert "table=(a path)" in text
    assert "view=side" in text
    assert "and 70 more names." in text
    assert text.index("**chexpert**") < text.index("**rare**")
    assert "sign 029" in text
    assert "sign 030" not in text


@pytest.mark.parametrize("count", [1, 3, 7, 12, 40, 100])
def test_samples_are_chosen_over_all_splits_and_shards(
    built: tuple[Manifest, SampleIndex, Summary, Any], count: int
) -> None:
    manifest, index, _, _ = built
    chosen = choose_samples(index, count)
    assert chosen == choose_samples(index, count) == sorted(set(chosen))
    assert len(chosen) == min(count, len(index))
    if count >= 12:
        assert set(index.shard[chosen]) == set(range(len(manifest.shards)))
    if 3 <= count < 40:
        of_split = [int((index.split[chosen] == n).sum()) for n in range(3)]
        sizes = [int((index.split == n).sum()) for n in range(3)]
        assert all(have >= min(count // 3, size) for have, size in zip(of_split, sizes, strict=True))


def test_a_contact_sheet_keeps_the_proportions_and_the_order() -> None:
    wide = Image.fromarray(np.full((50, 200), 200, np.uint8))
    red = Image.fromarray(np.full((80, 40, 3), (255, 0, 0), np.uint8))
    data = contact_sheet([("train  PA", wide), ("test " * 30, red), ("", wide)], columns=2, cell=100)
    assert data == contact_sheet([("train  PA", wide), ("test " * 30, red), ("", wide)], columns=2, cell=100)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    light = (pixels == 200).all(axis=2)
    top = light[: len(light) // 2]
    assert (int(top.any(axis=0).sum()), int(top.any(axis=1).sum())) == (100, 25)
    full = (pixels == (255, 0, 0)).all(axis=2)
    assert (int(full.any(axis=0).sum()), int(full.any(axis=1).sum())) == (50, 100)
    assert np.argwhere(full)[:, 1].min() > np.argwhere(top)[:, 1].max()
    assert (pixels[0, 0] < 30).all()


def test_a_contact_sheet_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a picture"):
        contact_sheet([])


def test_real_radiographs_stand_on_one_sheet(
    built: tuple[Manifest, SampleIndex, Summary, Any], real_notes: Path
) -> None:
    rows = json.loads((real_notes / "data.json").read_text())[:6]
    pictures = [(row["view"], Image.open(real_notes / row["image"])) for row in rows]
    pictures += [("phantom", picture) for picture in built[3][:2]]
    sheet = Image.open(io.BytesIO(contact_sheet(pictures, columns=4, cell=64)))
    assert np.asarray(sheet).std() > 30

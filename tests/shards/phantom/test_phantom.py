"""Drawn studies are a pure function of seed and number, balanced, and hung the right way round."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from radhpc.core.errors import UserError
from radhpc.core.sample import CHEXPERT
from radhpc.evaluation.metrics.findings import NAMES
from shards.build import BuildSettings, build
from shards.datasets import phantom, reader, registry
from shards.images.windowing import apply_window
from shards.phantom.image import Finding, draw

pytestmark = pytest.mark.timeout(60)
OPTIONS = phantom.OPTIONS(studies=3000, size=112)
STUDIES = list(phantom.read(None, OPTIONS))


def picture(*findings: Finding, seed: int = 0, view: str = "PA") -> np.ndarray:
    drawn = draw(view, 112, list(findings), np.random.default_rng(seed), np.random.default_rng(seed))
    return apply_window(drawn)[0].astype(int)


def test_a_study_depends_on_seed_and_number_alone() -> None:
    assert phantom.study(17, phantom.OPTIONS(studies=20, size=112)) == STUDIES[17]
    again = pickle.loads(pickle.dumps(STUDIES[17]))
    for (one, view), (other, _) in zip(STUDIES[17].views, again.views, strict=True):
        assert view in ("PA", "L")
        assert np.array_equal(one().pixels, other().pixels)
    assert phantom.study(17, phantom.OPTIONS(seed=1)).report != STUDIES[17].report


def test_pictures_are_of_twelve_bits() -> None:
    raw = STUDIES[0].views[0][0]()
    assert (raw.pixels.dtype, raw.pixels.shape, raw.bits, raw.window) == (np.uint16, (112, 112), 12, None)
    assert 1000 < raw.pixels.max() < 4096
    assert phantom.Picture(0, 0, "L", 300)().pixels.shape == (300, 300)


def test_every_label_is_frequent_enough_and_every_name_is_read_by_the_metric() -> None:
    assert tuple(phantom.LABELS) == NAMES
    counts = np.array([[study.labels["phantom"][name] for name in NAMES] for study in STUDIES])
    assert counts.mean(axis=0).min() > 0.05
    normal = counts.sum(axis=1) == 0
    assert 0.1 < normal.mean() < 0.3
    assert counts.sum(axis=1).max() == 3
    for study, none in zip(STUDIES, normal, strict=True):
        chexpert = study.labels["chexpert"]
        assert set(chexpert) == set(CHEXPERT)
        assert chexpert["No Finding"] == int(none)
        assert chexpert["Cardiomegaly"] == study.labels["phantom"]["cardiomegaly"]
        assert chexpert["Fracture"] is None


def test_patients_have_one_to_three_studies_and_some_studies_two_views() -> None:
    studies: dict[str, int] = {}
    for study in STUDIES:
        studies[study.patient] = studies.get(study.patient, 0) + 1
    assert set(studies.values()) == {1, 2, 3}
    assert len({study.study for study in STUDIES}) == len(STUDIES)
    assert np.mean([len(study.views) == 2 for study in STUDIES]) == pytest.approx(0.3, abs=0.05)


def test_left_is_on_the_viewers_right() -> None:
    normal = picture()
    left, right = normal[:, 56:], normal[:, :56]
    assert left[50:80, :28].mean() > right[50:80, 28:].mean()  # the heart
    for side, half in (("left", slice(56, None)), ("right", slice(None, 56))):
        change = picture(Finding(f"effusion {side}", side, 0.7)) - normal
        assert change[60:95, half].mean() > 20
        assert abs(change[:40]).mean() < 3
        change = picture(Finding("pneumothorax", side, 0.5)) - normal
        assert change[20:60, half].min() < -40
        other = slice(None, 56) if side == "left" else slice(56, None)
        assert abs(change[20:60, other]).mean() < 12


@pytest.mark.parametrize("label", [name for name in NAMES if not name.startswith(("effusion", "pneumothorax"))])
def test_findings_are_visible_after_shrinking(label: str) -> None:
    side = "left" if "left" in label else "right"
    for seed in range(5):
        change = picture(Finding(label, side, 0.0), seed=seed) - picture(seed=seed)
        bright = (change > 25).sum()  # pixels; a disc of radius 5 has 79
        assert bright > 60, (label, seed, bright)


def test_unknown_options_and_datasets_are_refused_with_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"option 'studeis' is unknown \(did you mean 'studies'\?\); allowed are name, "
    ):
        reader.parse_options("phantom", phantom.OPTIONS, {"studeis": "3"})
    with pytest.raises(UserError, match=r"option size=huge: .*integer.* \(pixels on a side: 32 to 4096\)"):
        reader.parse_options("phantom", phantom.OPTIONS, {"size": "huge"})
    with pytest.raises(UserError, match=r"option name=A\.B"):
        reader.parse_options("phantom", phantom.OPTIONS, {"name": "A.B"})
    with pytest.raises(
        UserError, match=r"dataset: 'phantm' is unknown \(did you mean 'phantom'\?\); allowed are .*image_text, "
    ):
        registry.reader("phantm")


def test_damaged_studies_are_those_that_are_left_out(tmp_path: Path) -> None:
    options = {"studies": "120", "size": "32", "damaged": "0.1"}
    result = build("phantom", None, str(tmp_path / "out"), options, BuildSettings(workers=1, max_skipped="30%"))
    assert 4 <= len(result.skipped) <= 24
    assert result.samples == 120 - len(result.skipped)
    assert {skip["reason"] for skip in result.skipped} == {"broken image: damaged on purpose"}
    again = build("phantom", None, str(tmp_path / "again"), options, BuildSettings(workers=1, max_skipped="30%"))
    assert [skip["name"] for skip in again.skipped] == [skip["name"] for skip in result.skipped]

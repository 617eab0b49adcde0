"""The rules read back what the drawn reports say, hold negations apart, and survive any text."""

import pytest
from hypothesis import given, strategies as st

from radhpc.evaluation.metrics.findings import NAMES, NORMAL, f1, read
from shards.datasets import phantom

pytestmark = pytest.mark.timeout(60)


@pytest.mark.parametrize("seed", [0, 1])
def test_every_drawn_report_is_read_exactly(seed: int) -> None:
    for study in phantom.read(None, phantom.OPTIONS(studies=3000, seed=seed)):
        wanted = {name for name, present in study.labels["phantom"].items() if present}
        for text in (study.report.text(), study.report.findings, study.report.impression, study.report.text().upper()):
            assert read(text or "") == wanted, text


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", set()),
        ("No pleural effusion or pneumothorax.", set()),
        ("There is a left effusion without pneumothorax.", {"effusion left"}),
        ("No effusion, but a nodule in the right upper zone.", {"nodule upper"}),
        ("The heart is not enlarged.", set()),
        ("The heart is enlarged", {"cardiomegaly"}),
        ("The heart is mildly enlarged. Lungs clear of consolidation.", {"cardiomegaly"}),
        ("Cardiac silhouette appears enlarged", {"cardiomegaly"}),
        ("Heart size within normal limits; no cardiomegaly", set()),
        ("Bilateral pleural effusions.", {"effusion left", "effusion right"}),
        ("Pleural effusions on both sides without pneumothorax", {"effusion left", "effusion right"}),
        (
            "Left-sided pleural effusion and right upper lobe consolidation.",
            {"effusion left", "consolidation right upper"},
        ),
        ("In the left lower lobe, there is air-space opacification.", {"consolidation left lower"}),
        ("Right mid zone nodule", {"nodule middle"}),
        ("Pneumothorax is not seen. Effusion is absent.", set()),
        ("Absence of consolidation in the right upper lobe.", set()),
        ("Neither nodule nor consolidation in the left lower lobe", set()),
        ("Lungs are clear except for a nodule in the left lower zone.", {"nodule lower"}),
        ("Pleural effusion.", set()),  # on which side?
        ("No pneumothorax.\nLarge right effusion", {"effusion right"}),
        ("The right costophrenic angle is blunted.", {"effusion right"}),
        ("Right middle lobe pneumonia/consolidation", {"consolidation right middle"}),
        ("Nodule in the left middle lobe consolidation", {"nodule middle"}),  # there is no left middle lobe
    ],
)
def test_phrases(text: str, wanted: set[str]) -> None:
    assert read(text) == wanted


VOCABULARY = """no left right upper lower pleural effusion heart enlarged , . and without nodule zone lobe in the of
consolidation pneumothorax clear but not is 3.5 ## é"""
WORDS = st.lists(st.sampled_from([*VOCABULARY.split(), "\n"])).map(" ".join)


@given(st.one_of(st.text(), WORDS))
def test_any_text_is_read_without_harm(text: str) -> None:
    assert read(text) <= set(NAMES)


@given(WORDS)
def test_a_denied_sentence_finds_nothing(text: str) -> None:
    sentence = " ".join(word for word in text.split() if word not in (".", "but"))
    assert read("There is no " + sentence) == set()


def test_scores() -> None:
    left, heart = {"effusion left"}, {"cardiomegaly"}
    perfect = f1([left, heart, set()], [left, heart, set()])
    assert (perfect["macro"], perfect["micro"], perfect[NORMAL], perfect["nodule upper"]) == (1, 1, 1, 0)
    partly = f1([left, left | heart, set()], [left, heart, heart])
    assert partly["effusion left"] == pytest.approx(2 / 3)
    assert partly["cardiomegaly"] == pytest.approx(2 / 3)
    assert partly[NORMAL] == 0
    assert partly["macro"] == pytest.approx(2 / 3)  # of the two that the references have
    assert partly["micro"] == pytest.approx(2 * 2 / (4 + 3))
    assert f1([], []) == {"macro": 0, "micro": 0, **dict.fromkeys((*NAMES, NORMAL), 0)}
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        f1([left], [left, left])

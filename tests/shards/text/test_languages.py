"""A text in a language that the privacy gate has no rules for is built only where somebody answers for it."""

import json
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.storage.store import Store
from shards.build import build
from shards.settings import BuildSettings
from shards.text.languages import LANGUAGES, LanguageTally, has_other_letters, has_rules, primary_language
from shards.verify import verify
from tests.shards.helpers import notes

pytestmark = pytest.mark.timeout(60)
SWEDISH = "Inga infiltrat. Hjärtat är inte förstorat. Ingen pleuravätska ses."
TEXTS = {
    "en": "The lungs are clear and the heart is of normal size.",
    "es": "No se observan infiltrados en el parénquima pulmonar.",
    "de": "Kein Nachweis eines Infiltrats, das Herz ist nicht vergrößert.",
    "fr": "Pas de foyer de condensation, le cœur est de volume normal.",
    "pt": "Ausência de derrame pleural, área cardíaca com dimensões normais.",
    "vi": "Hai phổi sáng đều, bóng tim không to, không tràn dịch.",
}


def archive(folder: Path, language: str, text: str) -> Path:
    raw = notes(folder, 4)
    rows = json.loads((raw / "data.json").read_text())
    for row in rows:
        row |= {"text": text, "language": language}
    (raw / "data.json").write_text(json.dumps(rows))
    return raw


def run(raw: Path, out: Path, unscrubbed: bool = False) -> list[str]:
    return build("image_text", raw, str(out), {}, BuildSettings(workers=1, unscrubbed=unscrubbed)).warnings


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sv", SWEDISH),
        ("zh-Hans", "双肺清晰，心影不大。"),
        ("en", "Лёгкие без инфильтрации, сердце не увеличено."),
        ("ita", "Torace."),
    ],
)
def test_a_language_without_rules_is_refused_unless_somebody_answers(tmp_path: Path, language: str, text: str) -> None:
    raw = archive(tmp_path / "raw", language, text)
    with pytest.raises(UserError, match=r"4 in .*rules for en, es, de, fr, pt, vi alone; --unscrubbed") as error:
        run(raw, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert any("--unscrubbed: " in warning for warning in run(raw, tmp_path / "out", unscrubbed=True))
    assert "languages without rules" in (tmp_path / "out" / "card.md").read_text()
    assert Manifest.load(Store(tmp_path / "out")).gate == "unscrubbed"
    assert verify(str(tmp_path / "out")).ok


@pytest.mark.parametrize("language", [*LANGUAGES, "es-stemmed", "pt-BR", "ger"])
def test_a_language_with_rules_needs_no_answer(tmp_path: Path, language: str) -> None:
    raw = archive(tmp_path / "raw", language, TEXTS[primary_language(language)])
    warnings = run(raw, tmp_path / "out", unscrubbed=True)  # the flag changes nothing
    assert not any("language" in warning or "unscrubbed" in warning for warning in warnings)
    assert Manifest.load(Store(tmp_path / "out")).gate == "scrubbed"


def test_texts_that_do_not_read_like_their_language_are_warned_about(tmp_path: Path) -> None:
    raw = archive(tmp_path / "raw", "en", SWEDISH)
    assert [warning for warning in run(raw, tmp_path / "out") if "4 of the first 4" in warning and "en" in warning]


@given(st.sampled_from(sorted(TEXTS)), st.sampled_from(sorted(TEXTS)), st.integers(0, 9))
def test_every_language_reads_like_itself(language: str, other: str, others: int) -> None:
    tally = LanguageTally()
    for text in [TEXTS[language]] * 10 + [TEXTS[other]] * others:
        tally.count(language, text)
        assert not has_other_letters(text)
    assert tally.messages() == []
    assert has_rules(language)
    assert not tally.without_rules

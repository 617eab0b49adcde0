"""The recall that the page reports is held. Sentences of the held half are never shown."""

import pytest

from bench.privacy import HALVES, rules, score, sentences

pytestmark = pytest.mark.timeout(60)


def test_recall_does_not_fall() -> None:
    recall = {}
    for half in HALVES:
        result = score(half, rules)
        recall[half] = result.removed.total() / result.total.total()
        assert len(result.broken) <= {"open": 0, "held": 1}[half], f"phrases that must stay, {half} half"
    assert recall["open"] > 0.97
    assert recall["held"] > 0.93


def test_both_halves_have_every_language_and_share_no_sentence() -> None:
    halves = [sentences(half) for half in HALVES]
    assert {frozenset(sentence.language for sentence in half) for half in halves} == {
        frozenset(("en", "es", "de", "fr", "pt", "vi"))
    }
    assert not {sentence.text for sentence in halves[0]} & {sentence.text for sentence in halves[1]}

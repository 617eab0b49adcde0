"""Published figures stand beside a score only where their convention and their data agree with it."""

from radhpc.evaluation.metrics.conventions import CONVENTIONS, KINDS
from radhpc.evaluation.metrics.published import lines, rows, why_not

OURS = {"r2gengpt/bleu_4": {"value": 0.2}, "r2gengpt/rouge_l": {"value": 0.3}, "r2gen_mimic/bleu_4": {"value": 0.21}}


def test_every_row_says_where_it_is_from() -> None:
    assert {"MAIRA-2", "Libra", "R2GenGPT", "Gla-AI4BioMed (Med-CXRGen)", "LightMedVLM", "Radixpert"} <= {
        row["system"] for row in rows()
    }
    for row in rows():
        assert row["source"]
        assert row["sections"]
        assert row["convention"] is None or (row["convention"] in CONVENTIONS and set(row["scores"]) <= set(KINDS))
        assert row["dataset"] or row["test_set"]
        assert all(0 < value < 1 for value in row["scores"].values()), "a share, not a percentage"


def test_a_row_is_beside_the_score_of_its_convention_alone() -> None:
    text = "\n".join(lines(OURS, {"mimic_cxr_jpg"}, "test"))
    beside, apart = text.split("not comparable")
    assert "| R2GenGPT | r2gengpt/bleu_4 | 0.134 | 0.200 |" in beside
    assert "of split 'validate'" in apart
    assert "| LightMedVLM | r2gengpt/rouge_l | 0.322 | 0.300 |" in "\n".join(lines(OURS, {"mimic_cxr"}, "validate"))
    assert "MAIRA-2" not in beside
    assert "MAIRA-2: bleu_1 0.465" in apart
    assert "its convention is not stated" in apart
    assert "Radixpert" not in text, "another test set"
    other = {"r2gen_mimic/bleu_4": {"value": 0.21}}
    assert "its convention, r2gengpt, was not scored here" in "\n".join(lines(other, {"mimic_cxr"}, "test"))
    assert list(lines(OURS, {"phantom"}, "test")) == []
    (radixpert,) = [row for row in rows() if row["system"] == "Radixpert"]
    assert why_not(radixpert, OURS, {"mimic_cxr"}, "test") == "another test set: not said"
    assert "2 data sets here" in "\n".join(lines(OURS, {"mimic_cxr", "padchest"}, "test"))

"""BLEU, ROUGE-L, CIDEr and METEOR are those of pycocoevalcap, rouge_score and sacrebleu, by the conventions of papers.

The texts are real: reports of Open-i out of the torchxrayvision wheel, each beside the report of another study.
"""

import shutil
import tarfile
from collections.abc import Callable

import defusedxml.ElementTree
import numpy as np
import pytest

from radhpc.evaluation.metrics import ngrams
from radhpc.evaluation.metrics.bootstrap import Sums, compare, interval, mean, value
from radhpc.evaluation.metrics.conventions import (
    CONVENTIONS,
    _iu,
    _mimic,
    _ptb,
    _r2gengpt,
    measures,
    meteor,
    meteor_of,
    meteor_rows,
    rouge_score,
)
from tests.shards.datasets.wheel import wheel

pytestmark = pytest.mark.timeout(60)

Pairs = tuple[list[str], list[str]]


@pytest.fixture(scope="module")
def reports() -> list[str]:
    """Findings of the first two hundred reports of Open-i that have any."""
    found: list[str] = []
    with tarfile.open(wheel("NLMCXR_reports.tgz")) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if not member.name.endswith(".xml"):
                continue
            root = defusedxml.ElementTree.fromstring(tar.extractfile(member).read())  # type: ignore[union-attr]
            text = root.findtext(".//AbstractText[@Label='FINDINGS']")
            if text:
                found.append(" ".join(text.split()))
            if len(found) == 200:
                break
    return found


@pytest.fixture(scope="module")
def pairs(reports: list[str]) -> Pairs:
    """Generated ones and references: each report beside the most alike of the next forty, by shared words."""

    def shared(one: str, other: str) -> float:
        left, right = set(one.lower().split()), set(other.lower().split())
        return len(left & right) / len(left | right)

    near = [
        max((reports[(n + step) % len(reports)] for step in range(1, 41)), key=lambda other: shared(mine, other))
        for n, mine in enumerate(reports)
    ]
    return near[:100], reports[:100]


@pytest.mark.parametrize("convention", ["radeval_raw", "r2gen_mimic"])
def test_scores_are_those_of_pycocoevalcap(pairs: Pairs, convention: str) -> None:
    pytest.importorskip("pycocoevalcap")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rule = CONVENTIONS[convention]
    generated, references = (rule.cut(tuple(texts)) for texts in pairs)
    references = [words[: rule.longest] for words in references]
    mine = {n: [" ".join(words)] for n, words in enumerate(generated)}
    wanted = {n: [" ".join(words)] for n, words in enumerate(references)}
    found = {name: value(measure.statistic) for name, measure in measures(convention, *pairs).items()}
    bleu, _ = Bleu(4).compute_score(wanted, mine, verbose=0)
    assert [found[f"bleu_{n}"] for n in (1, 2, 3, 4)] == pytest.approx(bleu, abs=1e-12)
    assert found["rouge_l"] == pytest.approx(Rouge().compute_score(wanted, mine)[0], abs=1e-12)
    assert found["cider"] == pytest.approx(Cider().compute_score(wanted, mine)[0], abs=1e-9)
    assert 0.1 < found["bleu_4"] < 0.9, "texts that say nothing"


def test_bleu_is_sacrebleus(pairs: Pairs) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    for convention, lower in (("sacrebleu_13a", False), ("sacrebleu_13a_lower", True)):
        wanted = sacrebleu.corpus_bleu(pairs[0], [pairs[1]], lowercase=lower).score / 100
        assert value(measures(convention, *pairs)["bleu_4"].statistic) == pytest.approx(wanted, abs=1e-9)


def test_rouge_is_rouge_scores(pairs: Pairs) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    texts = ([*pairs[0][:60], "", "no"], [*pairs[1][:60], "a word", ""])
    wanted = np.mean([scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(*texts, strict=True)])
    assert value(rouge_score(*texts)) == pytest.approx(wanted, abs=1e-12)


# What meteor-1.5.jar counts for five pairs, and what it then gives for each, and for all together.
METEOR_COUNTS = """\
7 5 4 2 3 3 2 2 0 0 0 0 0 0 0 0 0 0 0 0 4 5 5
3 3 1 1 2 2 1 1 0 0 0 0 0 0 0 0 0 0 0 0 1 3 3
5 9 2 5 2 2 2 2 0 0 0 0 0 0 0 0 0 0 0 0 3 4 4
6 6 3 2 3 3 1 1 0 0 0 0 0 0 0 0 0 0 0 0 4 4 4
1 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0"""
METEOR_SCORES = [0.4148737611845802, 1.0, 0.21542732582512245, 0.29197080291970806, 0.0]
METEOR_OF_ALL = 0.31231921816854574
# The same of four pairs with stems, synonyms and paraphrases.
LOOSE_COUNTS = """\
4 5 1 2 2 2 0 0 1 1 0 0 0 0 1 1 0 0 0 0 1 4 4
9 7 4 2 1 1 0 0 0 0 0 0 2 2 0 0 1 2 2 2 2 6 7
8 4 4 1 1 1 1 1 0 0 0 0 0 0 0 0 1 1 1 0 1 4 3
4 4 2 2 0 0 1 1 1 1 0 0 0 0 0 0 1 1 1 1 1 4 4"""
LOOSE_SCORES = [0.4322074892537486, 0.37286367117213415, 0.2895803761500633, 0.65]
LOOSE_OF_ALL = 0.3779542293101841


def test_meteor_of_counts_is_the_jars() -> None:
    for counts, scores, of_all in (
        (METEOR_COUNTS, METEOR_SCORES, METEOR_OF_ALL),
        (LOOSE_COUNTS, LOOSE_SCORES, LOOSE_OF_ALL),
    ):
        rows = meteor_rows(counts.splitlines())
        assert meteor_of(rows) == pytest.approx(scores, abs=1e-12)
        assert value(Sums(rows, meteor_of)) == pytest.approx(of_all, abs=1e-12)


needs_java = pytest.mark.skipif(
    shutil.which("java") is None, reason="NO JAVA: the jars of COCO's scores are not tested"
)


@needs_java
def test_words_of_the_penn_treebank_are_pycocoevalcaps(pairs: Pairs) -> None:
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    texts = [*pairs[1][:40], "No acute (cardiopulmonary) abnormality; 2.5 cm.", "", "Patient's heart -- normal?"]
    theirs = ptb.PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(texts)})
    assert [" ".join(words) for words in _ptb(tuple(texts))] == [theirs[n][0] for n in range(len(texts))]


@needs_java
@pytest.mark.heavy
@pytest.mark.timeout(240)
def test_meteor_by_its_jar() -> None:
    pytest.importorskip("pycocoevalcap")
    generated = ["the heart is normal in size .", "no acute disease", "lungs clear . no effusion"]
    generated += ["there is a small left effusion", "xxxx", ""]
    references = ["heart size is normal .", "no acute disease", "no pleural effusions . the lungs are clear ."]
    references += ["the left pleural effusion is small", "normal", "normal"]
    (measure,) = meteor({"radeval_raw": (generated[:5], references[:5])}).values()
    assert value(measure.statistic) == pytest.approx(METEOR_OF_ALL, abs=1e-12)
    assert interval(measure.statistic, list("abcde")) is not None


@pytest.mark.parametrize(
    ("cut", "text", "wanted"),
    [
        (_iu, "1. Heart size normal. 2. Lungs: clear!", "heart size normal . lungs clear ."),
        (_iu, "No follow-up, \"XXXX\" needed..", "no follow-up xxxx needed ."),
        (_iu, "", "."),
        (_mimic, "FINDINGS:\n AP ___ view.   The heart (mildly) large.", "findings ap view . the heart mildly large ."),
        (_r2gengpt, "Impression: no change", "impression : no change ."),
    ],
)  # fmt: skip
def test_the_papers_ways_to_clean(cut: Callable[[str], list[str]], text: str, wanted: str) -> None:
    assert " ".join(cut(text)) == wanted


def test_conventions_differ_by_as_much_as_papers(pairs: Pairs) -> None:
    """Facts of this kind are why each score carries its convention: the same texts, and points between the numbers."""
    bleu = {name: value(measures(name, *pairs)["bleu_4"].statistic) for name in ("radeval_raw", "r2gen_mimic")}
    raw = measures("radeval_raw", *pairs)
    assert bleu["r2gen_mimic"] - bleu["radeval_raw"] > 0.02
    assert value(raw["rouge_l_f1"].statistic) - value(raw["rouge_l"].statistic) > 0.02


def test_texts_of_nothing_score_nothing() -> None:
    for name in ("radeval_raw", "r2gen_iu"):
        for measure in measures(name, ["", ""], ["A text.", ""]).values():
            assert 0 <= value(measure.statistic) <= 1
    assert ngrams.longest_common([], ["a"]) == 0


def test_the_interval_covers_and_is_the_same_twice() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        patients = np.repeat(np.arange(40), 3)
        values = random.normal(size=40)[patients] + 0.1 * random.normal(size=120)
        names = [str(patient) for patient in patients]
        limits = interval(mean(values), names, replicates=400)
        assert limits == interval(mean(values), names, replicates=400)
        assert limits is not None
        covered += limits[0] <= 0 <= limits[1]
        naive = interval(mean(values), [str(n) for n in range(120)], replicates=400)
        assert naive is not None
        assert naive[1] - naive[0] < 0.75 * (limits[1] - limits[0]), "one patient's studies count as many patients"
    assert covered >= 50


def test_a_pair_of_runs_is_compared_by_patient() -> None:
    random = np.random.default_rng(0)
    hard = random.normal(size=200)
    patients = [str(n // 2) for n in range(200)]
    better = compare(mean(hard + 0.1 + 0.1 * random.normal(size=200)), mean(hard), patients)
    assert better["low"] > 0
    assert better["p"] < 0.01
    same = compare(mean(hard + 0.3 * random.normal(size=200)), mean(hard), patients)
    assert same["low"] < 0 < same["high"]
    assert same["p"] > 0.05
    sums = Sums(np.ones((200, 2)), lambda sums: sums[..., 0] / sums[..., 1])
    assert compare(sums, sums, patients) == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}

"""Tokenises reports before they are compared: the conventions of two papers differ by up to five BLEU points.

    measures("r2gen_mimic", generated, references)      # {"bleu_1": Measure, ..., "rouge_l": ..., "cider": ...}

Enters: texts. Leaves: statistics, each with a description of its convention. A score is named after its convention
(`r2gen_mimic/bleu_4`), because without it the number means nothing. Sources of the rules: R2Gen modules/tokenizers.py,
R2GenGPT dataset/data_helper.py, pycocoevalcap 1.2, RadEval 2.2, rouge_score 0.1.2, sacrebleu 2.6.
"""

import functools
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from radhpc.core import resources
from radhpc.evaluation.metrics import ngrams
from radhpc.evaluation.metrics.bootstrap import Array, Statistic, Sums, mean

_PTB_JAR, _METEOR_JAR = "tokenizer/stanford-corenlp-3.4.1.jar", "meteor/meteor-1.5.jar"
# Tokens that COCO removes after the Penn Treebank tokenizer.
_PTB_REMOVED = frozenset(("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-",
                          ".", "?", "!", ",", ":", "-", "--", "...", ";"))  # fmt: skip
# R2Gen's pattern holds `:-\[`, which is a range: it takes out : ; < = > ? @ [ and capitals, and leaves the hyphen.
_R2GEN_REMOVED = re.compile(r"[.,?;*!%^&_+():-\[\]{}]")
_R2GENGPT_REMOVED = re.compile(r"[.,?;*!%^&_+()\[\]{}]")
_QUOTES = str.maketrans("", "", "\"/\\'")


@dataclass(frozen=True)
class Measure:
    """A statistic and its description."""

    statistic: Statistic
    convention: str
    weights: str | None = None  # sha256 of the weights that it was made with
    lower_is_better: bool = False


@dataclass(frozen=True)
class Convention:
    """One way to tokenise texts."""

    about: str
    cut: Callable[[tuple[str, ...]], list[list[str]]]
    longest: int | None = None  # words of a reference that count
    packages: tuple[str, ...] = ()
    java: bool = False


def _raw(texts: tuple[str, ...]) -> list[list[str]]:
    return [text.split() for text in texts]


def _sentences(text: str, collapses: int) -> list[str]:
    """R2Gen's sentences: runs of dots collapsed, the numbers of lists taken out, lower case."""
    for _ in range(collapses):
        text = text.replace("..", ".")
    text = text.replace("1. ", "")
    for before in (". ", " "):
        for number in "2345":
            text = text.replace(f"{before}{number}. ", ". ")
    return text.strip().lower().split(". ")


def _joined(sentences: list[str], removed: re.Pattern[str]) -> list[str]:
    """Each sentence without punctuation, and a dot as a word of its own behind each, an empty one too."""
    cleaned = [removed.sub("", sentence.translate(_QUOTES).strip().lower()) for sentence in sentences]
    return (" . ".join(cleaned) + " .").split()


def _iu(text: str) -> list[str]:
    return _joined(_sentences(text, 3), _R2GEN_REMOVED)


def _mimic_spaces(text: str) -> str:
    text = text.replace("\n", " ")
    for pair, times in (("__", 7), ("  ", 6)):
        for _ in range(times):
            text = text.replace(pair, pair[0])
    return text


def _mimic(text: str) -> list[str]:
    return _joined(_sentences(_mimic_spaces(text), 8), _R2GEN_REMOVED)


def _r2gengpt(text: str) -> list[str]:
    sentences = [sentence.replace(":", " :") for sentence in _sentences(_mimic_spaces(text), 8)]
    return _joined(sentences, _R2GENGPT_REMOVED)


def _each(cut: Callable[[str], list[str]]) -> Callable[[tuple[str, ...]], list[list[str]]]:
    return lambda texts: [cut(text) for text in texts]


def _ptb(texts: tuple[str, ...]) -> list[list[str]]:
    """The Penn Treebank tokenizer that COCO's scores use, by its jar, then COCO's list of punctuation taken out."""
    if not texts:
        return []
    command = ["java", "-cp", str(_pycocoevalcap() / _PTB_JAR), "edu.stanford.nlp.process.PTBTokenizer"]
    lines = "\n".join(" ".join(text.split()) for text in texts) + "\n"
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input=lines.encode(), capture_output=True, check=True
    )
    cut = done.stdout.decode().split("\n")[: len(texts)]
    return [[word for word in line.split() if word not in _PTB_REMOVED] for line in cut]


def _sacrebleu(lower: bool) -> Callable[[tuple[str, ...]], list[list[str]]]:
    def cut(texts: tuple[str, ...]) -> list[list[str]]:
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        tokenizer: Any = Tokenizer13a()  # type: ignore[no-untyped-call]
        return [tokenizer((text.lower() if lower else text).rstrip()).split() for text in texts]

    return cut


_UNKNOWN = "rare words are kept, where R2Gen puts <unk> into the references"
CONVENTIONS: dict[str, Convention] = {
    "r2gen_iu": Convention(f"R2Gen's cleaning for IU X-ray, references cut to 60 words; {_UNKNOWN}", _each(_iu), 60),
    "r2gen_mimic": Convention(
        f"R2Gen's cleaning for MIMIC-CXR, references cut to 100 words; {_UNKNOWN}", _each(_mimic), 100
    ),
    "r2gengpt": Convention(
        "R2GenGPT's cleaning for MIMIC-CXR, references cut to 100 words (there: to 100 tokens of the language model)",
        _each(_r2gengpt),
        100,
    ),
    "coco_ptb": Convention(
        "Penn Treebank tokenizer, lower case, punctuation taken out", _ptb, None, ("pycocoevalcap",), True
    ),
    "radeval_raw": Convention("split at spaces, nothing cleaned, as RadEval", _raw),
    "sacrebleu_13a": Convention("sacrebleu's 13a, case kept", _sacrebleu(False), None, ("sacrebleu",)),
    "sacrebleu_13a_lower": Convention("sacrebleu's 13a, lower case", _sacrebleu(True), None, ("sacrebleu",)),
}
KINDS = {
    "bleu_1": "BLEU-1 of the corpus",
    "bleu_2": "BLEU-2 of the corpus",
    "bleu_3": "BLEU-3 of the corpus",
    "bleu_4": "BLEU-4 of the corpus",
    "rouge_l": "ROUGE-L, COCO's: F with beta 1.2",
    "cider": "CIDEr-D, document frequencies of these references",
    "meteor": "METEOR 1.5 by its jar, English, -norm",
    "rouge_l_f1": "ROUGE-L, rouge_score's: F1 with Porter stems",
}


def missing(convention: str, meteor: bool = False) -> str | None:
    """Return what has to be installed for a convention, or for METEOR in it; None if nothing is missing."""
    rule = CONVENTIONS[convention]
    packages = {*rule.packages, *(("pycocoevalcap",) if meteor else ())}
    absent = sorted(name for name in packages if importlib.util.find_spec(name) is None)
    if absent:
        return f"install {', '.join(absent)} ({resources.install_hint('scores')})"
    if (rule.java or meteor) and shutil.which("java") is None:
        return "install a Java runtime (Debian: default-jre-headless)"
    return None


def measures(convention: str, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
    """BLEU-1 to 4, ROUGE-L and CIDEr of texts; radeval_raw has rouge_score's ROUGE-L, too."""
    rule = CONVENTIONS[convention]
    pairs = _pairs(convention, generated, references)
    hypothesis, reference = [hypothesis for hypothesis, _ in pairs], [reference for _, reference in pairs]
    statistics: dict[str, Statistic] = {
        f"bleu_{n}": sums for n, sums in enumerate(ngrams.bleu(hypothesis, reference), start=1)
    }
    statistics["rouge_l"] = ngrams.rouge_l(hypothesis, reference)
    statistics["cider"] = ngrams.cider(hypothesis, reference)
    if convention == "radeval_raw":
        statistics["rouge_l_f1"] = rouge_score(generated, references)
    return {kind: Measure(statistic, f"{KINDS[kind]}; {rule.about}") for kind, statistic in statistics.items()}


def _pairs(convention: str, generated: Sequence[str], references: Sequence[str]) -> list[tuple[list[str], list[str]]]:
    """Tokenise each generated text and its reference."""
    longest = CONVENTIONS[convention].longest
    cut = zip(_cut(convention, tuple(generated)), _cut(convention, tuple(references)), strict=True)
    return [(hypothesis, reference[:longest]) for hypothesis, reference in cut]


@functools.lru_cache(maxsize=32)  # the references are the same for the model and for every baseline
def _cut(convention: str, texts: tuple[str, ...]) -> list[list[str]]:
    return CONVENTIONS[convention].cut(texts)


def rouge_score(generated: Sequence[str], references: Sequence[str]) -> Sums:
    """Return the mean F1 of rouge_score's rougeL with its stemmer."""
    scores = []
    for hypothesis, reference in zip(map(_stems, generated), map(_stems, references), strict=True):
        common = ngrams.longest_common(hypothesis, reference)
        scores.append(2 * common / (len(hypothesis) + len(reference)) if common else 0.0)
    return mean(scores)


def _stems(text: str) -> list[str]:
    """rouge_score's words: letters a to z and digits in lower case; those of more than three letters are stemmed."""
    return [_stem(word) if len(word) > 3 else word for word in re.findall(r"[a-z0-9]+", text.lower())]


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    return str(_stemmer().stem(word))


@functools.cache
def _stemmer() -> Any:
    from nltk.stem.porter import PorterStemmer  # with nltk come scikit-learn and scipy: 1.5 s

    return PorterStemmer()


# METEOR 1.5's tuned values for English, by its jar's own table: the four kinds of match (exact, stem, synonym,
# paraphrase) and the weights of precision, of fragments and of content words (Denkowski and Lavie, WMT 2014).
_METEOR_KINDS = np.asarray([1.0, 0.6, 0.8, 0.6])
_ALPHA, _BETA, _GAMMA, _DELTA = 0.85, 0.2, 0.6, 0.75


def meteor(texts: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> dict[str, Measure]:
    """Compute METEOR 1.5 by convention, of (generated, references); the jar is started once for all (some ten
    seconds).
    """
    lines, counts = [], {}
    for convention, (generated, references) in texts.items():
        counts[convention] = len(generated)
        for hypothesis_words, reference_words in _pairs(convention, generated, references):
            # A line of its protocol needs a word on either side, and bars separate.
            hypothesis, reference = (
                " ".join(words).replace("|", " ") or "." for words in (hypothesis_words, reference_words)
            )
            lines.append(f"SCORE ||| {reference} ||| {hypothesis}\n")
    rows = _meteor_counts(tuple(lines))
    result, start = {}, 0
    for convention, count in counts.items():
        statistic = Sums(rows[start : start + count], meteor_of)
        result[convention] = Measure(statistic, f"{KINDS['meteor']}; {CONVENTIONS[convention].about}")
        start += count
    return result


@functools.lru_cache(maxsize=4)
def _meteor_counts(lines: tuple[str, ...]) -> Array:
    """Return the jar's counts for each of these lines of its protocol."""
    command = ["java", "-Xmx2G", "-jar", str(_pycocoevalcap() / _METEOR_JAR), "-", "-", "-stdio", "-l", "en", "-norm"]
    done = subprocess.run(command, input="".join(lines).encode(), capture_output=True, check=True)
    rows = meteor_rows(done.stdout.decode().splitlines())
    assert len(rows) == len(lines), done.stderr.decode()[-400:]
    return rows


def meteor_rows(lines: Sequence[str]) -> Array:
    """The jar's counts for each pair, 23 numbers: lengths of hypothesis and reference, function words of both; for each
    kind of match content words of both and function words of both; chunks, matches of both. Of two equal texts the one
    chunk is no fragment, and does not count.
    """
    rows = np.asarray([[float(number) for number in line.split()] for line in lines]).reshape(-1, 23)
    equal = (rows[:, 20] == 1) & (rows[:, 21:23] == rows[:, 0:2]).all(1)
    rows[equal, 20] = 0
    return rows


def meteor_of(sums: Array) -> Array:
    """METEOR of the sums of such rows."""
    kinds = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    weighted = _DELTA * kinds[..., :2] + (1 - _DELTA) * kinds[..., 2:]
    matched = (weighted * _METEOR_KINDS[:, None]).sum(-2)  # of the hypothesis, of the reference
    words = _DELTA * (sums[..., 0:2] - sums[..., 2:4]) + (1 - _DELTA) * sums[..., 2:4]
    precision, recall = np.moveaxis(np.divide(matched, words, out=np.zeros_like(matched), where=words > 0), -1, 0)
    below = np.asarray(_ALPHA * precision + (1 - _ALPHA) * recall)
    mean_f = np.divide(precision * recall, below, out=np.zeros_like(below), where=below > 0)
    chunks, matches = np.asarray(sums[..., 20]), np.asarray(sums[..., 21:23].mean(-1))
    fragments = np.divide(chunks, matches, out=np.zeros_like(chunks), where=matches > 0)
    return np.asarray(mean_f * (1 - _GAMMA * fragments**_BETA))


def _pycocoevalcap() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))

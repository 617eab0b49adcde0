"""Computes BLEU, ROUGE-L and CIDEr of tokenised texts (conventions.py tokenises them).

    bleu([["heart", "is", "normal"]], [["the", "heart", "is", "normal"]])[3]       # BLEU-4, a statistic of one row

Each row's contribution to a score is kept separate, which the bootstrap needs; the values are those of
pycocoevalcap 1.2 to the last digits, its additive constants included, and a test holds them against it.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from radhpc.evaluation.metrics.bootstrap import Array, Sums, mean

Words = Sequence[str]
_ORDERS = 4
_TINY, _SMALL = 1e-15, 1e-9  # of pycocoevalcap's bleu_scorer.py: no matches are nearly zero, not an error
_BETA = 1.2  # COCO's ROUGE-L leans to recall
_SIGMA = 6.0  # of CIDEr-D's penalty on a length that differs
_CIDER_SCALE = 10.0


def bleu(generated: Sequence[Words], references: Sequence[Words]) -> list[Sums]:
    """BLEU-1 to BLEU-4 over the corpus (Papineni et al., ACL 2002), one reference each."""
    rows = np.zeros((len(generated), 2 + 2 * _ORDERS))  # lengths of both, then matches and n-grams of each order
    for row, hypothesis, reference in zip(rows, generated, references, strict=True):
        row[:2] = len(hypothesis), len(reference)
        counts, known = _ngrams(hypothesis), _ngrams(reference)
        for ngram, count in counts.items():
            row[1 + len(ngram)] += min(count, known[ngram])
        row[2 + _ORDERS :] = [max(0, len(hypothesis) - order) for order in range(_ORDERS)]
    return [Sums(rows, _Bleu(order)) for order in range(1, _ORDERS + 1)]


class _Bleu:
    """Turns sums of bleu()'s rows into BLEU of an order."""

    def __init__(self, order: int) -> None:
        self.order = order

    def __call__(self, sums: Array) -> Array:
        matches = sums[..., 2 : 2 + self.order] + _TINY
        ngrams = sums[..., 2 + _ORDERS : 2 + _ORDERS + self.order] + _SMALL
        precision = np.exp(np.log(matches / ngrams).mean(-1))
        lengths = (sums[..., 0] + _TINY) / (sums[..., 1] + _SMALL)
        with np.errstate(over="ignore"):
            return np.asarray(precision * np.exp(np.minimum(0.0, 1 - 1 / lengths)))


def rouge_l(generated: Sequence[Words], references: Sequence[Words]) -> Sums:
    """Compute ROUGE-L as COCO does: the mean of F with beta 1.2 over the longest common subsequence (Lin, 2004)."""
    scores = []
    for hypothesis, reference in zip(generated, references, strict=True):
        common = longest_common(hypothesis, reference)
        precision, recall = common / max(1, len(hypothesis)), common / max(1, len(reference))
        below = recall + _BETA**2 * precision
        scores.append((1 + _BETA**2) * precision * recall / below if below else 0.0)
    return mean(scores)


def longest_common(left: Words, right: Words) -> int:
    """The length of the longest common subsequence, bit-parallel (Hyyro, 2004): a report takes microseconds."""
    places: dict[str, int] = {}
    for n, word in enumerate(left):
        places[word] = places.get(word, 0) | 1 << n
    everything = (1 << len(left)) - 1
    open_places = everything
    for word in right:
        hits = open_places & places.get(word, 0)
        open_places = ((open_places + hits) | (open_places - hits)) & everything
    return len(left) - open_places.bit_count()


def cider(generated: Sequence[Words], references: Sequence[Words]) -> Sums:
    """CIDEr-D (Vedantam et al., CVPR 2015) as pycocoevalcap's Cider: the mean of tf-idf cosines over orders 1 to 4,
    with document frequencies of these references. They stay the same in the bootstrap.
    """
    known = [_ngrams(reference) for reference in references]
    documents: Counter[tuple[str, ...]] = Counter()
    for ngrams in known:
        documents.update(ngrams.keys())
    log_documents = float(np.log(len(references)))

    def vector(counts: Counter[tuple[str, ...]]) -> tuple[list[dict[tuple[str, ...], float]], Array, int]:
        parts: list[dict[tuple[str, ...], float]] = [{} for _ in range(_ORDERS)]
        for ngram, count in counts.items():
            parts[len(ngram) - 1][ngram] = count * (log_documents - float(np.log(max(1, documents[ngram]))))
        norms = np.asarray([np.sqrt(sum(value * value for value in part.values())) for part in parts])
        return parts, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for hypothesis, reference in zip(generated, known, strict=True):
        parts, norms, length = vector(_ngrams(hypothesis))
        others, other_norms, other_length = vector(reference)
        total = 0.0
        for part, norm, other, other_norm in zip(parts, norms, others, other_norms, strict=True):
            shared = sum(min(value, other.get(ngram, 0.0)) * other.get(ngram, 0.0) for ngram, value in part.items())
            total += shared / (norm * other_norm) if norm and other_norm else shared
        penalty = np.exp(-((length - other_length) ** 2) / (2 * _SIGMA**2))
        scores.append(_CIDER_SCALE * float(penalty) * total / _ORDERS)
    return mean(scores)


def _ngrams(words: Words) -> Counter[tuple[str, ...]]:
    """Count all n-grams of orders 1 to 4."""
    words = tuple(words)
    return Counter(words[n : n + order] for order in range(1, _ORDERS + 1) for n in range(len(words) - order + 1))

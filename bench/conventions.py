"""How far the same texts' scores lie apart between conventions: why a BLEU without its convention says nothing.

    python -m bench.conventions [--quick] [--json]

Real reports of Open-i (out of the torchxrayvision wheel, read in place): each of 590 findings is "predicted" by
the most alike of all others, by shared words. Absolute values are high, because the search knows the reference; what
counts is the spread from row to row.
"""

import importlib.util
import tarfile
from pathlib import Path

import defusedxml.ElementTree

from bench.report import parser, run, show
from radhpc.evaluation.metrics.bootstrap import value
from radhpc.evaluation.metrics.conventions import CONVENTIONS, measures, missing

KINDS = ("bleu_1", "bleu_4", "rouge_l", "rouge_l_f1", "cider")


def findings(limit: int) -> list[str]:
    """The findings of reports that have any, in the order of their files."""
    spec = importlib.util.find_spec("torchxrayvision")
    folder = Path((spec and spec.submodule_search_locations or ["/nowhere"])[0])
    found: list[str] = []
    with tarfile.open(folder / "data" / "NLMCXR_reports.tgz") as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            file = tar.extractfile(member) if member.name.endswith(".xml") else None
            if file is None:
                continue
            text = defusedxml.ElementTree.fromstring(file.read()).findtext(".//AbstractText[@Label='FINDINGS']")
            if text and len(found) < limit:
                found.append(" ".join(text.split()))
    return found


def nearest(texts: list[str], count: int) -> list[str]:
    """For each of the first texts the other one that shares most of its words."""
    bags = [set(text.lower().split()) for text in texts]

    def alike(one: int, other: int) -> float:
        return len(bags[one] & bags[other]) / len(bags[one] | bags[other])

    return [texts[max((m for m in range(len(texts)) if m != n), key=lambda m: alike(n, m))] for n in range(count)]


def main() -> None:
    arguments = parser("conventions", __doc__, "150 reports instead of 590").parse_args()
    texts = findings(600 if arguments.quick else 4000)
    count = min(150 if arguments.quick else 590, len(texts))
    generated, references = nearest(texts, count), texts[:count]
    figures, notes = {}, []
    for name in CONVENTIONS:
        if why := missing(name):
            notes.append(f"{name}: {why}")
            continue
        found = measures(name, generated, references)
        figures |= {f"{name}/{kind}": round(value(found[kind].statistic), 4) for kind in KINDS if kind in found}
    bleu = [figures[name] for name in figures if name.endswith("bleu_4")]
    ratios = {"BLEU-4, highest to lowest convention": max(bleu) / min(bleu)}
    show("The same texts by seven conventions", ratios, figures, "\n".join(notes), arguments.json)


if __name__ == "__main__":
    run(main)

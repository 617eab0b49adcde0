"""Reads findings out of a report by rule, and scores them: what does a generated report get right?

    read("Small left effusion. No pneumothorax.")                     # {"effusion left"}
    f1([read(generated)], [read(reference)])["macro"]

It knows the findings of the drawn radiographs ("phantom") by their common names. A sentence is cut into
phrases at commas and conjunctions; a finding belongs to the side, zone or lobe named in its phrase, or else
in the sentence; a negation reaches forward to the end of its sentence or the next "but", and words such as
"absent" reach back over their phrase. A finding without its side, zone or lobe is not counted.
"""

import re
from collections.abc import Iterable, Sequence

NAMES: tuple[str, ...] = (
    "effusion left", "effusion right", "cardiomegaly", "pneumothorax",
    "nodule upper", "nodule middle", "nodule lower",
    "consolidation right upper", "consolidation right middle", "consolidation right lower",
    "consolidation left upper", "consolidation left lower",
)  # fmt: skip
NORMAL = "normal"  # the class of reports without any finding

_HEART = r"heart|heart size|cardiac (?:silhouette|shadow|size|contours?)|cardiothoracic ratio"
_TERMS = {
    "effusion": r"effusions?|pleural fluid|costophrenic (?:angle|sulcus) (?:is |appears )?blunted"
    r"|blunting of the (?:left |right )?(?:lateral |posterior )?costophrenic|hydrothorax",
    "cardiomegaly": rf"cardiomegaly|(?:enlarged|increased|large|big) (?:{_HEART})"
    rf"|(?:{_HEART})(?: size)? (?:\w+ ){{0,2}}?(?:enlarged|increased|enlargement)"
    r"|(?:cardiac|heart) enlargement|enlargement of the (?:heart|cardiac silhouette)",
    "pneumothorax": r"pneumothora(?:x|ces)|pleural air",
    "nodule": r"nodules?|nodular (?:opacity|opacities|lesion|shadow)|round(?:ed)? (?:opacity|opacities|lesion|shadow)"
    r"|coin lesion",
    "consolidation": r"consolidations?|consolidated|pneumonia"
    r"|air ?space (?:opacity|opacities|opacification|consolidation|disease)",
}
_FINDING = re.compile(r"\b(?:" + "|".join(f"(?P<{kind}>{words})" for kind, words in _TERMS.items()) + r")\b")
_BEFORE = re.compile(
    r"\b(?:no|not|without|neither|nor|never|absence of|absent|clear of|free of|free from|negative for"
    r"|denies|exclud(?:es|ed|ing)|resolution of|rather than)\b"
)
_AFTER = re.compile(r"\b(?:absent|not|excluded|ruled out|resolved|has cleared)\b")
_TURN = re.compile(r"\b(?:but|however|although|except(?: for)?|apart from|yet|whereas|while)\b")
_CUT = re.compile(r",|\band\b|\bwith\b|\bas well as\b|\bplus\b|\bin keeping with\b")
_SIDE = re.compile(r"\b(left|right|bilateral(?:ly)?|both)\b")
_HEIGHT = re.compile(r"\b(upper|middle|mid|lower)\b")
_SENTENCE = re.compile(r"[;:!?\n]|\.(?!\d)")  # not at the point of 3.5 cm


def read(text: str) -> set[str]:
    """Return the names of the findings that a report affirms; an empty set is a normal report."""
    names: set[str] = set()
    words = re.sub(r"[-/]", " ", text.lower())
    for sentence in _SENTENCE.split(words):
        for clause in _TURN.split(re.sub(r"[^\S\n]+", " ", sentence)):
            names |= _clause(clause)
    return names


def f1(
    predicted: Sequence[set[str]], reference: Sequence[set[str]], names: Iterable[str] = (*NAMES, NORMAL)
) -> dict[str, float]:
    """Return F1 for each name, "macro", their mean over the names that the references have, and "micro".

    An empty set counts as the class "normal". A name that is nowhere, or never right, has F1 zero.
    """
    if len(predicted) != len(reference):
        raise ValueError(f"{len(predicted)} predictions for {len(reference)} references")
    pairs = [(p or {NORMAL}, r or {NORMAL}) for p, r in zip(predicted, reference, strict=True)]
    scores: dict[str, float] = {}
    hits, total, occurring = 0, 0, []
    for name in names:
        both = sum(name in p and name in r for p, r in pairs)
        either = sum((name in p) + (name in r) for p, r in pairs)
        scores[name] = 2 * both / either if either else 0.0
        hits, total = hits + both, total + either
        if any(name in r for _, r in pairs):
            occurring.append(scores[name])
    macro = sum(occurring) / len(occurring) if occurring else 0.0
    return {"macro": macro, "micro": 2 * hits / total if total else 0.0, **scores}


def _clause(clause: str) -> set[str]:
    """Return the findings of a clause, in which a negation holds from where it stands to the end."""
    names: set[str] = set()
    negation = _BEFORE.search(clause)
    start = 0
    cuts = [*((cut.start(), cut.end()) for cut in _CUT.finditer(clause)), (len(clause), len(clause))]
    for end, following in cuts:
        phrase = clause[start:end]
        for mention in _FINDING.finditer(phrase):
            denied = negation is not None and negation.start() <= start + mention.start()
            if not denied and not _AFTER.search(phrase, mention.start()):
                names |= _labels(str(mention.lastgroup), phrase, clause)
        start = following
    return names


def _labels(kind: str, phrase: str, clause: str) -> set[str]:
    """Return the names of a finding of that kind with the side and height in its phrase, else in its clause."""
    sides = _SIDE.findall(phrase) or _SIDE.findall(clause)
    heights = [{"mid": "middle"}.get(word, word) for word in _HEIGHT.findall(phrase) or _HEIGHT.findall(clause)]
    if any(side not in ("left", "right") for side in sides):
        sides = ["left", "right"]
    if kind == "effusion":
        names = {f"effusion {side}" for side in sides}
    elif kind == "nodule":
        names = {f"nodule {height}" for height in heights}
    elif kind == "consolidation":
        names = {f"consolidation {side} {height}" for side in sides for height in heights}
    else:
        names = {kind}
    return names & set(NAMES)

"""Writes the report of a drawn study: Findings and Impression, the same facts in varying words.

write([Finding("effusion left", "left", 0.9)], views=1, rng).findings
"A large pleural effusion is present on the left. The heart is not enlarged. No pneumothorax. ..."
"""

from collections.abc import Sequence

import numpy as np

from radhpc.core.sample import Report
from shards.phantom.image import Finding

# {side}, {zone} and {lobe} say where; {size} is the extent in words.
_PRESENT: dict[str, tuple[str, ...]] = {
    "effusion": (
        "There is a {size} {side} pleural effusion.",
        "A {size} pleural effusion is present on the {side}.",
        "{size} {side}-sided pleural effusion with blunting of the costophrenic angle.",
        "The {side} costophrenic angle is blunted by a {size} effusion.",
        "On the {side}, {size} pleural fluid is seen.",
        "{size} amount of pleural fluid at the {side} base.",
    ),
    "cardiomegaly": (
        "The heart is enlarged.",
        "Cardiomegaly is present.",
        "The cardiac silhouette is enlarged.",
        "There is {size} cardiomegaly.",
        "Increased cardiothoracic ratio, in keeping with cardiomegaly.",
        "The heart size is increased.",
    ),
    "pneumothorax": (
        "There is a {size} {side} pneumothorax.",
        "A {side}-sided pneumothorax is seen, with a visible pleural line.",
        "{size} pneumothorax on the {side}.",
        "A {side} pneumothorax shows as a pleural line, without lung markings beyond it.",
        "On the {side}, there is a {size} pneumothorax.",
    ),
    "nodule": (
        "There is a nodule in the {side} {zone} zone.",
        "A round opacity projects over the {side} {zone} zone.",
        "{side} {zone} zone pulmonary nodule.",
        "A well-defined nodule is seen in the {zone} zone of the {side} lung.",
        "In the {side} {zone} zone, a nodular opacity is noted.",
        "Solitary nodule projecting over the {zone} zone on the {side}.",
    ),
    "consolidation": (
        "There is consolidation in the {lobe} lobe.",
        "{lobe} lobe consolidation.",
        "Airspace opacity is seen in the {lobe} lobe.",
        "The {lobe} lobe shows airspace consolidation.",
        "In the {lobe} lobe, there is dense airspace opacification.",
        "Consolidation of the {lobe} lobe, in keeping with pneumonia.",
    ),
}
_SUMMARY: dict[str, tuple[str, ...]] = {
    "effusion": ("{side} pleural effusion.", "{size} {side} effusion.", "Pleural effusion on the {side}."),
    "cardiomegaly": ("Cardiomegaly.", "Enlarged heart.", "Cardiac enlargement."),
    "pneumothorax": ("{side} pneumothorax.", "Pneumothorax on the {side}.", "{size} {side} pneumothorax."),
    "nodule": (
        "{side} {zone} zone nodule.",
        "Pulmonary nodule in the {side} {zone} zone; CT is suggested.",
        "Nodule, {zone} zone of the {side} lung.",
    ),
    "consolidation": ("{lobe} lobe consolidation.", "{lobe} lobe pneumonia.", "Pneumonia of the {lobe} lobe."),
}
_BOTH = ("Bilateral pleural effusions are present.", "There are pleural effusions on both sides.")
_ABSENT: dict[tuple[str, ...], tuple[str, ...]] = {  # kinds that are all absent: sentences that say so
    ("effusion", "pneumothorax"): (
        "No pleural effusion or pneumothorax.",
        "There is neither pneumothorax nor pleural effusion.",
        "No pneumothorax. No pleural effusion.",
        "Pleural spaces are clear, without effusion or pneumothorax.",
    ),
    ("effusion",): ("No pleural effusion.", "The costophrenic angles are sharp.", "Pleural effusion is absent."),
    ("pneumothorax",): ("No pneumothorax.", "There is no evidence of pneumothorax.", "Pneumothorax is not seen."),
    ("cardiomegaly",): (
        "The heart is not enlarged.",
        "Heart size is normal.",
        "The cardiac silhouette is within normal limits.",
        "No cardiomegaly.",
    ),
    ("nodule", "consolidation"): (
        "The lungs are clear.",
        "No focal consolidation or nodule.",
        "Lungs are clear of consolidation, and no nodule is seen.",
        "Absence of focal airspace opacity. No pulmonary nodule.",
    ),
    ("nodule",): ("No nodule is seen.", "No pulmonary nodules.", "There is no suspicious nodule."),
    ("consolidation",): ("No consolidation.", "No focal airspace opacity.", "The lungs are free of consolidation."),
}
_NORMAL = (
    "No acute cardiopulmonary abnormality.",
    "Normal chest radiograph.",
    "No acute disease.",
    "Unremarkable examination of the chest.",
)
_BESIDES = ("The bones are intact.", "The trachea is midline.", "Mediastinal contours are unremarkable.")
_VIEWS = (("Frontal view of the chest.", "PA view."), ("PA and lateral views of the chest.", "Two views of the chest."))
_TOPICS = (("cardiomegaly",), ("effusion", "pneumothorax"), ("nodule", "consolidation"))
_SIZES = ("small", "moderate", "large")


def write(findings: Sequence[Finding], views: int, rng: np.random.Generator) -> Report:
    """Write a report of heart, pleura and lungs, with present and absent findings; the words vary with every draw."""
    body = [_pick(_VIEWS[views - 1], rng)] if rng.random() < 0.2 else []
    for kinds in _TOPICS:
        present = [finding for finding in findings if _kind(finding) in kinds]
        body += _say(present, _PRESENT, rng)
        absent = tuple(kind for kind in kinds if all(_kind(finding) != kind for finding in present))
        if absent:
            body.append(_pick(_ABSENT[absent], rng))
    if rng.random() < 0.2:
        body.append(_pick(_BESIDES, rng))
    summary = _say(findings, _SUMMARY, rng) or [_pick(_NORMAL, rng)]
    return Report(findings=" ".join(body), impression=" ".join(summary))


def _say(findings: Sequence[Finding], words: dict[str, tuple[str, ...]], rng: np.random.Generator) -> list[str]:
    sentences = []
    effusions = [finding for finding in findings if _kind(finding) == "effusion"]
    for finding in findings:
        if len(effusions) == 2 and finding is effusions[1]:
            continue
        if len(effusions) == 2 and finding is effusions[0]:
            sentences.append(_pick(_BOTH, rng))
            continue
        place = finding.label.split(maxsplit=1)[-1]
        size = _SIZES[min(int(3 * finding.extent), 2)]
        wording = _pick(words[_kind(finding)], rng)
        text = wording.format(side=finding.side, zone=place.split()[-1], lobe=place, size=size)
        sentences.append(text[0].upper() + text[1:])
    return sentences


def _kind(finding: Finding) -> str:
    return finding.label.split()[0]


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]

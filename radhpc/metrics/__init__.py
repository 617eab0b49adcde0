"""Measures of written reports, answers and findings: functions of texts, labels and likelihoods."""

from radhpc.metrics import findings
from radhpc.metrics.conventions import CONVENTIONS, KINDS
from radhpc.metrics.scorers import NAMES
from radhpc.sample import CHEXPERT


def score_names() -> tuple[str, ...]:
    """Names of all scores that an evaluation may give; those of findings where it is known what was drawn."""
    asked = [f"vqa/{of}{kind}" for of in ("", "open_", "closed_") for kind in ("exact_match", "token_f1")]
    labels = ("macro", *CHEXPERT, *findings.NAMES)
    return (
        "loss",
        "token_f1",
        "findings_macro_f1",
        *(f"findings_f1/{name}" for name in (*findings.NAMES, "normal", "micro")),
        *(f"{convention}/{kind}" for convention in CONVENTIONS for kind in KINDS),
        *asked,
        *(f"{kind}/{label}" for kind in ("auroc", "auprc", "f1") for label in labels),
        *(name for names in NAMES.values() for name in names),
    )

"""Measures of written reports, answers and findings: functions of texts, labels and likelihoods."""

from radhpc.core.sample import CHEXPERT
from radhpc.evaluation.metrics import findings
from radhpc.evaluation.metrics.conventions import CONVENTIONS, KINDS
from radhpc.evaluation.metrics.scorers import NAMES


def score_names() -> tuple[str, ...]:
    """Return the names of all scores that an evaluation may give."""
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

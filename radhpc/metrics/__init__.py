"""Measures of written reports: pure functions of texts and labels."""

from radhpc.metrics import findings


def score_names() -> tuple[str, ...]:
    """Names of all scores that an evaluation may give; those of findings where it is known what was drawn."""
    return (
        "loss",
        "token_f1",
        "findings_macro_f1",
        *(f"findings_f1/{name}" for name in (*findings.NAMES, "normal", "micro")),
    )

"""Generation for held-out studies, metrics, scores and the report page."""

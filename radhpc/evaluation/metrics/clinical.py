"""Runs the scorers of the package radeval in a separate process: F1-RadGraph, RadCliQ-v1, RaTEScore and GREEN.

    scorer = load("radgraph", Path("/weights/radgraph"), "cpu")
    scorer.measures(generated, references)["radgraph/partial"]

The package changes global settings, prints, and looks for its weights in the Hugging Face cache: so it runs apart, with
the configured folder as that cache and the network switched off. One line of JSON goes in for a set of texts
(generated, references), one comes out (lists of numbers by score, or a problem). Checked against radeval 2.2.1's
source.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError
from radhpc.evaluation.metrics.bootstrap import mean
from radhpc.evaluation.metrics.conventions import Measure

_ABOUT = {
    "radgraph/simple": "F1 of RadGraph's entities, radgraph-xl",
    "radgraph/partial": "F1 of RadGraph's entities and whether they have relations, radgraph-xl",
    "radgraph/complete": "F1 of RadGraph's entities and relations, radgraph-xl",
    "radcliq/v1": "RadCliQ-v1 as published, the mean over reports; lower is better (radeval prints its inverse)",
    "ratescore/mean": "RaTEScore, the mean over reports",
    "green/mean": "GREEN by GREEN-radllama2-7b, the mean over reports",
}
Score = Callable[[list[str], list[str]], dict[str, list[float]]]


class RadevalScorer:
    """The scorer's process, which is kept for the next texts."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        offline = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "radhpc.evaluation.metrics.clinical", name, str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **offline},
        )  # fmt: skip

    def measures(self, generated: Sequence[str], references: Sequence[str]) -> dict[str, Measure]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps([list(generated), list(references)]) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer: dict[str, Any] = (
            json.loads(line) if line else {"problem": f"it ended with status {self._process.wait()}"}
        )
        if "problem" in answer:
            raise UserError(f"evaluation.scorers.{self.name}: radeval: {answer['problem']}")
        lower = self.name == "radcliq"
        return {score: Measure(mean(values), _ABOUT[score], lower_is_better=lower) for score, values in answer.items()}

    def __del__(self) -> None:
        if process := getattr(self, "_process", None):
            process.kill()
            process.wait()


def load(name: str, folder: Path, device: str) -> RadevalScorer:
    """Start the scorer of one name in scorers.KINDS; it takes a GPU where it sees one."""
    return RadevalScorer(name, folder)


def _scorer(name: str, folder: str) -> Score:
    """Load the package's own scorer; runs inside the separate process."""
    import radeval

    # Its copy of RadGraph imports from the name that the package had before.
    sys.modules.setdefault("RadEval", radeval)
    if name == "radgraph":
        from radeval.metrics.radgraph import F1RadGraph

        radgraph = F1RadGraph(reward_level="all", model_type="radgraph-xl", model_cache_dir=folder)

        def levels(generated: list[str], references: list[str]) -> dict[str, list[float]]:
            _, each, *_ = radgraph(refs=references, hyps=generated)
            return {f"radgraph/{level}": list(each[n]) for n, level in enumerate(("simple", "partial", "complete"))}

        return levels
    if name == "radcliq":
        from radeval.metrics.RadCliQv1.radcliq import CompositeMetric

        composite = CompositeMetric()
        return lambda generated, references: {"radcliq/v1": list(composite.predict(references, generated)[1])}
    if name == "ratescore":
        from radeval.metrics.RaTEScore.scorer import RaTEScore

        rate = RaTEScore()
        return lambda generated, references: {
            "ratescore/mean": list(rate.compute_score(candidate_list=generated, reference_list=references)[0])
        }
    from radeval.metrics.green_score.green import GREEN

    green = GREEN(folder, output_dir=folder)
    return lambda generated, references: {"green/mean": list(green(refs=references, hyps=generated)[2])}


def main(name: str, folder: str) -> None:
    """Answer lines by lines; what the package prints goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    score: Score | None = None
    for line in sys.stdin:
        generated, references = json.loads(line)
        try:
            score = score or _scorer(name, folder)
            answer: dict[str, Any] = {
                key: [float(value) for value in values] for key, values in score(generated, references).items()
            }
        except Exception as error:
            answer = {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        out.write(json.dumps(answer) + "\n")
        out.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

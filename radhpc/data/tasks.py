"""Choose what a study is asked and what it should answer: the mixture of tasks, a pure function of study and epoch.

Enters: a Sample and the epoch that it is drawn in. Leaves: a TaskExample, or None where no task of the recipe fits.

    tasks = Tasks(recipe.text, recipe.findings, recipe.seed)
    tasks.draw(sample, epoch=0)      # TaskExample("rare", "Is there Fracture? Answer yes or no.", "yes")
    tasks.default(sample)            # the same in every epoch: what the study is evaluated by

A sample with a question of its own is asked that, where a task takes questions: a closed one whose set holds the
answer, else an open one. All others choose among what they can serve, by weight. Nothing is stored: after a resume, and
on any number of ranks, the same study in the same epoch is asked the same.
"""

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from radhpc.core.errors import UserError
from radhpc.core.recipe import FindingsSettings, Recipe, Stage, TaskSettings, TextSettings
from radhpc.core.sample import Sample
from radhpc.data.source import Source

LANGUAGES = {
    "en": "English", "es": "Spanish", "de": "German", "fr": "French", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "ca": "Catalan", "zh": "Chinese", "ja": "Japanese", "ko": "Korean", "vi": "Vietnamese",
}  # fmt: skip
CHECKED_STUDIES = 64  # studies of each stage, before it starts


class AnswerNotAllowed(ValueError):
    """A closed question has an answer that is none of those allowed."""


class TaskExample(NamedTuple):
    """One task of one study. Without an answer it cannot be learnt, only asked."""

    task: str  # the name in the recipe
    prompt: str
    answer: str


class Tasks:
    """The tasks of a stage."""

    def __init__(self, text: TextSettings, findings: FindingsSettings, seed: int) -> None:
        self.mixture, self.findings, self._seed = text.mixture(), findings, seed

    def draw(self, sample: Sample, epoch: int = 0) -> TaskExample | None:
        """Return the task of a study in an epoch. Raises AnswerNotAllowed."""
        fitting = self._fitting(sample)
        if not fitting:
            return None
        name = _weighted(fitting, self._number(sample, epoch, "task"))
        return self._asked(name, sample, epoch)

    def default(self, sample: Sample) -> TaskExample | None:
        """Return the first task of the recipe that a study can serve; answers outside a closed set are accepted."""
        try:
            fitting = self._fitting(sample)
        except AnswerNotAllowed:
            return TaskExample("", self.question_prompt(sample.question or "", sample.language), sample.answer or "")
        return self._asked(next(iter(fitting)), sample, 0) if fitting else None

    def default_prompt(self, language: str = "en") -> str:
        """Return the prompt for an image about which nothing else is known: of the first task that needs no study."""
        for task in self.mixture.values():
            if task.kind in ("report", "caption", "findings"):
                return self._prompt(task, language, {})
        return ""

    def question_prompt(self, question: str, language: str = "en") -> str:
        """Return a user's question in the words of the recipe's first open question."""
        tasks = [task for task in self.mixture.values() if task.kind == "question"]
        if not tasks:
            return question
        task = next((task for task in tasks if not task.answers), tasks[0])
        return self._prompt(task, language, {"question": question})

    def known_findings(self, sample: Sample) -> dict[str, bool]:
        """Return the findings of the recipe's vocabulary that the study makes a statement about."""
        labels = sample.labels.get(self.findings.vocabulary, {})
        uncertain = {"ignore": None, "present": 1, "absent": 0}[self.findings.uncertain]
        values = {name: uncertain if labels.get(name) == -1 else labels.get(name) for name in self.findings.names}
        return {name: bool(value) for name, value in values.items() if value is not None}

    def _fitting(self, sample: Sample) -> dict[str, float]:
        """Return the tasks that a study can serve, in the recipe's order, with their weights."""
        questions = {name: task for name, task in self.mixture.items() if task.kind == "question"}
        if sample.question and sample.answer and questions:
            return self._questions(sample, questions)
        return {name: task.weight for name, task in self.mixture.items() if self._serves(task, sample)}

    def _questions(self, sample: Sample, questions: dict[str, TaskSettings]) -> dict[str, float]:
        answer = _folded(sample.answer or "")
        closed = {n: t for n, t in questions.items() if t.answers and answer in map(_folded, t.answers)}
        fitting = closed or {name: task for name, task in questions.items() if not task.answers}
        if not fitting:
            closed_answer = sample.labels.get("answer type", {}).get("closed")
            if closed_answer == 0:
                return {}  # an open question, and a recipe of closed ones
            allowed = ", ".join(answer for task in questions.values() for answer in task.answers or ())
            raise AnswerNotAllowed(f"the answer to a closed question is none of {allowed}")
        return {name: task.weight for name, task in fitting.items()}

    def _serves(self, task: TaskSettings, sample: Sample) -> bool:
        match task.kind:
            case "report":
                return bool(sample.report.text(_sections(task)))
            case "caption":
                return bool(sample.report.other)
            case "findings":
                return bool(self.known_findings(sample))
            case "finding":
                return bool(self.known_findings(sample).keys() & set(task.findings or self.findings.names))
            case "question":
                return False  # without a question there is nothing to ask

    def _asked(self, name: str, sample: Sample, epoch: int) -> TaskExample:
        task, language = self.mixture[name], sample.language
        match task.kind:
            case "report":
                return TaskExample(name, self._prompt(task, language, {}), sample.report.text(_sections(task)))
            case "caption":
                return TaskExample(name, self._prompt(task, language, {}), sample.report.other or "")
            case "question":
                answer = sample.answer or ""
                allowed = [known for known in task.answers or () if _folded(known) == _folded(answer)]
                values = {"question": sample.question or ""}
                return TaskExample(name, self._prompt(task, language, values), allowed[0] if allowed else answer)
            case "findings":
                present = [finding for finding, is_present in self.known_findings(sample).items() if is_present]
                return TaskExample(name, self._prompt(task, language, {}), ", ".join(present) or task.nothing)
            case "finding":
                finding, is_present = self._finding(task, sample, epoch)
                yes, no = task.answers or ("yes", "no")
                return TaskExample(name, self._prompt(task, language, {"finding": finding}), yes if is_present else no)

    def _finding(self, task: TaskSettings, sample: Sample, epoch: int) -> tuple[str, bool]:
        """Choose the finding that a study is asked about: a present one in the share `positive` of all cases."""
        asked = set(task.findings or self.findings.names)
        known = {finding: is_present for finding, is_present in self.known_findings(sample).items() if finding in asked}
        present = [finding for finding, is_present in known.items() if is_present]
        absent = [finding for finding, is_present in known.items() if not is_present]
        ask_present = self._number(sample, epoch, "positive") < task.positive
        chosen = (present if ask_present else absent) or present or absent
        finding = chosen[int(self._number(sample, epoch, "finding") * len(chosen))]
        return finding, known[finding]

    def _prompt(self, task: TaskSettings, language: str, values: dict[str, str]) -> str:
        answers = task.answers or (("yes", "no") if task.kind == "finding" else ())
        return task.prompt.format(
            **{
                "language": LANGUAGES.get(language.split("-")[0].lower(), language),
                "sections": " and ".join(name.capitalize() for name in _sections(task)),
                "findings": ", ".join(self.findings.names),
                "answers": " or ".join(answers),
                **values,
            }
        )

    def _number(self, sample: Sample, epoch: int, purpose: str) -> float:
        """Return a number in [0, 1), the same whenever the study comes up in this epoch."""
        text = f"{self._seed}/{epoch}/{sample.key}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big") / 2**56


def check(recipe: Recipe, stage: Stage, source: Source) -> None:
    """Refuse a stage whose studies can serve none of its tasks, so that nothing would be learnt. Raises UserError."""
    import numpy as np

    tasks, text = Tasks(recipe.text_of(stage), recipe.findings, recipe.seed), recipe.text_of(stage)
    start = 0
    for part in source.datasets:
        count = len(part.rows)
        some = start + np.unique(np.linspace(0, max(0, count - 1), min(count, CHECKED_STUDIES)).astype(np.int64))
        start += count
        samples = list(source.samples(some)) if count else []
        if not samples or any(_answered(tasks, sample) for sample in samples):
            continue
        has = sorted(_offers(samples))
        named = f"text.tasks {', '.join(text.tasks)}" if text.tasks else f"text.sections {', '.join(text.sections)}"
        raise UserError(
            f"stage '{stage.name}': {part.url}: none of {len(samples)} studies has what {named} would learn; they have "
            f"{', '.join(has) or 'nothing to learn'}"
        )


def _answered(tasks: Tasks, sample: Sample) -> bool:
    try:
        return tasks.draw(sample) is not None
    except AnswerNotAllowed:
        return True  # the stream names the sample


def _offers(samples: Iterable[Sample]) -> set[str]:
    """Return what could be learnt from these studies."""
    offers = set()
    for sample in samples:
        offers |= {name for name in ("findings", "impression", "other") if getattr(sample.report, name)}
        offers |= {"questions"} if sample.question else set()
        offers |= {f"labels of {vocabulary}" for vocabulary in sample.labels}
    return offers


def _sections(task: TaskSettings) -> tuple[str, ...]:
    return task.sections or ("findings", "impression")


def _folded(answer: str) -> str:
    """Return an answer without its case and its full stop, for comparisons."""
    return answer.strip().rstrip(".").casefold()


def _weighted(weights: dict[str, float], number: float) -> str:
    """Return the name that a number in [0, 1) falls on."""
    rest = number * sum(weights.values())
    for name, weight in weights.items():
        rest -= weight
        if rest < 0:
            return name
    return name

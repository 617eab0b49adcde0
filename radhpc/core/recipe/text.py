"""Define what a model sees of a study and is asked about it: tasks, prompts, findings, images."""

import string
from typing import Literal

from pydantic import Field, model_validator

from radhpc.core.recipe.section import Section
from radhpc.core.sample import CHEXPERT

PLACEHOLDERS = {
    "report": ("language", "sections"),
    "caption": ("language",),
    "question": ("language", "question", "answers"),
    "findings": ("language", "findings"),
    "finding": ("language", "finding", "answers"),
}


class TaskSettings(Section):
    """One thing that a study can teach, with its prompt; tasks.py says which studies can serve which."""

    kind: Literal["report", "caption", "question", "findings", "finding"] = Field(
        description="report: sections of the report; caption: text that belongs to no section; question: the data's "
        "own question and answer; findings: the names of all that is present; finding: yes or no to one of them"
    )
    prompt: str = Field(
        min_length=1,
        description="with {language} anywhere; {sections} of a report; {question}, {answers} of a question; "
        "{findings}; {finding}, {answers} of one finding",
    )
    weight: float = Field(1.0, gt=0, description="how often it is chosen among those that a study can serve")
    sections: tuple[Literal["findings", "impression", "other"], ...] | None = Field(
        None, min_length=1, description="report: those that are learnt, in order; default: findings, impression"
    )
    answers: tuple[str, ...] | None = Field(
        None, min_length=2, description="question: the closed set; finding: present, absent; default there: yes, no"
    )
    findings: tuple[str, ...] | None = Field(
        None, min_length=1, description="finding: asked about these alone, such as rare ones; default: all"
    )
    positive: float = Field(
        0.5, ge=0, le=1, description="finding: how often one that is present is asked about, if there is any"
    )
    nothing: str = Field("none", min_length=1, description="findings: the answer where nothing is present")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "TaskSettings":
        for key, kinds in _OF_KIND.items():
            if getattr(self, key) != TaskSettings.model_fields[key].default and self.kind not in kinds:
                raise ValueError(f"'{key}' goes with kind {' or '.join(kinds)}, not with '{self.kind}'")
        if self.kind == "finding" and self.answers is not None and len(self.answers) != 2:
            raise ValueError(f"answers {list(self.answers)}: two are wanted, for present and for absent")
        allowed = PLACEHOLDERS[self.kind]
        try:
            placeholders = [name for _, name, _, _ in string.Formatter().parse(self.prompt) if name is not None]
        except ValueError as error:
            raise ValueError(
                f"prompt '{self.prompt}': {error}; a brace that is meant as one is written twice"
            ) from error
        for name in placeholders:
            if name not in allowed:
                raise ValueError(f"prompt: unknown placeholder {{{name}}}; allowed are {', '.join(allowed)}")
        if self.kind in ("question", "finding") and self.kind not in placeholders:
            raise ValueError(f"prompt '{self.prompt}': {{{self.kind}}} is missing, so that nothing would be asked")
        return self


_OF_KIND = {
    "sections": ("report",),
    "answers": ("question", "finding"),
    "findings": ("finding",),
    "positive": ("finding",),
    "nothing": ("findings",),
}


class TextSettings(Section):
    """The questions to the model and the expected answers."""

    prompt: str = Field("Write the report of this chest radiograph.", description="for studies without a question")
    sections: tuple[Literal["findings", "impression", "other"], ...] = Field(
        ("findings", "impression"),
        min_length=1,
        description="sections of the report that are learnt, in order; 'other' is what belongs to neither: captions, "
        "reports without headings, but also indications and comparisons",
    )
    tasks: dict[str, TaskSettings] = Field(
        default_factory=dict,
        description="instead of 'prompt' and 'sections': a mixture by name; the first that a study can serve is the "
        "one that it is evaluated by",
    )
    neighbours: int = Field(
        0,
        ge=0,
        le=8,
        description="reports of so many training studies that look alike stand before the prompt of a report: in "
        "training never one of the same patient",
    )
    max_tokens: int = Field(
        512, ge=8, description="longest prompt and answer together; longer answers are cut, and counted"
    )

    @model_validator(mode="after")
    def _one_way(self) -> "TextSettings":
        for key in ("prompt", "sections"):
            if self.tasks and getattr(self, key) != TextSettings.model_fields[key].default:
                raise ValueError(f"'{key}' goes without 'tasks': each task has its own")
        if self.neighbours and not any(task.kind == "report" for task in self.mixture().values()):
            raise ValueError(f"'neighbours' {self.neighbours} stand before the prompt of a report: no task is a report")
        return self

    def mixture(self) -> dict[str, TaskSettings]:
        """Return the tasks; if none are named, those that `prompt` and `sections` stand for."""
        if self.tasks:
            return self.tasks
        prompt = self.prompt.replace("{", "{{").replace("}", "}}").replace("{{language}}", "{language}")
        return {
            "question": TaskSettings(kind="question", prompt="{question}"),  # type: ignore[call-arg]
            "report": TaskSettings(kind="report", prompt=prompt, sections=self.sections),  # type: ignore[call-arg]
        }


class FindingsSettings(Section):
    """The findings that classification and questions about findings are made of."""

    vocabulary: str = Field("chexpert", description="which of a sample's labels count")
    names: tuple[str, ...] = Field(CHEXPERT, min_length=1, description="in the order of the multi-label head")
    uncertain: Literal["ignore", "present", "absent"] = Field("ignore", description="what the label -1 counts as")

    @model_validator(mode="after")
    def _names_of_the_vocabulary(self) -> "FindingsSettings":
        if self.vocabulary != "chexpert" and "names" not in self.model_fields_set:
            raise ValueError(f"vocabulary '{self.vocabulary}' needs 'names'; only chexpert's are known")
        if len(set(self.names)) < len(self.names):
            raise ValueError("names must differ")
        return self


class ImageSettings(Section):
    """The views of a study that the model sees, in training, evaluation and generation alike."""

    views: int | None = Field(
        None,
        ge=1,
        description="of a study at most, the first ones in the archive's order; default: all, and four if stitched",
    )
    stitch: bool = Field(False, description="put them side by side, as one picture")
    gap: int = Field(10, ge=0, description="black pixels between stitched views")
    order: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="of projections as the archive names them, such as [PA, AP, LATERAL, LL, L]: these first, the rest "
        "behind; default: the archive's order, which builders make PA, AP, lateral ones, the rest",
    )

    @model_validator(mode="after")
    def _gap_goes_with_stitch(self) -> "ImageSettings":
        if not self.stitch and self.gap != ImageSettings.model_fields["gap"].default:
            raise ValueError(f"'gap' {self.gap} goes with 'stitch: true'")
        return self

    @property
    def limit(self) -> int | None:
        """Return the largest number of views of a study; None: all."""
        return self.views or (4 if self.stitch else None)

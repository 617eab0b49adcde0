"""Answers studies for `generate` and `demo`: a study goes in, a text comes out, with the warnings that belong to it.

    pipeline = Pipeline(context, DecodingOptions.of(context.recipe.evaluation))
    for answer in pipeline.answer([StudyInput("case 1", [picture])], question=None, batch=8):
        answer.text, answer.sections, answer.warnings, answer.neighbours

Enters: views of 8 bits as image_decoding.py decodes them, with the modality that a DICOM file names. Leaves: Answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.data import sampler
from radhpc.data.input_check import radiograph_warnings
from radhpc.serving.feature_index import FeatureIndex, Neighbour, features
from radhpc.serving.inference import DecodingOptions, answers, sections, stream
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import restore_engine
from radhpc.training.sources import open_source

INSPECTED = 512  # training samples that are searched for a question
NO_RADIOGRAPH = "no radiograph, as it seems"


@dataclass(frozen=True)
class StudyInput:
    """The views of one study, with a name for people."""

    name: str
    views: Sequence[Image.Image]
    modalities: Sequence[str | None] = ()


@dataclass(frozen=True)
class Answer:
    """The model's text, and the reasons to doubt it."""

    name: str
    text: str
    sections: dict[str, str]  # of a report: findings, impression, other
    warnings: list[str]
    neighbours: list[Neighbour] = field(default_factory=list)
    retrieved_reports: list[str] = field(default_factory=list)  # of training studies, which stood in the prompt

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        return {**data, "given": data.pop("retrieved_reports")}


class Pipeline:
    """The newest checkpoint of a run, loaded once."""

    def __init__(self, context: RunContext, decoding: DecodingOptions, neighbours: int = 0) -> None:
        """`neighbours`: training studies to show with each answer. Raises UserError where there is no index of them."""
        self.context, self.decoding = context, decoding
        self.engine, self.cursor = restore_engine(context)
        self.encoder = build_encoder(context, self.cursor.stage)
        self.training = open_source(context, self.cursor.stage, "train")
        self.neighbours = neighbours
        self.index = FeatureIndex.load(context, self.cursor, required=neighbours > 0)
        self._asks: bool | None = None

    def check_question(self) -> str | None:
        """Return a warning if the run was trained on reports alone. Raises UserError if it knows no questions."""
        if self._asks is None:
            source = self.training
            some = sampler.permute(np.arange(min(INSPECTED, len(source))), len(source), sampler.number("questions"))
            self._asks = any(sample.question for sample in source.samples(np.sort(some)))
        if self._asks:
            return None
        if self.context.recipe.model.weights is None:
            raise UserError(
                f"{self.context.run.path}: no question was learnt: its training studies have reports alone; ask none, "
                "or train a stage on question-answer shards"
            )
        return "the run has learnt from reports alone: its answers to questions are those of its original weights"

    def warnings(self, study: StudyInput) -> list[str]:
        """Return the reasons to doubt the pictures: no radiograph, or more views than the model sees."""
        messages = []
        modalities = study.modalities or [None] * len(study.views)
        for number, (view, modality) in enumerate(zip(study.views, modalities, strict=True), 1):
            for doubt in radiograph_warnings(view, modality):
                prefix = f"view {number}: " if len(study.views) > 1 else ""
                messages.append(f"{prefix}{NO_RADIOGRAPH}: {doubt}")
        limit = self.context.recipe.images.limit
        if limit is not None and len(study.views) > limit:
            messages.append(
                f"the model sees the first {limit} of {len(study.views)} views: its recipe says images.views"
            )
        return messages

    def find_neighbours(self, studies: Sequence[StudyInput]) -> list[tuple[list[Neighbour], list[str]]]:
        """Return for each study the nearest training studies, and a warning if none is near."""
        if self.index is None:
            return [([], []) for _ in studies]
        vectors = features(self.engine, self.encoder, [study.views for study in studies])
        result = []
        for vector in vectors:
            distance = self.index.describe_distance(vector)
            warnings = [f"unlike what the model was trained on: {distance}"] if distance else []
            result.append((self.index.nearest(vector, self.neighbours), warnings))
        return result

    def answer(self, studies: Sequence[StudyInput], question: str | None = None, batch: int = 1) -> Iterator[Answer]:
        """Yield an answer to each study, in their order."""
        unlearnt = self.check_question() if question else None
        for start in range(0, len(studies), batch):
            some = studies[start : start + batch]
            texts = answers(self.engine, self.encoder, [study.views for study in some], question, self.decoding, batch)
            for study, text, (neighbours, far) in zip(some, texts, self.find_neighbours(some), strict=True):
                warnings = [*self.warnings(study), *far, *([unlearnt] if unlearnt else [])]
                retrieved = [] if question else self.encoder.neighbour_texts(study.views)
                yield Answer(study.name, text, {} if question else sections(text), warnings, neighbours, retrieved)

    def stream(self, study: StudyInput, question: str | None = None) -> Iterator[str]:
        """Yield the text in pieces, as it is generated."""
        if question:
            self.check_question()
        return stream(self.engine, self.encoder, study.views, question, self.decoding)

"""What `generate` and `demo` share: a study goes in, a text comes out, with all that should make its reader doubt it.

    reader = Reader(context, Decoding.of(context.recipe.evaluation))
    for answer in reader.read([Study("case 1", [picture])], question=None, batch=8):
        answer.text, answer.sections, answer.warnings, answer.neighbours

Enters: views of 8 bits as image_decoding.py decodes them, with the modality that a DICOM told. Leaves: Answer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.data import sampler
from radhpc.data.input_check import radiograph_warnings
from radhpc.serving.feature_index import Index, Neighbour, features
from radhpc.serving.inference import Decoding, answers, sections, stream
from radhpc.training.context import RunContext
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import restore_engine
from radhpc.training.sources import open_source

LOOKED_AT = 512  # training samples, to know whether any of them asks a question
NO_RADIOGRAPH = "no radiograph, as it seems"


@dataclass(frozen=True)
class Study:
    """The views of one study, under a name for people."""

    name: str
    views: Sequence[Image.Image]
    modalities: Sequence[str | None] = ()


@dataclass(frozen=True)
class Answer:
    """What the model says, and what speaks against believing it."""

    name: str
    text: str
    sections: dict[str, str]  # of a report: findings, impression, other
    warnings: list[str]
    neighbours: list[Neighbour] = field(default_factory=list)
    given: list[str] = field(default_factory=list)  # reports of training studies that the model got to read

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Reader:
    """The newest checkpoint of a run, loaded once."""

    def __init__(self, context: RunContext, decoding: Decoding, neighbours: int = 0) -> None:
        """`neighbours`: training studies to show with each answer. Raises UserError where there is no index of them."""
        self.context, self.decoding = context, decoding
        self.engine, self.cursor = restore_engine(context)
        self.encoder = build_encoder(context, self.cursor.stage)
        self.training = open_source(context, self.cursor.stage, "train")
        self.neighbours = neighbours
        self.index = Index.load(context, self.cursor, required=neighbours > 0)
        self._asks: bool | None = None

    def check_question(self) -> str | None:
        """A warning where the run has learnt from reports alone. Raises UserError where it can know no question."""
        if self._asks is None:
            source = self.training
            some = sampler.permute(np.arange(min(LOOKED_AT, len(source))), len(source), sampler.number("questions"))
            self._asks = any(sample.question for sample in source.samples(np.sort(some)))
        if self._asks:
            return None
        if self.context.recipe.model.weights is None:
            raise UserError(
                f"{self.context.run.path}: no question was learnt: its training studies have reports alone; ask none, "
                "or train a stage on question-answer shards"
            )
        return "the run has learnt from reports alone: what the model says to a question is what its weights brought"

    def warnings(self, study: Study) -> list[str]:
        """What speaks against the pictures, by the plain test and by the distance to the training studies."""
        told = []
        modalities = study.modalities or [None] * len(study.views)
        for number, (view, modality) in enumerate(zip(study.views, modalities, strict=True), 1):
            for doubt in radiograph_warnings(view, modality):
                which = f"view {number}: " if len(study.views) > 1 else ""
                told.append(f"{which}{NO_RADIOGRAPH}: {doubt}")
        limit = self.context.recipe.images.limit
        if limit is not None and len(study.views) > limit:
            told.append(f"the model sees the first {limit} of {len(study.views)} views: its recipe says images.views")
        return told

    def near(self, studies: Sequence[Study]) -> list[tuple[list[Neighbour], list[str]]]:
        """For each study the nearest training studies, if wanted, and a warning where none is near; by the index."""
        if self.index is None:
            return [([], []) for _ in studies]
        vectors = features(self.engine, self.encoder, [study.views for study in studies])
        found = []
        for vector in vectors:
            far = self.index.far(vector)
            told = [f"unlike what the model was trained on: {far}"] if far else []
            found.append((self.index.nearest(vector, self.neighbours), told))
        return found

    def read(self, studies: Sequence[Study], question: str | None = None, batch: int = 1) -> Iterator[Answer]:
        """An answer to each study, in their order."""
        unlearnt = self.check_question() if question else None
        for start in range(0, len(studies), batch):
            some = studies[start : start + batch]
            texts = answers(self.engine, self.encoder, [study.views for study in some], question, self.decoding, batch)
            for study, text, (neighbours, far) in zip(some, texts, self.near(some), strict=True):
                warnings = [*self.warnings(study), *far, *([unlearnt] if unlearnt else [])]
                given = [] if question else self.encoder.neighbour_texts(study.views)
                yield Answer(study.name, text, {} if question else sections(text), warnings, neighbours, given)

    def stream(self, study: Study, question: str | None = None) -> Iterator[str]:
        """The text alone, as it is written."""
        if question:
            self.check_question()
        return stream(self.engine, self.encoder, study.views, question, self.decoding)

"""Turn samples into batches: the prompt and the answer of a task as tokens, and which of them are learnt.

Enters: a Sample with its decoded views. Leaves: an EncodedStudy, and from several of them one padded batch, in which
prompt, image tokens and padding carry the label -100. Example: a study with one view, prompt of 12 tokens and
answer of 30 becomes 43 ids (the end token is learnt too), of which 31 are supervised. Stitched views count as one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from radhpc.core.batch import IGNORE, Batch
from radhpc.core.errors import UserError
from radhpc.core.recipe import FindingsSettings, ImageSettings, TextSettings
from radhpc.core.sample import Sample
from radhpc.data.source import BadSample, RawSample, decode_study
from radhpc.data.tasks import AnswerNotAllowed, TaskExample, Tasks
from radhpc.data.tokenization import TextTokenizer
from radhpc.models.family import Arrays, ModelFamily
from radhpc.models.image_processors import stitch

TARGET_KEYS = ("labels", "findings", "groups")  # in a batch: what a model must not see when it generates
UNKNOWN = -1  # a finding that the study says nothing about

NEIGHBOUR_WORDS = 60  # of the report of a similar training study

_PROMPTS = 4096  # whose tokens are kept


@dataclass(frozen=True)
class EncodedStudy:
    """One study, ready to be batched."""

    key: str
    input_ids: npt.NDArray[np.int64]  # (length,) prompt, then answer
    labels: npt.NDArray[np.int64]  # (length,)
    images: Arrays
    cut: bool = False  # whether the answer was longer than Text.max_tokens allows
    findings: npt.NDArray[np.int8] | None = None  # (names,) 1, 0 or UNKNOWN, where a head learns them
    task: str = ""  # its name in the recipe
    dataset: str = ""

    @property
    def supervised(self) -> int:
        """Tokens that have a loss: the first one is never predicted."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def length(self) -> int:
        return len(self.input_ids)


_BLACK_IMAGE = [Image.new("L", (64, 64))]


class StudyEncoder:
    """Turns samples into EncodedStudy ones, and those into batches."""

    def __init__(
        self,
        family: ModelFamily,
        text: TextSettings,
        images: ImageSettings = ImageSettings(),  # type: ignore[call-arg]  # noqa: B008
        findings: FindingsSettings = FindingsSettings(),  # type: ignore[call-arg]  # noqa: B008
        seed: int = 0,
        labelled: bool = False,
    ) -> None:
        """`labelled`: whether batches hold the findings, too. Raises UserError for a prompt that leaves no room."""
        self.family, self.text, self.images, self.labelled = family, text, images, labelled
        self.tokenizer = TextTokenizer(family.tokenizer, getattr(family, "image_token_id", None))
        self.tasks = Tasks(text, findings, seed)
        self.loss_groups: tuple[tuple[str, str], ...] = ()  # whose losses are reported apart: set_loss_groups
        # Views and patient -> reports of similar training studies, where the recipe wants them: retrieval_indexes.py
        self.retrieve: Callable[[Sequence[Image.Image], str], list[str]] | None = None
        self._prompt_ids: dict[tuple[str, int], list[int]] = {}  # of prompts, by number of views
        for name, task in self.tasks.mixture.items():
            if (
                task.kind in ("report", "caption", "findings")
                and len(ids := self.tokenizer.text(task.prompt)) >= text.max_tokens
            ):
                where = f"text.tasks.{name}" if text.tasks else "text.prompt"
                raise UserError(
                    f"{where}: a prompt of {len(ids)} tokens leaves no room for an answer in text.max_tokens "
                    f"{text.max_tokens}"
                )

    def set_loss_groups(self, datasets: Sequence[str]) -> None:
        """Let batches say which of these datasets and which task each row belongs to, from now on."""
        names = dict.fromkeys(datasets)
        self.loss_groups = (*(("dataset", name) for name in names), *(("task", name) for name in self.text.mixture()))

    def reference(self, sample: Sample) -> str:
        """Return the reference answer of an evaluation: that of the first task that the study can serve."""
        example = self.tasks.default(sample)
        return example.answer if example else ""

    def read(self, raw: RawSample) -> EncodedStudy:
        """Decode and encode one sample for training. Raises BadSample."""
        key, sample, views = decode_study(raw)
        try:
            example = self.tasks.draw(sample, raw.epoch)
        except AnswerNotAllowed as error:
            raise BadSample(key, str(error)) from error
        row = self._encode(key, sample, views, example)
        if row.length > self.text.max_tokens and row.supervised:
            tokens = f"{row.length - row.supervised} tokens"
            raise BadSample(
                key, f"a question of {tokens} leaves no room for an answer in text.max_tokens {self.text.max_tokens}"
            )
        return row

    def encode(self, key: str, sample: Sample, views: Sequence[Image.Image]) -> EncodedStudy:
        """Encode the prompt and what reference() says, for an evaluation."""
        return self._encode(key, sample, views, self.tasks.default(sample))

    def _encode(
        self, key: str, sample: Sample, views: Sequence[Image.Image], example: TaskExample | None
    ) -> EncodedStudy:
        """Encode prompt and answer. A study that serves no task has no supervised token: nothing is learnt from it."""
        text = example.prompt if example else self.tasks.default_prompt(sample.language)
        text = self._grounded(text, example, views, sample.patient)
        images, prompt = self._encode_prompt_and_images(text, self.order_views(views, sample))
        ids = (
            [*self.tokenizer.text(example.answer), self.family.tokenizer.eos_token_id]
            if example and example.answer
            else []
        )
        room = max(1, self.text.max_tokens - len(prompt))
        cut = len(ids) > room
        ids = ids[:room]
        return EncodedStudy(
            key,
            np.asarray(prompt + ids, np.int64),
            np.asarray([IGNORE] * len(prompt) + ids, np.int64),
            images,
            cut,
            self._findings(sample),
            example.task if example else "",
            sample.dataset,
        )

    def encode_prompt(
        self, key: str, question: str | None, views: Sequence[Image.Image], sample: Sample | None = None
    ) -> EncodedStudy:
        """Encode for generation: the prompt alone. It is that of the sample's usual task, in its language; else of the
        question; else of the recipe's first task that needs neither.
        """
        language = sample.language if sample else "en"
        example = self.tasks.default(sample) if sample is not None and not (question and not sample.answer) else None
        if example is not None:
            text = example.prompt
        elif question:
            text = self.tasks.question_prompt(question, language)
        else:
            text = self.tasks.default_prompt(language)
        if not question and views is not _BLACK_IMAGE:
            text = self._grounded(text, example, views, sample.patient if sample else "")
        images, prompt = self._encode_prompt_and_images(text, self.order_views(views, sample))
        ids = np.asarray(prompt, np.int64)
        return EncodedStudy(key, ids, np.full_like(ids, IGNORE), images)

    def neighbour_texts(self, views: Sequence[Image.Image], patient: str = "") -> list[str]:
        """Return the texts before the prompt of a report: the beginning of each similar study's report."""
        reports = self.retrieve(views, patient) if self.retrieve is not None else []
        return [" ".join(text.split()[:NEIGHBOUR_WORDS]) for text in reports]

    def _grounded(self, prompt: str, example: TaskExample | None, views: Sequence[Image.Image], patient: str) -> str:
        """Put the reports of similar studies before the prompt of a report, if the recipe asks for them."""
        if example is not None and example.task and self.tasks.mixture[example.task].kind != "report":
            return prompt
        reports = [f"Similar study {n}: {text}" for n, text in enumerate(self.neighbour_texts(views, patient), 1)]
        return "\n".join([*reports, prompt])

    def _findings(self, sample: Sample) -> npt.NDArray[np.int8] | None:
        if not self.labelled:
            return None
        known = self.tasks.known_findings(sample)
        return np.asarray([int(known.get(name, UNKNOWN)) for name in self.tasks.findings.names], np.int8)

    def empty(self) -> EncodedStudy:
        """Return a slot without a sample: a black image and a prompt, nothing supervised. Every rank computes as many
        forward passes as its peers, and none ever meets a batch without an image.
        """
        return self.encode_prompt("", None, _BLACK_IMAGE)

    def batch(self, rows: Sequence[EncodedStudy], left: bool = False) -> Batch:
        """Pad to the longest row: on the right for training, on the left for generation."""
        length = max(len(row.input_ids) for row in rows)
        ids = np.full((len(rows), length), self.family.tokenizer.pad_token_id, np.int64)
        mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORE)
        for n, row in enumerate(rows):
            where = slice(length - len(row.input_ids), length) if left else slice(0, len(row.input_ids))
            ids[n, where], mask[n, where], labels[n, where] = row.input_ids, 1, row.labels
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            **self._collated_findings(rows, left),
            **self._collated_groups(rows, left),
            **self.family.collate_images([row.images for row in rows], ids),
        }

    def _collated_findings(self, rows: Sequence[EncodedStudy], left: bool) -> Batch:
        """Return (rows, names); the findings of a slot without a sample are unknown."""
        if not self.labelled or left:
            return {}
        unknown = np.full(len(self.tasks.findings.names), UNKNOWN, np.int8)
        known = [unknown if row.findings is None else row.findings for row in rows]
        return {"findings": torch.from_numpy(np.stack(known))}

    def order_views(self, views: Sequence[Image.Image], sample: Sample | None) -> Sequence[Image.Image]:
        """Sort the views by their projections as the recipe asks; those of one projection keep their order."""
        if self.images.order is None or sample is None:
            return views
        first = {name.casefold(): n for n, name in enumerate(self.images.order)}
        known = [first.get((view.view or "").casefold(), len(first)) for view in sample.images]
        known += [len(first)] * (len(views) - len(known))
        return [views[n] for n in sorted(range(len(views)), key=known.__getitem__)]

    def _collated_groups(self, rows: Sequence[EncodedStudy], left: bool) -> Batch:
        """Return (rows, groups) of 0 and 1: the dataset and the task of each row."""
        if not self.loss_groups or left:
            return {}
        membership = [[getattr(row, kind) == name for kind, name in self.loss_groups] for row in rows]
        return {"groups": torch.tensor(membership, dtype=torch.float32)}

    def _shown(self, views: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """Return the pictures that the model sees of a study: as many views as the recipe allows, or all in one."""
        views = views[: self.images.limit]
        return [stitch(views, self.images.gap, len(views))] if self.images.stitch else views

    def _encode_prompt_and_images(self, prompt: str, views: Sequence[Image.Image]) -> tuple[Arrays, list[int]]:
        """Return the images of a study and the ids of its prompt, with as many image tokens as the images take."""
        views = self._shown(views)
        assert views, "the stream gives no study without an image"
        images = self.family.encode_images(views)
        return images, self.family.expand_image_tokens(self._prompt(prompt, len(views)), images)

    def _prompt(self, prompt: str, views: int) -> list[int]:
        if (prompt, views) not in self._prompt_ids:
            if len(self._prompt_ids) > _PROMPTS:  # every question is one
                self._prompt_ids.clear()
            self._prompt_ids[prompt, views] = self.tokenizer.chat(prompt, lambda text: self.family.prompt(text, views))
        return self._prompt_ids[prompt, views]


def conversation(sample: Sample, text: TextSettings, findings: FindingsSettings = FindingsSettings()) -> str:  # type: ignore[call-arg]  # noqa: B008
    """Return the text of a sample, question and answer, as a tokenizer is trained on it."""
    example = Tasks(text, findings, 0).default(sample)
    return f"{example.prompt}\n{example.answer}" if example else sample.report.text()

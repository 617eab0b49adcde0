"""Samples to batches: what the model is asked, what it shall answer, and what it is not taught.

Enters: a Sample with its decoded views. Leaves: an Encoded, and from several of them one padded batch, in which
prompt, image tokens and padding carry the label -100. Example: a study with one view, prompt of 12 tokens and
answer of 30 becomes 43 ids (the end token is learnt too), of which 31 are supervised. Stitched views count as one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from radhpc.models import Arrays, ModelFamily
from radhpc.processors import stitch
from radhpc.recipe import Images, Text
from radhpc.sample import Sample
from radhpc.source import Raw, study

IGNORE = -100  # PyTorch's label for "no loss here"

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Encoded:
    """One study, ready to be batched."""

    key: str
    input_ids: npt.NDArray[np.int64]  # (length,) prompt, then answer
    labels: npt.NDArray[np.int64]  # (length,)
    images: Arrays
    cut: bool = False  # whether the answer was longer than Text.max_tokens allows

    @property
    def supervised(self) -> int:
        """Tokens that have a loss: the first one is never predicted."""
        return int((self.labels[1:] != IGNORE).sum())

    @property
    def length(self) -> int:
        return len(self.input_ids)


class Encoder:
    """Turns samples into Encoded ones, and those into batches."""

    def __init__(self, family: ModelFamily, text: Text, images: Images = Images()) -> None:  # type: ignore[call-arg]  # noqa: B008
        self.family, self.text, self.images = family, text, images
        self._usual: dict[int, list[int]] = {}  # by number of views: the ids of the recipe's own prompt

    def answer(self, sample: Sample) -> str:
        """What the model shall say: the answer to the question, or the wanted sections of the report."""
        if sample.question:
            return sample.answer or ""
        return sample.report.text(self.text.sections)

    def read(self, raw: Raw) -> Encoded:
        """Decode and encode one sample for training. Raises BadSample."""
        return self.encode(*study(raw))

    def encode(self, key: str, sample: Sample, views: Sequence[Image.Image]) -> Encoded:
        """Encode for training. A study without text has no supervised token: it is passed over, not taught."""
        images, prompt = self._asked(sample.question, views)
        answer = self.answer(sample)
        ids = [*self._ids(answer), self.family.tokenizer.eos_token_id] if answer else []
        room = max(1, self.text.max_tokens - len(prompt))
        cut = len(ids) > room
        ids = ids[:room]
        return Encoded(
            key,
            np.asarray(prompt + ids, np.int64),
            np.asarray([IGNORE] * len(prompt) + ids, np.int64),
            images,
            cut,
        )

    def encode_prompt(self, key: str, question: str | None, views: Sequence[Image.Image]) -> Encoded:
        """Encode for generation: the prompt alone."""
        images, prompt = self._asked(question, views)
        ids = np.asarray(prompt, np.int64)
        return Encoded(key, ids, np.full_like(ids, IGNORE), images)

    def empty(self) -> Encoded:
        """A slot without a sample: a black image and a prompt, nothing supervised. Every rank computes as many
        forward passes as its peers, and none ever meets a batch without an image.
        """
        return self.encode_prompt("", None, [Image.new("L", (64, 64))])

    def batch(self, rows: Sequence[Encoded], left: bool = False) -> Batch:
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
            **self.family.collate_images([row.images for row in rows], ids),
        }

    def _shown(self, views: Sequence[Image.Image]) -> Sequence[Image.Image]:
        """The pictures that the model gets for the views of a study: as many of them as the recipe wants, or one."""
        views = views[: self.images.limit]
        return [stitch(views, self.images.gap, len(views))] if self.images.stitch else views

    def _asked(self, question: str | None, views: Sequence[Image.Image]) -> tuple[Arrays, list[int]]:
        """The images of a study and the ids of its prompt, with as many image tokens as the images take."""
        views = self._shown(views)
        images = self.family.encode_images(views)
        return images, self.family.place_images(self._prompt(question, len(views)), images)

    def _prompt(self, question: str | None, views: int) -> list[int]:
        if question:
            return self._ids(self.family.prompt(question, views))
        if views not in self._usual:
            self._usual[views] = self._ids(self.family.prompt(self.text.prompt, views))
        return self._usual[views]

    def _ids(self, text: str) -> list[int]:
        return list(self.family.tokenizer(text, add_special_tokens=False)["input_ids"])


def conversation(sample: Sample, text: Text) -> str:
    """What a sample says, question and answer, as a tokenizer is trained on it."""
    return f"{sample.question or text.prompt}\n{sample.answer or sample.report.text(text.sections)}"

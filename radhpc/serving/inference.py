"""Generates with a trained model: a report or an answer, for one study or many, at once or word by word.

    settings = DecodingOptions.of(recipe.evaluation, beams=3)
    for text in answers(engine, encoder, studies, None, settings, batch=8): ...
    for piece in stream(engine, encoder, views, "Is there an effusion?", settings): print(piece, end="")

In one process, for people; evaluation over all ranks is generation.py. Greedy unless `beams` or `temperature` say
otherwise.
"""

import queue
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from transformers.generation.streamers import TextStreamer

from radhpc.core.errors import UserError
from radhpc.core.recipe import EvaluationSettings
from radhpc.data.collate import StudyEncoder
from radhpc.engine.fsdp import Engine


@dataclass(frozen=True)
class DecodingOptions:
    """Decoding options of an evaluation, and the seed for sampling."""

    evaluation: EvaluationSettings
    seed: int = 0

    @classmethod
    def of(cls, evaluation: EvaluationSettings, seed: int = 0, **changes: Any) -> "DecodingOptions":
        """Return the recipe's options with the `changes` that are not None. Raises UserError."""
        settings = evaluation.model_copy(update={name: value for name, value in changes.items() if value is not None})
        if settings.top_p is not None and settings.temperature is None:
            raise UserError(f"--top-p {settings.top_p:g}: goes with --temperature, which samples")
        if settings.temperature is not None and settings.beams > 1:
            raise UserError(f"--temperature {settings.temperature:g}: goes with one beam, not {settings.beams}")
        # Drop recipe settings that conflict with the overrides instead of rejecting them.
        fitting = {"length_penalty": None} if settings.beams == 1 else {"cache": "dynamic"}
        least = min(settings.min_new_tokens, settings.max_new_tokens)
        return cls(settings.model_copy(update={**fitting, "min_new_tokens": least}), seed)


def answers(
    engine: Engine,
    encoder: StudyEncoder,
    studies: Sequence[Sequence[Image.Image]],
    question: str | None,
    settings: DecodingOptions,
    batch: int = 1,
) -> Iterator[str]:
    """Yield a text for each study, in their order; `batch` studies go through the model at a time."""
    for start in range(0, len(studies), batch):
        rows = [encoder.encode_prompt("", question, views) for views in studies[start : start + batch]]
        ids = _generate(engine, encoder, rows, settings)
        yield from (text.strip() for text in encoder.family.tokenizer.batch_decode(ids, skip_special_tokens=True))


def stream(
    engine: Engine, encoder: StudyEncoder, views: Sequence[Image.Image], question: str | None, settings: DecodingOptions
) -> Iterator[str]:
    """Yield the text of one study piece by piece as it is generated; with several beams it comes as one piece.

    Generation ends at the next word when the consumer stops reading.
    """
    if settings.evaluation.beams > 1:
        yield from answers(engine, encoder, [views], question, settings)
        return
    pieces: queue.Queue[str | BaseException | None] = queue.Queue()
    given_up = threading.Event()

    class Pieces(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if given_up.is_set():
                raise _GenerationCancelled
            if text:
                pieces.put(text)

    streamer = Pieces(encoder.family.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def write() -> None:
        try:
            _generate(engine, encoder, [encoder.encode_prompt("", question, views)], settings, streamer=streamer)
            pieces.put(None)
        except _GenerationCancelled:
            pass
        except BaseException as error:  # for the consumer to raise
            pieces.put(error)

    writer = threading.Thread(target=write, name="writing", daemon=True)
    writer.start()
    try:
        while (piece := pieces.get()) is not None:
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        given_up.set()
        writer.join()


class _GenerationCancelled(Exception):
    """Raised in the generation when the consumer has stopped reading."""


def _generate(
    engine: Engine, encoder: StudyEncoder, rows: Sequence[Any], settings: DecodingOptions, **more: Any
) -> torch.Tensor:
    """Return token ids of shape (rows, new tokens)."""
    torch.manual_seed(settings.seed)
    batch, evaluation = encoder.batch(rows, left=True), settings.evaluation
    return engine.generate(batch, evaluation.max_new_tokens, **evaluation.decoding(), **more)


def sections(text: str) -> dict[str, str]:
    """Split a report into its sections, named as Report.text writes them: {"findings": ..., "impression": ...}.

    A text without headings, such as a caption or an answer, has none.
    """
    parts = re.split(r"(?:^|\s)(Findings|Impression|Other):\s*", text)
    return {name.lower(): body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}

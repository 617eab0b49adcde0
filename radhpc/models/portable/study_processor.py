"""Process studies for models that transformers has no processor for: exported with weights, independent of radhpc.

    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    processor(images=[[frontal, lateral]], text=[chat])      # a list of views, and a chat, for each study

An image in the chat is one token, which is repeated once for each vector that the language model gets: `study_tokens`
for all views of a study together (SwinQwen, one image token per study), or one for each `merge_size` x `merge_size`
patches of a view (Qwen3-VL, one image token per view).
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import BatchFeature, ProcessorMixin

AUTO_MAP = {"AutoProcessor": "StudyProcessor"}


class StudyProcessor(ProcessorMixin):
    """Turn views and chats into the inputs of a model, padded on the left, for generation."""

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        study_tokens: int | None = None,
        **_: Any,
    ) -> None:
        self.image_token, self.study_tokens = image_token, study_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template)  # type: ignore[no-untyped-call]

    def __call__(
        self, images: Sequence[Sequence[Any]], text: Sequence[str], add_special_tokens: bool = False, **_: Any
    ) -> BatchFeature:
        """Encode `images`, the views of each study as pictures of Pillow, and `text`, the chat of each study.

        Raises ValueError where a chat has another number of image tokens than its study needs.
        """
        studies = [[view.convert("RGB") for view in views] for views in images]
        pixels, tokens = self._means(studies) if self.study_tokens is not None else self._patches(studies)
        if (counts := [chat.count(self.image_token) for chat in text]) != (expected := list(map(len, tokens))):
            raise ValueError(f"the chats have {counts} image tokens {self.image_token}; expected are {expected}")
        chats = [self._repeat_image_token(chat, counts) for chat, counts in zip(text, tokens, strict=True)]
        words = self.tokenizer(
            chats, add_special_tokens=add_special_tokens, padding=True, padding_side="left", return_tensors="pt"
        )
        inputs = {"input_ids": words["input_ids"], "attention_mask": words["attention_mask"], **pixels}
        if self.study_tokens is None:
            image = self.tokenizer.convert_tokens_to_ids(self.image_token)
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == image).int()
        return BatchFeature(inputs)

    def _means(self, studies: Sequence[Sequence[Any]]) -> tuple[dict[str, Any], list[list[int]]]:
        """Return pixel_values (B, V, 3, S, S) and image_sizes (B,), the number of views of each study, whose mean the
        model takes; and how many vectors each study has.
        """
        each = [self.image_processor(images=views, return_tensors="pt")["pixel_values"] for views in studies]
        counts = torch.tensor([len(values) for values in each])
        values = each[0].new_zeros((len(each), int(counts.max()), *each[0].shape[1:]))
        for row, views in zip(values, each, strict=True):
            row[: len(views)] = views
        assert self.study_tokens is not None
        return {"pixel_values": values, "image_sizes": counts}, [[self.study_tokens]] * len(each)

    def _patches(self, studies: Sequence[Sequence[Any]]) -> tuple[dict[str, Any], list[list[int]]]:
        """Return pixel_values (patches, ...) and image_grid_thw (views, 3) of all studies, concatenated; and how many
        vectors each view has.
        """
        pixels = self.image_processor(images=[view for views in studies for view in views], return_tensors="pt")
        counts = iter((pixels["image_grid_thw"].prod(-1) // self.image_processor.merge_size**2).tolist())
        return dict(pixels), [[int(next(counts)) for _ in views] for views in studies]

    def _repeat_image_token(self, chat: str, counts: Sequence[int]) -> str:
        pieces = chat.split(self.image_token)
        longer = [piece + self.image_token * count for piece, count in zip(pieces, counts, strict=False)]
        return "".join([*longer, pieces[-1]])

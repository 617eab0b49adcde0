"""The vision tower over real tiles alone: exact where nothing but padding is left out, and what that changes."""

import time
from typing import Any

import pytest
import torch
from transformers.models.mllama import modeling_mllama as upstream

from radhpc.core.recipe import ModelSettings
from radhpc.models.families import mllama_tiles
from tests.radhpc.models.test_attention import mixed_batch, mllama


def skipping() -> Any:
    model = mllama("segments")
    mllama_tiles.attach(model)
    return model


def double(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}


def test_real_tiles_see_what_they_would_see_if_padding_were_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against upstream's own tower in eager, with a mask that hides padding from everybody."""

    def hiding(aspect_ratio_mask: torch.Tensor, num_patches: int, target_length: int, dtype: torch.dtype) -> Any:
        seen = torch.zeros(*aspect_ratio_mask.shape, target_length, dtype=torch.bool)
        seen[:, :, :num_patches] = aspect_ratio_mask.bool()[..., None]
        hidden = torch.zeros(seen.flatten(1).shape, dtype=dtype).masked_fill(~seen.flatten(1), torch.finfo(dtype).min)
        return hidden[:, None, None]

    batch = double(mixed_batch())
    names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
    inputs = {name: batch[name] for name in names}
    result = skipping().double().model.vision_model(**inputs).last_hidden_state
    monkeypatch.setattr(upstream, "_prepare_aspect_ratio_attention_mask", hiding)
    expected = mllama("eager").double().model.vision_model(**inputs).last_hidden_state
    real = (batch["aspect_ratio_mask"] * (batch["aspect_ratio_ids"] > 0)[..., None]).bool()
    assert int(real.sum()) == 7
    torch.testing.assert_close(result[real], expected[real], rtol=0, atol=1e-6)  # eager has its softmax in float32
    assert not result[~real].any()


def test_what_it_changes_and_saves() -> None:
    batch = mixed_batch()
    one = {
        name: value[1:2, :14] if value.ndim == 2 and value.shape[1] == 20 else value[1:2]
        for name, value in batch.items()
    }
    one = {name: value[:, :14, :1] if name == "cross_attention_mask" else value for name, value in one.items()}
    one |= {name: one[name][:, :1] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    logits, seconds = {}, {}
    for name, model in (("whole", mllama("segments")), ("skipping", skipping())):
        with torch.no_grad():
            logits[name] = model(**one).logits
            started = time.process_time()
            for _ in range(5):
                model(**one)
            seconds[name] = time.process_time() - started
    changed = (logits["skipping"] - logits["whole"]).norm() / logits["whole"].norm()
    print(f"one tile of four: logits differ by {changed:.0%}, time {seconds['skipping'] / seconds['whole']:.2f}")
    assert 0.001 < changed < 1


def test_gradients_reach_the_tower_and_a_batch_without_images_keeps_its_graph() -> None:
    batch = mixed_batch()
    model = skipping().train()
    model(**batch, use_cache=False).logits.square().mean().backward()
    vision = {name: p.grad for name, p in model.model.vision_model.named_parameters()}
    assert all(gradient is not None for gradient in vision.values())
    text_only = {name: value[2:] for name, value in batch.items()}
    model.zero_grad()
    model(**text_only, use_cache=False).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.model.vision_model.parameters())
    assert torch.isfinite(model(**text_only).logits).all()


def test_it_goes_with_segments_alone() -> None:
    arguments = {"config": {}, "tokenizer": {"train_vocabulary": 400}, "skip_empty_tiles": True}
    assert ModelSettings.model_validate(arguments).skip_empty_tiles
    with pytest.raises(ValueError, match="skip_empty_tiles"):
        ModelSettings.model_validate(arguments | {"attention": "sdpa"})

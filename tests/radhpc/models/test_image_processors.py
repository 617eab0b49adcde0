"""Pictures to arrays: equal to transformers' own processors; broken images are named, and files say what they mean."""

import contextlib
import io
import json
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, assume, example, given, settings, strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from radhpc.core.errors import UserError
from radhpc.core.image_decoding import decode
from radhpc.core.recipe import ModelSettings
from radhpc.core.sample import View
from radhpc.models.families.mllama import MllamaFamily
from radhpc.models.image_processors import ClipImages, MllamaImages, SwinImages, stitch
from radhpc.models.processor_files import CLIP_MEAN, CLIP_STD, description_file
from radhpc.models.tokenizer import train as train_tokenizer

pytestmark = pytest.mark.timeout(120)

CLOSE = 1e-5
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EXTREMES = ((1, 1), (1, 900), (900, 1), (3000, 40), (40, 3000), (1500, 1500), (560, 560), (1000, 1120), (561, 559))


def picture(width: int, height: int, mode: str = "L", seed: int = 0) -> Image.Image:
    """Noise on a gradient: every rounding of a resize shows."""
    random = np.random.default_rng(seed)
    shape = (height, width) if mode == "L" else (height, width, len(mode))
    slope = np.linspace(0, 200, width).astype(int)
    values = (slope if mode == "L" else slope[:, None]) + random.integers(0, 56, shape)
    return Image.fromarray(values.astype(np.uint8), mode)


sizes = st.one_of(st.sampled_from(EXTREMES), st.tuples(st.integers(1, 1500), st.integers(1, 1500)))
pictures = st.builds(
    lambda size, mode, seed: picture(*size, mode, seed), sizes, st.sampled_from(["L", "RGB"]), st.integers(0, 9)
)
sides = st.one_of(st.sampled_from([56, 224, 336, 560]), st.integers(56, 560))
quick = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.data_too_large])


def assert_close(ours: npt.NDArray[Any], theirs: npt.NDArray[Any]) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    assert np.abs(ours - theirs).max() <= CLOSE


@quick
@given(st.lists(pictures, min_size=1, max_size=2), sides, st.integers(1, 4))
@example([picture(*size, mode) for size in EXTREMES[:5] for mode in ("L", "RGB")], 112, 4)
def test_mllama_equals_transformers(views: list[Image.Image], size: int, tiles: int) -> None:
    ours = MllamaImages(size, tiles, CLIP_MEAN, CLIP_STD)(views)
    theirs = MllamaImageProcessorPil(
        size={"height": size, "width": size},
        max_image_tiles=tiles,
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )(images=[views], return_tensors="np")
    assert_close(ours["pixel_values"], theirs["pixel_values"][0])
    for name in ("aspect_ratio_ids", "aspect_ratio_mask", "num_tiles"):
        assert ours[name].dtype == np.int64
        assert np.array_equal(ours[name], np.asarray(theirs[name][0])), name


@quick
@given(pictures, sides, sides)
@example(picture(1120, 1000), 336, 336)
@example(picture(40, 300, "RGB"), 336, 224)
@example(picture(300, 299), 224, 336)  # smaller than what is cut out of it
def test_clip_equals_transformers(view: Image.Image, size: int, shortest: int) -> None:
    assume(max(view.size) * shortest**2 <= 30_000_000 * min(view.size))  # both resize all of it before they cut
    ours = ClipImages(size, shortest=shortest)([view])["pixel_values"]
    theirs = CLIPImageProcessorPil(size={"shortest_edge": shortest}, crop_size={"height": size, "width": size})
    assert_close(ours, np.asarray(theirs(images=[view], return_tensors="np")["pixel_values"]))


@quick
@given(pictures, st.sampled_from([56, 224, 336]))
@example(picture(1120, 1000), 336)
@example(picture(1000, 1120), 336)
@example(picture(100, 30), 336)
@example(picture(30, 100), 336)
@example(stitch([picture(500, 400), picture(300, 420), picture(450, 380), picture(500, 500)]), 336)
def test_padding_equals_llava(view: Image.Image, size: int) -> None:
    """LLaVA pads a colour picture with the mean colour, cut to whole levels, and hands it to CLIP's processor."""
    theirs = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    side = max(view.size)
    square = np.full((side, side, 3), [int(mean * 255) for mean in theirs.image_mean], np.uint8)
    left, top = (side - view.width) // 2, (side - view.height) // 2
    square[top : top + view.height, left : left + view.width] = np.asarray(view.convert("RGB"))
    ours = ClipImages(size, fit="pad")([view])["pixel_values"]
    assert_close(ours, np.asarray(theirs(images=[Image.fromarray(square)], return_tensors="np")["pixel_values"]))


@quick
@given(pictures, sides)
def test_swin_equals_transformers(view: Image.Image, size: int) -> None:
    theirs = ViTImageProcessorPil(
        size={"height": size, "width": size}, resample=3, image_mean=list(IMAGENET_MEAN), image_std=list(IMAGENET_STD)
    )(images=[view.convert("RGB")], return_tensors="np")
    assert_close(SwinImages(size)([view])["pixel_values"], np.asarray(theirs["pixel_values"]))


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK", "I", "F", "L with transparency"])
def test_every_mode_is_seen_as_transformers_sees_it(mode: str) -> None:
    view = picture(90, 70, "RGBA" if mode == "RGBA" else "L")
    if mode == "L with transparency":
        view.info["transparency"] = int(np.asarray(view)[30, 40])
    elif mode != "RGBA":
        view = view.convert(mode)
    if mode == "LA":
        view.putalpha(picture(90, 70))
    theirs = MllamaImageProcessorPil(size={"height": 56, "width": 56})(images=[[view]], return_tensors="np")
    assert_close(MllamaImages(56, 4)([view])["pixel_values"], theirs["pixel_values"][0])


def test_no_view_gives_empty_arrays() -> None:
    images = MllamaImages(56, 4)([])
    assert {name: values.shape for name, values in images.items()} == {
        "pixel_values": (0, 4, 3, 56, 56),
        "aspect_ratio_ids": (0,),
        "aspect_ratio_mask": (0, 4),
        "num_tiles": (0,),
    }


def test_threads_do_not_disturb_each_other() -> None:
    processors = (MllamaImages(112, 4), ClipImages(112, fit="pad"), SwinImages(112))
    views = [picture(100 + 37 * n, 300 - 11 * n, seed=n) for n in range(16)]
    alone = [processor([view])["pixel_values"] for view in views for processor in processors]
    with ThreadPoolExecutor(4) as pool:
        together = pool.map(lambda pair: pair[1]([pair[0]]), [(view, kind) for view in views for kind in processors])
        assert all(np.array_equal(one, other["pixel_values"]) for one, other in zip(alone, list(together), strict=True))


# What the model sees, shown to people.


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("width", "height"), [(112, 112), (60, 200), (224, 50), (100, 90)])
def test_mllama_shows_the_view_on_its_canvas(width: int, height: int, mode: str) -> None:
    processor, view = MllamaImages(56, 4, CLIP_MEAN, CLIP_STD), picture(width, height, mode)
    images = processor([view])
    (shown,) = processor.show(images)
    assert shown.mode == mode
    assert shown.width * shown.height == int(images["num_tiles"][0]) * 56 * 56
    if width <= shown.width and height <= shown.height and min(width, height) >= 56:  # not resized
        assert np.array_equal(np.asarray(shown)[:height, :width], np.asarray(view))
    assert np.array_equal(processor([shown])["pixel_values"], images["pixel_values"])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_clip_and_swin_show_what_went_in(mode: str) -> None:
    view = picture(56, 56, mode)
    for processor in (ClipImages(56), ClipImages(56, fit="pad"), SwinImages(56)):
        (shown,) = processor.show(processor([view]))
        assert shown.mode == mode
        assert np.array_equal(np.asarray(shown), np.asarray(view))


def test_a_crop_loses_the_sides_and_padding_does_not() -> None:
    """Four views side by side, each of its own gray: the outer ones survive padding alone."""
    views = [Image.new("L", (200, 200), level) for level in (60, 120, 180, 240)]
    whole = stitch(views)
    cropped, padded = ClipImages(56), ClipImages(56, fit="pad")
    seen = [
        set(np.asarray(processor.show(processor([whole]))[0].convert("L"))[28].tolist())
        for processor in (cropped, padded)
    ]
    assert seen[0].isdisjoint({60, 240})
    assert seen[1] >= {60, 120, 180, 240}


def test_stitched_views_keep_their_sizes_and_their_tops() -> None:
    views = [picture(30, 50), picture(20, 70, seed=1), picture(40, 10, seed=2)]
    whole = stitch(views)
    assert (whole.mode, whole.size) == ("L", (30 + 20 + 40 + 2 * 10, 70))
    pixels, left = np.asarray(whole).copy(), 0
    for view in views:
        part = pixels[: view.height, left : left + view.width]
        assert np.array_equal(part, np.asarray(view))
        part[:] = 0
        left += view.width + 10
    assert not pixels.any()


def test_stitching_takes_four_and_one_colour_view_makes_it_colour() -> None:
    views = [picture(10, 10, seed=seed) for seed in range(5)]
    assert stitch(views).tobytes() == stitch(views[:4]).tobytes()
    assert stitch(views, gap=0, limit=2).size == (20, 10)
    assert stitch(views[:1]).tobytes() == views[0].tobytes()
    assert stitch([views[0], picture(5, 5, "RGB")]).mode == "RGB"


# Files that describe a model's images.


def saved(folder: Path, **values: Any) -> Path:
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps(values))
    return path


def test_files_that_transformers_writes_are_read(tmp_path: Path) -> None:
    view = picture(300, 200)
    mllama = MllamaImageProcessorPil(size={"height": 112, "width": 112}, max_image_tiles=3, image_mean=[0.1, 0.2, 0.3])
    clip = CLIPImageProcessorPil(size={"shortest_edge": 100}, crop_size={"height": 90, "width": 90}, resample=1)
    vit = ViTImageProcessorPil(size={"height": 80, "width": 80}, image_std=[0.3, 0.2, 0.1], rescale_factor=1 / 127.5)
    for name, theirs in (("mllama", mllama), ("clip", clip), ("vit", vit)):
        theirs.save_pretrained(tmp_path / name)
    path = tmp_path / "{}" / "preprocessor_config.json"
    result = [
        MllamaImages.from_file(Path(str(path).format("mllama"))),
        ClipImages.from_file(Path(str(path).format("clip"))),
        SwinImages.from_file(Path(str(path).format("vit"))),
    ]
    expected = [theirs(images=[view.convert("RGB")], return_tensors="np") for theirs in (mllama, clip, vit)]
    assert_close(result[0]([view])["pixel_values"], expected[0]["pixel_values"][0])
    assert_close(result[1]([view])["pixel_values"], np.asarray(expected[1]["pixel_values"]))
    assert_close(result[2]([view])["pixel_values"], np.asarray(expected[2]["pixel_values"]))


def test_files_of_earlier_releases_are_read(tmp_path: Path) -> None:
    """As published with openai/clip-vit-large-patch14-336 and microsoft/swin-base-patch4-window7-224."""
    clip = {
        "crop_size": 336, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
        "resample": 3, "size": 336,
    }  # fmt: skip
    swin = {
        "do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
        "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD, "resample": 3, "size": 224,
    }  # fmt: skip
    view = picture(400, 500)
    for ours, theirs, values in ((ClipImages, CLIPImageProcessorPil, clip), (SwinImages, ViTImageProcessorPil, swin)):
        path = saved(tmp_path, **values)
        expected = theirs.from_pretrained(tmp_path)(images=[view.convert("RGB")], return_tensors="np")
        assert_close(ours.from_file(path)([view])["pixel_values"], np.asarray(expected["pixel_values"]))
    assert ClipImages.from_file(saved(tmp_path, **clip), fit="pad").fit == "pad"


@pytest.mark.parametrize(
    ("kind", "upstream"),
    [(MllamaImages, MllamaImageProcessorPil), (ClipImages, CLIPImageProcessorPil), (SwinImages, ViTImageProcessorPil)],
)
def test_what_a_file_leaves_out_is_as_in_transformers(tmp_path: Path, kind: Any, upstream: Any) -> None:
    view = picture(300, 500)
    theirs = np.asarray(upstream()(images=[view.convert("RGB")], return_tensors="np")["pixel_values"])
    for values in ({}, {"size": None, "resample": None, "do_pad": None, "_valid_processor_keys": ["images"]}):
        ours = kind.from_file(saved(tmp_path, **values))([view])["pixel_values"]
        assert_close(ours, theirs.reshape(ours.shape))


@pytest.mark.parametrize(
    ("kind", "values", "words"),
    [
        (MllamaImages, {"do_pad": False}, "do_pad: False: "),
        (MllamaImages, {"size": {"height": 560, "width": 448}}, "size: .*448.*: "),
        (MllamaImages, {"size": {"shortest_edge": 560}}, "size: "),
        (MllamaImages, {"max_image_tiles": 0}, "max_image_tiles: 0: .*greater than 0"),
        (MllamaImages, {"image_processor_type": "CLIPImageProcessor"}, "image_processor_type: 'CLIPImageProcessor': "),
        (MllamaImages, {"vqa_enabled": True}, "vqa_enabled: True: allowed are do_resize, "),
        (MllamaImages, {"image_std": [0.5, 0.5, 0]}, "image_std.2: 0: "),
        (MllamaImages, {"image_mean": [0.5, 0.5]}, "image_mean"),
        (MllamaImages, {"resample": 9}, "resample: 9: "),
        (ClipImages, {"do_center_crop": False}, "do_center_crop: False: "),
        (ClipImages, {"size": {"longest_edge": 336}}, "size: "),
        (ClipImages, {"do_rescale": False}, "do_rescale: False: "),
        (SwinImages, {"do_center_crop": True}, "do_center_crop: True: "),
        (SwinImages, {"rescale_factor": float("nan")}, "rescale_factor: nan: "),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, kind: Any, values: dict[str, Any], words: str) -> None:
    path = saved(tmp_path, **values)
    with pytest.raises(UserError, match=words) as caught:
        kind.from_file(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "3", "\x00", '{"image_processor": []}', None])
def test_a_file_that_describes_nothing_is_named(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "preprocessor_config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="preprocessor_config.json: "):
        MllamaImages.from_file(path)


def test_the_file_is_found_where_transformers_finds_it(tmp_path: Path) -> None:
    assert description_file(tmp_path) is None
    old, new = tmp_path / "preprocessor_config.json", tmp_path / "processor_config.json"
    new.write_text('{"processor_class": "MllamaProcessor"}')
    assert description_file(tmp_path) is None
    old.write_text('{"size": {"height": 112, "width": 112}}')
    assert description_file(tmp_path) == old
    new.write_text('{"image_processor": {"size": {"height": 168, "width": 168}, "max_image_tiles": 2}}')
    assert description_file(tmp_path) == new
    assert MllamaImages.from_file(new).size == MllamaImageProcessorPil.from_pretrained(tmp_path).size["height"] == 168


def test_a_model_takes_the_images_that_its_folder_describes(tmp_path: Path) -> None:
    train_tokenizer(["no effusion. the heart is of normal size."] * 9, 300, tmp_path / "tokenizer")
    vision = {"image_size": 112, "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}
    config = {"model_type": "mllama", "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = ModelSettings(family="mllama", weights=str(tmp_path))
    view = picture(100, 150)
    plain = MllamaFamily(model, str(tmp_path / "tokenizer")).encode_images([view])
    assert plain["pixel_values"].shape == (1, 2, 3, 112, 112)
    saved(tmp_path, size=112, max_image_tiles=2, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    family = MllamaFamily(model, str(tmp_path / "tokenizer"))
    images = family.encode_images([view])
    assert_close(images["pixel_values"], MllamaImages(112, 2, CLIP_MEAN, CLIP_STD)([view])["pixel_values"])
    assert not np.allclose(images["pixel_values"], plain["pixel_values"])
    (shown,) = family.show_images(images)
    assert np.array_equal(np.asarray(shown)[:150, :100], np.asarray(view))
    saved(tmp_path, size=112, max_image_tiles=4)
    with pytest.raises(UserError, match=r"preprocessor_config.json: 4 tiles of 112 pixels; its model has 2 of 112"):
        MllamaFamily(model, str(tmp_path / "tokenizer"))


# Decoding: what is no whole image is an OSError, never a half gray picture.


def jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


SMOOTH = Image.fromarray(
    (120 + 90 * np.sin(np.arange(97) / 15)[:, None] * np.cos(np.arange(121) / 11)).astype(np.uint8)
)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # lying on its side: the build turns pictures, decoding does not
KINDS = {
    "gray": jpeg(SMOOTH, quality=90),
    "gray, progressive": jpeg(SMOOTH, progressive=True),
    "gray, restarts": jpeg(SMOOTH, restart_marker_blocks=4),
    "gray, sampled": jpeg(SMOOTH, subsampling=1),
    "colour": jpeg(picture(121, 97, "RGB"), quality=90),
    "colour, whole": jpeg(picture(121, 97, "RGB"), subsampling=0),
    "colour, progressive": jpeg(picture(121, 97, "RGB"), progressive=True),
    "colour, not transformed": jpeg(picture(121, 97, "RGB"), keep_rgb=True),
    "CMYK": jpeg(SMOOTH.convert("CMYK")),
    "with Exif and ICC": jpeg(SMOOTH, exif=EXIF, icc_profile=b"?" * 200),
    "bare": b"",
}
KINDS["bare"] = KINDS["gray"][:2] + KINDS["gray"][2 + 2 + int.from_bytes(KINDS["gray"][4:6], "big") :]  # no JFIF


GRAY = np.asarray(SMOOTH)
OTHERS = [
    imagecodecs.png_encode(GRAY),
    imagecodecs.png_encode(GRAY.astype(np.uint16) * 200),
    imagecodecs.jpegxl_encode(GRAY, lossless=True),
    imagecodecs.jpegxl_encode(GRAY.astype(np.uint16) * 200, lossless=True),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_is_what_pillow_sees(kind: str) -> None:
    data = KINDS[kind]
    expected = Image.open(io.BytesIO(data))
    for given_as in (data, memoryview(data), memoryview(b"??" + data)[2:]):
        result = decode(given_as)
        assert (result.mode, result.size) == (expected.mode, expected.size)
        assert np.array_equal(np.asarray(result), np.asarray(expected))
    assert decode(data).mode == ("L" if kind.startswith(("gray", "with", "bare")) else kind[:4].replace("colo", "RGB"))


def test_a_decoded_view_can_be_used_like_any_other() -> None:
    view = decode(KINDS["gray"])
    before = np.asarray(view).copy()
    assert view.resize((30, 20)).size == (30, 20)
    view.copy().putpixel((0, 0), 0)
    view.paste(7, (0, 0, 5, 5))  # on a copy: the decoder's own memory is not written to
    assert np.array_equal(np.asarray(decode(KINDS["gray"])), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_jpeg_cut_anywhere_is_an_oserror(kind: str) -> None:
    data = KINDS[kind]
    for end in {*range(0, 40), *range(40, len(data), 37), *range(len(data) - 12, len(data))}:
        with pytest.raises(OSError):
            decode(data[:end])
        if end > 2:
            with pytest.raises(OSError):
                decode(data[:end] + bytes(len(data) - end))


@pytest.mark.parametrize("kind", ["gray", "gray, progressive", "colour", "gray, restarts"])
def test_a_jpeg_without_its_middle_is_an_oserror(kind: str) -> None:
    """Where Pillow, OpenCV and imagecodecs return a picture, the rest of it gray or out of place."""
    data = KINDS[kind]
    scan = data.rindex(b"\xff\xda") + 14
    middle = (scan + len(data)) // 2
    for broken in (data[:middle] + b"\xff\xd9" + data[middle:], data[:middle] + data[-2:]):
        Image.open(io.BytesIO(broken)).load()
        with pytest.raises(OSError, match="broken image: "):
            decode(broken)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_the_bytes_are_it_is_a_picture_or_an_oserror(data: st.DataObject) -> None:
    whole = data.draw(st.sampled_from([*KINDS.values(), *OTHERS]))
    broken = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of sizes
        with contextlib.suppress(OSError):
            decode(bytes(broken), View(width=121, height=97, window=(100.0, 900.0))).tobytes()


def test_png_and_jpeg_xl_cut_anywhere_are_oserrors() -> None:
    for data in OTHERS:
        assert decode(memoryview(data)).size == SMOOTH.size
        for end in range(0, len(data) - 16, 61):  # PNG's last 16 bytes are an empty chunk and its checksums
            with pytest.raises(OSError):
                decode(data[:end])


def test_a_bomb_is_an_oserror(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 121 * 97 // 3)
    for kind in ("gray", "colour", "CMYK"):
        with pytest.raises(OSError, match="decompression bomb"):
            decode(KINDS[kind])

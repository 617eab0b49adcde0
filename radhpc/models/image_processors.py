"""Pictures to the arrays that a model wants: resized, tiled or cropped, normalised. On the CPU, without torch.

    MllamaImages(560, 4, mean, std)(views)     # tiles: Llama 3.2 Vision
    ClipImages(336, mean, std, fit="pad")(views)
    SwinImages(224, mean, std)(views)
    QwenImages(16, 2, max_pixels=1 << 20)(views)    # Qwen3-VL: in their own proportions
    stitch(views)                              # up to four views side by side, as one picture

Enters: the views of one study, as image_decoding.py decodes them. Leaves: arrays whose first axis is the views,
equal to those of transformers' own processors (within 1e-5, by test) in a fraction of the time: a radiograph is
gray, so it is resized as one channel, and its three channels are written straight to where they belong. Each class
also reads the file that describes a model's images (`from_file`), and turns its arrays back into pictures (`show`).

Made for threads, one study each: Pillow and numpy do the work without Python's lock.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.Image import Resampling
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from radhpc.core.errors import UserError, first_line
from radhpc.core.files import read_json

Arrays = dict[str, npt.NDArray[Any]]
Colour = tuple[float, float, float]  # red, green, blue; as means and standard deviations of values from 0 to 1

ROWS = 80  # of pixels that are normalised at a time: in 32-bit floats they fit into a core's own cache
HALF: Colour = (0.5, 0.5, 0.5)
CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)


class MllamaImages:
    """Each view on a canvas of tiles: as many, and arranged so, as lose the least of its pixels.

    `size` is a tile's side S in pixels, `tiles` the most tiles T of a view.
    """

    def __init__(
        self,
        size: int,
        tiles: int,
        mean: Colour = HALF,
        std: Colour = HALF,
        resample: Resampling = Resampling.BILINEAR,
        factor: float = 1 / 255,
    ) -> None:
        from transformers.models.mllama import image_processing_pil_mllama as upstream  # it imports torch

        self.size, self.tiles = size, tiles
        self._upstream, self._resample, self._levels = upstream, resample, _Levels(mean, std, factor)
        self._ratios = upstream.get_all_supported_aspect_ratios(tiles)  # (rows, columns) of tiles; ids count from 1

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """As a model's preprocessor_config.json says. Raises UserError for what is not supported."""
        read = _read(path, _MllamaFile)
        return cls(read.size, read.max_image_tiles, read.image_mean, read.image_std, read.resample, read.rescale_factor)

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """pixel_values (V, T, 3, S, S) float32, aspect_ratio_ids (V,), aspect_ratio_mask (V, T), num_tiles (V,).

        Tiles that a view does not need are zero in pixel_values and in the mask.
        """
        size, count = self.size, len(views)
        pixel_values = np.zeros((count, self.tiles, 3, size, size), np.float32)
        ids, mask = np.zeros(count, np.int64), np.zeros((count, self.tiles), np.int64)
        for number, view in enumerate(map(_plain, views)):
            width, height = view.size
            canvas_height, canvas_width = map(
                int, self._upstream.get_optimal_tiled_canvas(height, width, self.tiles, size)
            )
            new_height, new_width = self._upstream.get_image_size_fit_to_canvas(
                height, width, canvas_height, canvas_width, size
            )
            view = view.resize((int(new_width), int(new_height)), self._resample)
            canvas = np.asarray(view.crop((0, 0, canvas_width, canvas_height)))  # black to the right and below
            rows, columns = canvas_height // size, canvas_width // size
            for tile in range(rows * columns):
                top, left = tile // columns * size, tile % columns * size
                self._levels.write(canvas[top : top + size, left : left + size], pixel_values[number, tile])
            ids[number] = self._ratios.index((rows, columns)) + 1
            mask[number, : rows * columns] = 1
        return {
            "pixel_values": pixel_values,
            "aspect_ratio_ids": ids,
            "aspect_ratio_mask": mask,
            "num_tiles": mask.sum(axis=1),
        }

    def show(self, images: Arrays) -> list[Image.Image]:
        """The views of one study as the model sees them, tiles put together; black is what pads them."""
        pictures = []
        for tiles, ratio in zip(images["pixel_values"], images["aspect_ratio_ids"], strict=True):
            assert ratio > 0, "a view that pads a batch is no picture"
            rows, columns = self._ratios[int(ratio) - 1]
            grid = tiles[: rows * columns].reshape(rows, columns, 3, self.size, self.size).transpose(2, 0, 3, 1, 4)
            pictures.append(self._levels.read(grid.reshape(3, rows * self.size, columns * self.size)))
        return pictures


class ClipImages:
    """Each view as one square of S x S pixels.

    fit="crop" is what CLIP does: the shorter edge becomes S, and the centre is cut out. It loses the sides of a
    lateral view, and the outer views of a stitched picture. fit="pad" is what LLaVA does: the view is padded to a
    square with the mean colour, both sides alike, and nothing is lost (haotian-liu/LLaVA: llava/mm_utils.py).
    """

    def __init__(
        self,
        size: int,
        mean: Colour = CLIP_MEAN,
        std: Colour = CLIP_STD,
        fit: Literal["crop", "pad"] = "crop",
        resample: Resampling = Resampling.BICUBIC,
        factor: float = 1 / 255,
        shortest: int | None = None,
    ) -> None:
        self.size, self.fit = size, fit
        self._shortest = shortest or size  # of the resized picture that the centre is cut out of
        self._background = tuple(int(255 * share) for share in mean)
        self._resample, self._levels = resample, _Levels(mean, std, factor)

    @classmethod
    def from_file(cls, path: Path, fit: Literal["crop", "pad"] = "crop") -> Self:
        """As a model's preprocessor_config.json says. Raises UserError for what is not supported."""
        read = _read(path, _ClipFile)
        mean, std, factor = read.image_mean, read.image_std, read.rescale_factor
        return cls(read.crop_size, mean, std, fit, read.resample, factor, read.size)

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """pixel_values (V, 3, S, S) float32."""
        pixel_values = np.empty((len(views), 3, self.size, self.size), np.float32)
        for values, view in zip(pixel_values, map(_plain, views), strict=True):
            if self.fit == "crop" or view.width == view.height:
                self._levels.write(np.asarray(self._centre(self._shorten(view))), values)
            elif view.mode == "RGB":
                self._levels.write(np.asarray(self._centre(self._pad(view, self._background))), values)
            else:  # gray, but the mean colour is none: where it is padded, its channels differ
                padded = {level: np.asarray(self._centre(self._pad(view, level))) for level in set(self._background)}
                self._levels.write(np.stack([padded[level] for level in self._background], axis=2), values)
        return {"pixel_values": pixel_values}

    def show(self, images: Arrays) -> list[Image.Image]:
        """The views of one study as the model sees them."""
        return [self._levels.read(values) for values in images["pixel_values"]]

    def _shorten(self, view: Image.Image) -> Image.Image:
        """Resize so that the shorter edge is as wanted (transformers: get_resize_output_image_size)."""
        short, long = sorted(view.size)
        longer = int(self._shortest * long / short)
        size = (self._shortest, longer) if view.width <= view.height else (longer, self._shortest)
        return view.resize(size, self._resample)

    def _pad(self, view: Image.Image, background: float | tuple[int, ...]) -> Image.Image:
        """Pad to a square of one colour, and resize that."""
        width = side = max(view.size)
        if view.width > view.height:  # Pillow resizes along the rows first, so those of the background can be left out
            width = self._shortest
            view = view.resize((width, view.height), self._resample)
        square = Image.new(view.mode, (width, side), background)
        square.paste(view, ((width - view.width) // 2, (side - view.height) // 2))
        return square.resize((self._shortest, self._shortest), self._resample)

    def _centre(self, view: Image.Image) -> Image.Image:
        """Cut out the centre, or surround with black what is smaller (transformers: center_crop)."""
        left, top = (view.width - self.size) // 2, (view.height - self.size) // 2
        return view.crop((left, top, left + self.size, top + self.size))


class SwinImages:
    """Each view resized to S x S pixels, whatever its shape, as ViTImageProcessor does for checkpoints of Swin."""

    def __init__(
        self,
        size: int,
        mean: Colour = (0.485, 0.456, 0.406),  # ImageNet's
        std: Colour = (0.229, 0.224, 0.225),
        resample: Resampling = Resampling.BICUBIC,
        factor: float = 1 / 255,
    ) -> None:
        self.size = size
        self._resample, self._levels = resample, _Levels(mean, std, factor)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """As a model's preprocessor_config.json says. Raises UserError for what is not supported."""
        read = _read(path, _VitFile)
        return cls(read.size, read.image_mean, read.image_std, read.resample, read.rescale_factor)

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """pixel_values (V, 3, S, S) float32."""
        pixel_values = np.empty((len(views), 3, self.size, self.size), np.float32)
        for values, view in zip(pixel_values, map(_plain, views), strict=True):
            self._levels.write(np.asarray(view.resize((self.size, self.size), self._resample)), values)
        return {"pixel_values": pixel_values}

    def described(self) -> dict[str, Any]:
        """The arguments of transformers' ViTImageProcessor that does the same."""
        return {
            "size": {"height": self.size, "width": self.size},
            "resample": int(self._resample),
            **self._levels.described(),
        }

    def show(self, images: Arrays) -> list[Image.Image]:
        """The views of one study as the model sees them."""
        return [self._levels.read(values) for values in images["pixel_values"]]


class QwenImages:
    """Each view in its own proportions, as patches in the order in which Qwen3-VL joins them, M x M to a token.

    Sides become the nearest multiples of P * M pixels (`patch` P, `merge` M) for which the area is within `min_pixels`
    and `max_pixels`. A patch lies there twice, as the two frames of a still film.
    """

    FRAMES = 2

    def __init__(
        self,
        patch: int,
        merge: int,
        min_pixels: int = 1 << 16,
        max_pixels: int = 1 << 24,
        mean: Colour = HALF,
        std: Colour = HALF,
        resample: Resampling = Resampling.BICUBIC,
        factor: float = 1 / 255,
    ) -> None:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize  # it imports torch

        self.patch, self.merge, self.min_pixels, self.max_pixels = patch, merge, min_pixels, max_pixels
        self._nearest, self._resample, self._levels = smart_resize, resample, _Levels(mean, std, factor)

    @classmethod
    def from_file(cls, path: Path, max_pixels: int | None = None) -> Self:
        """As a model's preprocessor_config.json says, but views of `max_pixels` at most. Raises UserError."""
        read = _read(path, _QwenFile)
        least, most = read.size
        if max_pixels is not None and max_pixels < least:
            raise UserError(f"model.max_pixels {max_pixels}: {path} wants at least {least}")
        return cls(
            read.patch_size, read.merge_size, least, min(most, max_pixels or most), read.image_mean, read.image_std,
            read.resample, read.rescale_factor,
        )  # fmt: skip

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """pixel_values (N, 3 * 2 * P * P) float32 of N patches in all views, image_grid_thw (V, 3): 1, rows, columns.

        Raises UserError for a view that is 200 times as long as it is wide.
        """
        grids = np.ones((len(views), 3), np.int64)
        patches = []
        for grid, view in zip(grids, map(_plain, views), strict=True):
            try:
                height, width = self._nearest(
                    view.height, view.width, self.patch * self.merge, self.min_pixels, self.max_pixels
                )
            except ValueError as error:
                raise UserError(f"a view of {view.width} x {view.height} pixels: {first_line(error)}") from error
            pixels = np.asarray(view.resize((width, height), self._resample))
            values = np.empty((3, height, width), np.float32)
            self._levels.write(pixels, values)
            grid[1:] = height // self.patch, width // self.patch
            ordered = self._blocks(values, grid).transpose(1, 4, 2, 5, 0, 3, 6)
            twice = np.broadcast_to(ordered[:, :, :, :, :, None], (*ordered.shape[:5], self.FRAMES, *ordered.shape[5:]))
            patches.append(twice.reshape(int(grid.prod()), -1))
        return {"pixel_values": np.concatenate(patches), "image_grid_thw": grids}

    def described(self) -> dict[str, Any]:
        """The arguments of transformers' Qwen2VLImageProcessor that does the same."""
        return {
            "patch_size": self.patch,
            "merge_size": self.merge,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "resample": int(self._resample),
            **self._levels.described(),
        }

    def show(self, images: Arrays) -> list[Image.Image]:
        """The views of one study as the model sees them."""
        pictures, done = [], 0
        for _, rows, columns in images["image_grid_thw"].tolist():
            patches = images["pixel_values"][done : done + rows * columns]
            done += rows * columns
            merge, patch = self.merge, self.patch
            shape = (rows // merge, columns // merge, merge, merge, 3, self.FRAMES, patch, patch)
            whole = patches.reshape(shape)[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6)
            pictures.append(self._levels.read(whole.reshape(3, rows * patch, columns * patch)))
        return pictures

    def _blocks(self, values: npt.NDArray[np.float32], grid: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """(3, height, width) as (3, rows / M, M, P, columns / M, M, P)."""
        merge, patch = self.merge, self.patch
        rows, columns = int(grid[1]) // merge, int(grid[2]) // merge
        return values.reshape(3, rows, merge, patch, columns, merge, patch)


def stitch(views: Sequence[Image.Image], gap: int = 10, limit: int = 4) -> Image.Image:
    """The first `limit` views side by side in their own sizes, tops aligned, with `gap` black pixels between them.

    Gray stays gray. As X-iZhang/RRG-BioNLP-ACL2024 prepares the studies of Med-CXRGen.
    """
    plain = [_plain(view) for view in views[:limit]]
    assert plain, "no view to stitch"
    mode = "L" if all(view.mode == "L" for view in plain) else "RGB"
    width = sum(view.width for view in plain) + gap * (len(plain) - 1)
    whole = Image.new(mode, (width, max(view.height for view in plain)))
    left = 0
    for view in plain:
        whole.paste(view, (left, 0))
        left += view.width + gap
    return whole


def described(folder: Path) -> Path | None:
    """The file in a model's folder that says how its images are made, if there is one.

    transformers 5 writes it into processor_config.json, under "image_processor", and earlier releases write
    preprocessor_config.json; where both are there the former counts, as it does for transformers.
    """
    nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if nested.exists() and isinstance(found := _json(nested), dict) and "image_processor" in found:
        return nested
    return own if own.exists() else None


class _Levels:
    """0 to 255 to the values that a model wants, and back: (level * factor - mean) / std, by channel."""

    def __init__(self, mean: Colour, std: Colour, factor: float) -> None:
        self._scale = (factor / np.asarray(std)).astype(np.float32)
        self._shift = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
        self._told = {"image_mean": list(mean), "image_std": list(std), "rescale_factor": factor}

    def described(self) -> dict[str, Any]:
        """As arguments of transformers' image processors."""
        return dict(self._told)

    def write(self, pixels: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> None:
        """Fill values (3, height, width) from pixels of shape (height, width) or (height, width, 3)."""
        for top in range(0, len(pixels), ROWS):
            floats = pixels[top : top + ROWS].astype(np.float32)
            for channel, (scale, shift) in enumerate(zip(self._scale, self._shift, strict=True)):
                into = values[channel, top : top + ROWS]
                np.multiply(floats if floats.ndim == 2 else floats[:, :, channel], scale, out=into)
                np.add(into, shift, out=into)

    def read(self, values: npt.NDArray[np.float32]) -> Image.Image:
        """The picture behind values (3, height, width); gray where its channels are the same."""
        levels = (values - self._shift[:, None, None]) / self._scale[:, None, None]
        red, green, blue = pixels = np.rint(levels).clip(0, 255).astype(np.uint8)
        gray = np.array_equal(red, green) and np.array_equal(red, blue)
        return Image.fromarray(red if gray else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _plain(view: Image.Image) -> Image.Image:
    """Any picture as L or RGB; what is transparent lies on white (transformers: convert_to_rgb)."""
    if view.has_transparency_data:
        view = view.convert("RGBA")
        view = Image.alpha_composite(Image.new("RGBA", view.size, (255, 255, 255, 255)), view)
    if view.mode == "1":
        return view.convert("L")
    return view if view.mode in ("L", "RGB") else view.convert("RGB")


# The files that describe a model's images. Defaults are those of transformers' classes; null means the default.

_OF_NO_EFFECT = {  # on the values
    "_valid_processor_keys", "device", "disable_grouping", "image_seq_length", "input_data_format", "processor_class",
    "return_tensors",
}  # fmt: skip


def _square(size: object) -> object:
    match size:
        case {"height": height, "width": width, **rest} if height == width and not rest:
            return height
    return size


def _shortest(size: object) -> object:
    match size:
        case {"shortest_edge": edge, **rest} if not rest:
            return edge
    return size


def _area(size: object) -> object:
    match size:
        case {"shortest_edge": least, "longest_edge": most, **rest} if not rest:
            return least, most
    return size


def _bare_name(name: object) -> object:
    """A processor's name without what tells its backend and its release."""
    return name.removesuffix("Fast").removesuffix("Pil") if isinstance(name, str) else name


def _three(value: object) -> object:
    return [value] * 3 if isinstance(value, int | float) else value


Square = Annotated[PositiveInt, BeforeValidator(_square)]
Channels = Annotated[Colour, BeforeValidator(_three)]
Deviations = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three)]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    rescale_factor: PositiveFloat = 1 / 255
    do_normalize: Literal[True] = True
    image_mean: Channels = HALF
    image_std: Deviations = HALF
    do_convert_rgb: bool = True  # pictures are L or RGB
    data_format: Literal["channels_first"] = "channels_first"


Described = TypeVar("Described", bound=_File)


class _MllamaFile(_File):
    image_processor_type: Annotated[Literal["MllamaImageProcessor"], BeforeValidator(_bare_name)] = (
        "MllamaImageProcessor"
    )
    size: Square = 224
    max_image_tiles: PositiveInt = 4
    do_pad: Literal[True] = True
    resample: Resampling = Resampling.BILINEAR


class _ClipFile(_File):
    image_processor_type: Annotated[Literal["CLIPImageProcessor"], BeforeValidator(_bare_name)] = "CLIPImageProcessor"
    feature_extractor_type: Literal["CLIPFeatureExtractor"] = "CLIPFeatureExtractor"
    size: Annotated[PositiveInt, BeforeValidator(_shortest)] = 224
    default_to_square: Literal[False] = False
    do_center_crop: Literal[True] = True
    crop_size: Square = 224
    do_pad: Literal[False] = False
    image_mean: Channels = CLIP_MEAN
    image_std: Deviations = CLIP_STD
    resample: Resampling = Resampling.BICUBIC


class _VitFile(_File):
    image_processor_type: Annotated[Literal["ViTImageProcessor"], BeforeValidator(_bare_name)] = "ViTImageProcessor"
    feature_extractor_type: Literal["ViTFeatureExtractor"] = "ViTFeatureExtractor"
    size: Square = 224
    default_to_square: Literal[True] = True
    do_center_crop: Literal[False] = False
    do_pad: Literal[False] = False
    resample: Resampling = Resampling.BILINEAR


class _QwenFile(_File):
    image_processor_type: Annotated[Literal["Qwen2VLImageProcessor"], BeforeValidator(_bare_name)] = (
        "Qwen2VLImageProcessor"
    )
    size: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_area)] = (56 * 56, 28 * 28 * 1280)
    default_to_square: Literal[False] = False
    patch_size: PositiveInt = 14
    merge_size: PositiveInt = 2
    temporal_patch_size: Literal[2] = 2
    image_mean: Channels = CLIP_MEAN
    image_std: Deviations = CLIP_STD
    resample: Resampling = Resampling.BICUBIC


def _read(path: Path, kind: type[Described]) -> Described:
    found = _json(path)
    if isinstance(found, dict) and "image_processor" in found:
        found = found["image_processor"]
    if not isinstance(found, dict):
        raise UserError(f"{path}: {type(found).__name__}; allowed is an object that describes an image processor")
    given = {key: value for key, value in found.items() if value is not None and key not in _OF_NO_EFFECT}
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        key, told = ".".join(map(str, first["loc"])), first["msg"].lower()
        if first["type"] == "extra_forbidden":
            told = f"allowed are {', '.join(kind.model_fields)}"
        raise UserError(f"{path}: {key}: {first['input']!r}: {told}") from error


def _json(path: Path) -> Any:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}; allowed is a JSON file") from error
    if found is None:
        raise UserError(f"{path}: no such file")
    return found

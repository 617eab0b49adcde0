"""Turn pictures into the arrays that a model takes: resized, tiled or cropped, normalised. On the CPU, without torch.

    MllamaImages(560, 4, mean, std)(views)     # tiles: Llama 3.2 Vision
    ClipImages(336, mean, std, fit="pad")(views)
    SwinImages(224, mean, std)(views)
    QwenImages(16, 2, max_pixels=1 << 20)(views)    # Qwen3-VL: in their own proportions
    stitch(views)                              # up to four views side by side, as one picture

Enters: the views of one study, as image_decoding.py decodes them. Leaves: arrays whose first axis is the views,
equal to those of transformers' own processors (within 1e-5, by test) in a fraction of the time: a radiograph is
gray, so it is resized as one channel, and its three channels are written directly to their places. Each class also
reads the file that describes a model's images (`from_file`, processor_files.py), and inverts itself (`show`).

Made for threads, one study each: Pillow and numpy do the work without Python's lock.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.Image import Resampling

from radhpc.core.errors import UserError, first_line
from radhpc.models.processor_files import (
    CLIP_MEAN,
    CLIP_STD,
    HALF,
    ClipDescription,
    Colour,
    MllamaDescription,
    QwenDescription,
    VitDescription,
    read,
)

Arrays = dict[str, npt.NDArray[Any]]
ROWS = 80  # of pixels that are normalised at a time: in 32-bit floats they fit into a core's cache


class MllamaImages:
    """Put each view on a canvas of tiles, in the number and arrangement that lose the fewest of its pixels.

    `size` is a tile's side S in pixels, `tiles` the maximum of tiles T per view.
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
        self._upstream, self._resample, self._normalization = upstream, resample, _Normalization(mean, std, factor)
        self._ratios = upstream.get_all_supported_aspect_ratios(tiles)  # (rows, columns) of tiles; ids count from 1

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a model's preprocessor_config.json. Raises UserError for values that are not supported."""
        file = read(path, MllamaDescription)
        return cls(
            file.size,
            file.max_image_tiles,
            file.image_mean,
            file.image_std,
            file.resample,
            file.rescale_factor,
        )

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (V, T, 3, S, S) float32, aspect_ratio_ids (V,), aspect_ratio_mask (V, T), num_tiles (V,).

        Tiles that a view does not need are zero in pixel_values and in the mask.
        """
        size, count = self.size, len(views)
        pixel_values = np.zeros((count, self.tiles, 3, size, size), np.float32)
        ids, mask = np.zeros(count, np.int64), np.zeros((count, self.tiles), np.int64)
        for number, view in enumerate(map(_gray_or_rgb, views)):
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
                self._normalization.write(canvas[top : top + size, left : left + size], pixel_values[number, tile])
            ids[number] = self._ratios.index((rows, columns)) + 1
            mask[number, : rows * columns] = 1
        return {
            "pixel_values": pixel_values,
            "aspect_ratio_ids": ids,
            "aspect_ratio_mask": mask,
            "num_tiles": mask.sum(axis=1),
        }

    def show(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them, from their tiles; the padding is black."""
        pictures = []
        for tiles, ratio in zip(images["pixel_values"], images["aspect_ratio_ids"], strict=True):
            assert ratio > 0, "padding of a batch is no picture"
            rows, columns = self._ratios[int(ratio) - 1]
            grid = tiles[: rows * columns].reshape(rows, columns, 3, self.size, self.size).transpose(2, 0, 3, 1, 4)
            pictures.append(self._normalization.read(grid.reshape(3, rows * self.size, columns * self.size)))
        return pictures


class ClipImages:
    """Make each view one square of S x S pixels.

    fit="crop" is what CLIP does: the shorter edge becomes S, and the centre is cut out. It loses the sides of a
    lateral view, and the outer views of a stitched picture. fit="pad" is what LLaVA does: the view is padded to a
    square with the mean colour, equally on both sides, and nothing is lost (haotian-liu/LLaVA: llava/mm_utils.py).
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
        self.background = tuple(int(255 * share) for share in mean)
        self._resample, self._normalization = resample, _Normalization(mean, std, factor)

    @classmethod
    def from_file(cls, path: Path, fit: Literal["crop", "pad"] = "crop") -> Self:
        """Read a model's preprocessor_config.json. Raises UserError for values that are not supported."""
        file = read(path, ClipDescription)
        mean, std, factor = file.image_mean, file.image_std, file.rescale_factor
        return cls(file.crop_size, mean, std, fit, file.resample, factor, file.size)

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (V, 3, S, S) float32."""
        pixel_values = np.empty((len(views), 3, self.size, self.size), np.float32)
        for values, view in zip(pixel_values, map(_gray_or_rgb, views), strict=True):
            if self.fit == "crop" or view.width == view.height:
                self._normalization.write(np.asarray(self._centre(self._shorten(view))), values)
            elif view.mode == "RGB":
                self._normalization.write(np.asarray(self._centre(self._pad(view, self.background))), values)
            else:  # gray, but the mean colour is not: in the padding, the channels differ
                padded = {level: np.asarray(self._centre(self._pad(view, level))) for level in set(self.background)}
                self._normalization.write(np.stack([padded[level] for level in self.background], axis=2), values)
        return {"pixel_values": pixel_values}

    def show(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        return [self._normalization.read(values) for values in images["pixel_values"]]

    def _shorten(self, view: Image.Image) -> Image.Image:
        """Resize to the requested length of the shorter edge (transformers: get_resize_output_image_size)."""
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
        """Cut out the centre, or pad a smaller picture with black (transformers: center_crop)."""
        left, top = (view.width - self.size) // 2, (view.height - self.size) // 2
        return view.crop((left, top, left + self.size, top + self.size))


class SwinImages:
    """Resize each view to S x S pixels, whatever its shape, as ViTImageProcessor does for checkpoints of Swin."""

    def __init__(
        self,
        size: int,
        mean: Colour = (0.485, 0.456, 0.406),  # ImageNet's
        std: Colour = (0.229, 0.224, 0.225),
        resample: Resampling = Resampling.BICUBIC,
        factor: float = 1 / 255,
    ) -> None:
        self.size = size
        self._resample, self._normalization = resample, _Normalization(mean, std, factor)

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a model's preprocessor_config.json. Raises UserError for values that are not supported."""
        file = read(path, VitDescription)
        return cls(
            file.size,
            file.image_mean,
            file.image_std,
            file.resample,
            file.rescale_factor,
        )

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (V, 3, S, S) float32."""
        pixel_values = np.empty((len(views), 3, self.size, self.size), np.float32)
        for values, view in zip(pixel_values, map(_gray_or_rgb, views), strict=True):
            self._normalization.write(np.asarray(view.resize((self.size, self.size), self._resample)), values)
        return {"pixel_values": pixel_values}

    def transformers_arguments(self) -> dict[str, Any]:
        """Return the arguments of an equal ViTImageProcessor of transformers."""
        return {
            "size": {"height": self.size, "width": self.size},
            "resample": int(self._resample),
            **self._normalization.transformers_arguments(),
        }

    def show(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        return [self._normalization.read(values) for values in images["pixel_values"]]


class QwenImages:
    """Cut each view, in its own proportions, into patches in the order in which Qwen3-VL joins them, M x M to a token.

    Sides become the nearest multiples of P * M pixels (`patch` P, `merge` M) for which the area is within `min_pixels`
    and `max_pixels`. Each patch is there twice, as the two frames of a still video.
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
        self._nearest, self._resample, self._normalization = smart_resize, resample, _Normalization(mean, std, factor)

    @classmethod
    def from_file(cls, path: Path, max_pixels: int | None = None) -> Self:
        """Read a model's preprocessor_config.json, but limit views to `max_pixels`. Raises UserError."""
        file = read(path, QwenDescription)
        least, most = file.size
        if max_pixels is not None and max_pixels < least:
            raise UserError(f"model.max_pixels {max_pixels}: {path} needs at least {least}")
        return cls(
            file.patch_size, file.merge_size, least, min(most, max_pixels or most), file.image_mean, file.image_std,
            file.resample, file.rescale_factor,
        )  # fmt: skip

    def __call__(self, views: Sequence[Image.Image]) -> Arrays:
        """Return pixel_values (N, 3 * 2 * P * P) float32 of N patches in all views, and image_grid_thw (V, 3): 1, rows,
        columns.

        Raises UserError for a view that is 200 times as long as it is wide.
        """
        grids = np.ones((len(views), 3), np.int64)
        patches = []
        for grid, view in zip(grids, map(_gray_or_rgb, views), strict=True):
            try:
                height, width = self._nearest(
                    view.height, view.width, self.patch * self.merge, self.min_pixels, self.max_pixels
                )
            except ValueError as error:
                raise UserError(f"a view of {view.width} x {view.height} pixels: {first_line(error)}") from error
            pixels = np.asarray(view.resize((width, height), self._resample))
            values = np.empty((3, height, width), np.float32)
            self._normalization.write(pixels, values)
            grid[1:] = height // self.patch, width // self.patch
            ordered = self._blocks(values, grid).transpose(1, 4, 2, 5, 0, 3, 6)
            twice = np.broadcast_to(ordered[:, :, :, :, :, None], (*ordered.shape[:5], self.FRAMES, *ordered.shape[5:]))
            patches.append(twice.reshape(int(grid.prod()), -1))
        return {"pixel_values": np.concatenate(patches), "image_grid_thw": grids}

    def transformers_arguments(self) -> dict[str, Any]:
        """Return the arguments of an equal Qwen2VLImageProcessor of transformers."""
        return {
            "patch_size": self.patch,
            "merge_size": self.merge,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "resample": int(self._resample),
            **self._normalization.transformers_arguments(),
        }

    def show(self, images: Arrays) -> list[Image.Image]:
        """Return the views of one study as the model sees them."""
        pictures, done = [], 0
        for _, rows, columns in images["image_grid_thw"].tolist():
            patches = images["pixel_values"][done : done + rows * columns]
            done += rows * columns
            merge, patch = self.merge, self.patch
            shape = (rows // merge, columns // merge, merge, merge, 3, self.FRAMES, patch, patch)
            pixels = patches.reshape(shape)[:, :, :, :, :, 0].transpose(4, 0, 2, 5, 1, 3, 6)
            pictures.append(self._normalization.read(pixels.reshape(3, rows * patch, columns * patch)))
        return pictures

    def _blocks(self, values: npt.NDArray[np.float32], grid: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Reshape (3, height, width) to (3, rows / M, M, P, columns / M, M, P)."""
        merge, patch = self.merge, self.patch
        rows, columns = int(grid[1]) // merge, int(grid[2]) // merge
        return values.reshape(3, rows, merge, patch, columns, merge, patch)


def stitch(views: Sequence[Image.Image], gap: int = 10, limit: int = 4) -> Image.Image:
    """Put the first `limit` views side by side in their own sizes, tops aligned, with `gap` black pixels between them.

    Gray stays gray. As X-iZhang/RRG-BioNLP-ACL2024 prepares the studies of Med-CXRGen.
    """
    pictures = [_gray_or_rgb(view) for view in views[:limit]]
    assert pictures, "no view to stitch"
    mode = "L" if all(view.mode == "L" for view in pictures) else "RGB"
    width = sum(view.width for view in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new(mode, (width, max(view.height for view in pictures)))
    left = 0
    for view in pictures:
        canvas.paste(view, (left, 0))
        left += view.width + gap
    return canvas


class _Normalization:
    """Convert 0 to 255 to the values that a model takes, and back: (level * factor - mean) / std, by channel."""

    def __init__(self, mean: Colour, std: Colour, factor: float) -> None:
        self._scale = (factor / np.asarray(std)).astype(np.float32)
        self._shift = (-np.asarray(mean) / np.asarray(std)).astype(np.float32)
        self._arguments = {"image_mean": list(mean), "image_std": list(std), "rescale_factor": factor}

    def transformers_arguments(self) -> dict[str, Any]:
        """Return the arguments of transformers' image processors."""
        return dict(self._arguments)

    def write(self, pixels: npt.NDArray[np.uint8], values: npt.NDArray[np.float32]) -> None:
        """Fill values (3, height, width) from pixels of shape (height, width) or (height, width, 3)."""
        for top in range(0, len(pixels), ROWS):
            floats = pixels[top : top + ROWS].astype(np.float32)
            for channel, (scale, shift) in enumerate(zip(self._scale, self._shift, strict=True)):
                into = values[channel, top : top + ROWS]
                np.multiply(floats if floats.ndim == 2 else floats[:, :, channel], scale, out=into)
                np.add(into, shift, out=into)

    def read(self, values: npt.NDArray[np.float32]) -> Image.Image:
        """Return the picture of values (3, height, width); gray if its channels are equal."""
        levels = (values - self._shift[:, None, None]) / self._scale[:, None, None]
        red, green, blue = pixels = np.rint(levels).clip(0, 255).astype(np.uint8)
        gray = np.array_equal(red, green) and np.array_equal(red, blue)
        return Image.fromarray(red if gray else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def _gray_or_rgb(view: Image.Image) -> Image.Image:
    """Convert any picture to L or RGB, transparency over white (transformers: convert_to_rgb)."""
    if view.has_transparency_data:
        view = view.convert("RGBA")
        view = Image.alpha_composite(Image.new("RGBA", view.size, (255, 255, 255, 255)), view)
    if view.mode == "1":
        return view.convert("L")
    return view if view.mode in ("L", "RGB") else view.convert("RGB")

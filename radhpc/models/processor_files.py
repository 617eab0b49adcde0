"""Read the file in a model's folder that describes its images, as each image processor of transformers writes it.

    path = description_file(Path("models/llava-1.5-7b-hf"))      # processor_config.json or preprocessor_config.json
    read(path, ClipDescription).crop_size                        # 336

Defaults are those of transformers' classes; null means the default. What image_processors.py does not do is refused:
read() raises UserError with the file, the key and what is allowed.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from PIL.Image import Resampling
from pydantic import BaseModel, BeforeValidator, ConfigDict, PositiveFloat, PositiveInt, ValidationError

from radhpc.core.errors import UserError, first_line
from radhpc.core.files import read_json

Colour = tuple[float, float, float]  # red, green, blue; as means and standard deviations of values from 0 to 1

HALF: Colour = (0.5, 0.5, 0.5)
CLIP_MEAN: Colour = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Colour = (0.26862954, 0.26130258, 0.27577711)

_WITHOUT_EFFECT = {  # on the values
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
    """Return a processor's name without the suffix of its backend."""
    return name.removesuffix("Fast").removesuffix("Pil") if isinstance(name, str) else name


def _three(value: object) -> object:
    return [value] * 3 if isinstance(value, int | float) else value


Square = Annotated[PositiveInt, BeforeValidator(_square)]
Channels = Annotated[Colour, BeforeValidator(_three)]
Deviations = Annotated[tuple[PositiveFloat, PositiveFloat, PositiveFloat], BeforeValidator(_three)]


def description_file(folder: Path) -> Path | None:
    """Return the file in a model's folder that describes its images, if there is one.

    transformers 5 writes it into processor_config.json, under "image_processor", and earlier releases write
    preprocessor_config.json; where both exist the former counts, as it does for transformers.
    """
    nested, own = folder / "processor_config.json", folder / "preprocessor_config.json"
    if nested.exists() and isinstance(content := _read_json(nested), dict) and "image_processor" in content:
        return nested
    return own if own.exists() else None


class _Description(BaseModel):
    """The keys that all image processors have."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    do_resize: Literal[True] = True
    do_rescale: Literal[True] = True
    rescale_factor: PositiveFloat = 1 / 255
    do_normalize: Literal[True] = True
    image_mean: Channels = HALF
    image_std: Deviations = HALF
    do_convert_rgb: bool = True  # without effect: pictures are L or RGB
    data_format: Literal["channels_first"] = "channels_first"


Description = TypeVar("Description", bound=_Description)


class MllamaDescription(_Description):
    """The keys of transformers' MllamaImageProcessor."""

    image_processor_type: Annotated[Literal["MllamaImageProcessor"], BeforeValidator(_bare_name)] = (
        "MllamaImageProcessor"
    )
    size: Square = 224
    max_image_tiles: PositiveInt = 4
    do_pad: Literal[True] = True
    resample: Resampling = Resampling.BILINEAR


class ClipDescription(_Description):
    """The keys of transformers' CLIPImageProcessor."""

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


class VitDescription(_Description):
    """The keys of transformers' ViTImageProcessor."""

    image_processor_type: Annotated[Literal["ViTImageProcessor"], BeforeValidator(_bare_name)] = "ViTImageProcessor"
    feature_extractor_type: Literal["ViTFeatureExtractor"] = "ViTFeatureExtractor"
    size: Square = 224
    default_to_square: Literal[True] = True
    do_center_crop: Literal[False] = False
    do_pad: Literal[False] = False
    resample: Resampling = Resampling.BILINEAR


class QwenDescription(_Description):
    """The keys of transformers' Qwen2VLImageProcessor."""

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


def read(path: Path, kind: type[Description]) -> Description:
    """Read a file that describes an image processor. Raises UserError for values that are not supported."""
    content = _read_json(path)
    if isinstance(content, dict) and "image_processor" in content:
        content = content["image_processor"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: {type(content).__name__}; allowed is an object that describes an image processor")
    values = {key: value for key, value in content.items() if value is not None and key not in _WITHOUT_EFFECT}
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].lower()
        if first["type"] == "extra_forbidden":
            message = f"allowed are {', '.join(kind.model_fields)}"
        raise UserError(f"{path}: {key}: {first['input']!r}: {message}") from error


def _read_json(path: Path) -> Any:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}; allowed is a JSON file") from error
    if content is None:
        raise UserError(f"{path}: no such file")
    return content

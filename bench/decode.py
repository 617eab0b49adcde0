"""How fast a JPEG becomes the arrays that a model wants, beside other decoders and transformers' own processors.

    python -m bench.decode [--json] [--quick]

Everything that is compared runs in this one process, in turns; the pictures are drawn for it, with a radiograph's
noise. Below a minute.
"""

import io
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from bench import report
from radhpc.core.image_decoding import decode
from radhpc.models.image_processors import CLIP_MEAN, CLIP_STD, ClipImages, MllamaImages, SwinImages, stitch
from shards.datasets import phantom

NOTES = """\
Decoding: gray JPEGs of 512 pixels at quality 95. Single threads by CPU time, two threads by the clock.
simplejpeg, Pillow and OpenCV give what they decode; radhpc's decode reads the header first and gives a picture of
Pillow's. OpenCV and Pillow pass over damage in the middle of a file, radhpc's decode does not.
Processing: one gray view of 1120 x 1000 (height x width), decoded before. Mllama: S = 560, T = 4; CLIP: S = 336;
Swin: S = 224. Padding: as LLaVA does it, whose code for it runs before transformers' processor; "stitched" is four
such views. The largest difference is between radhpc's values and transformers', over all of these."""

ROUNDS = 10
Task = Callable[[], object]


def main() -> None:
    parser = report.parser("decode", __doc__, "one round, to see that the measurements run")
    arguments = parser.parse_args()
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    for measure in (decoding, processing):
        print(f"measuring: {measure.__name__}", file=sys.stderr, flush=True)
        for into, found in zip((ratios, figures), measure(1 if arguments.quick else ROUNDS), strict=True):
            into.update(found)
    report.show("From JPEGs to a model's arrays", ratios, figures, NOTES, arguments.json)


Measured = tuple[dict[str, float], dict[str, float]]  # ratios, figures


def decoding(rounds: int) -> Measured:
    """Decoders beside each other, in one thread and in two."""
    encoded = [_jpeg(_radiograph(number, 512, 420 + 10 * number)) for number in range(9)]
    decoders: dict[str, Callable[[bytes], object]] = {
        "radhpc": decode,
        "Pillow": lambda data: Image.open(io.BytesIO(data)).load(),
        "simplejpeg": lambda data: simplejpeg.decode_jpeg(data, colorspace="GRAY"),
    }
    try:
        import cv2  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("OpenCV is not installed: left out", file=sys.stderr)
    else:
        cv2.setNumThreads(1)
        decoders["OpenCV"] = lambda data: cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)

    def all_of_them(decoder: Callable[[bytes], object]) -> None:
        for data in encoded:
            decoder(data)

    one = {name: partial(all_of_them, decoder) for name, decoder in decoders.items()}
    seconds = report.interleaved(one, rounds)
    with ThreadPoolExecutor(2) as pool:
        two = {f"{name} twice": partial(_twice, pool, task) for name, task in one.items()}
        both = report.interleaved(one | two, rounds, time.perf_counter)
    ratios = {f"decode, time of {name} / radhpc": seconds[name] / seconds["radhpc"] for name in one if name != "radhpc"}
    ratios |= {f"decode, {name}: images/s of two threads / one": 2 * both[name] / both[f"{name} twice"] for name in one}
    figures = {f"CPU ms to decode, {name}": 1e3 * seconds[name] / len(encoded) for name in one}
    return ratios, figures | {"KB of a JPEG": sum(map(len, encoded)) / len(encoded) / 1e3}


def processing(rounds: int) -> Measured:
    """Processors beside transformers' own: CPU time, values compared, and two threads."""
    view = decode(_jpeg(_radiograph(0, 1120, 1000)))
    stitched = stitch([view] * 4)
    mllama, clip, padded, swin = (
        MllamaImages(560, 4, CLIP_MEAN, CLIP_STD),
        ClipImages(336),
        ClipImages(336, fit="pad"),
        SwinImages(224),
    )
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    their_mllama = MllamaImageProcessorPil(size=_square(560), image_mean=CLIP_MEAN, image_std=CLIP_STD)
    their_clip = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=_square(336))
    their_swin = ViTImageProcessorPil(size=_square(224), resample=3, image_mean=mean, image_std=std)
    pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "Mllama": (lambda: mllama([view]), lambda: their_mllama(images=[view], return_tensors="np")),
        "CLIP": (lambda: clip([view]), lambda: their_clip(images=[view], return_tensors="np")),
        "CLIP, padded": (lambda: padded([view]), lambda: their_clip(images=[_expand(view)], return_tensors="np")),
        "CLIP, stitched and padded": (
            lambda: padded([stitched]),
            lambda: their_clip(images=[_expand(stitched)], return_tensors="np"),
        ),
        "Swin": (lambda: swin([view]), lambda: their_swin(images=[view.convert("RGB")], return_tensors="np")),
    }
    ratios: dict[str, float] = {}
    figures: dict[str, float] = {}
    largest = 0.0
    for name, (ours, theirs) in pairs.items():
        values, wanted = ours()["pixel_values"], np.asarray(theirs()["pixel_values"])
        largest = max(largest, float(np.abs(values - wanted.reshape(values.shape)).max()))
        seconds = report.interleaved({"radhpc": ours, "transformers": theirs}, rounds)
        with ThreadPoolExecutor(2) as pool:
            both = report.interleaved({"one": ours, "two": partial(_twice, pool, ours)}, rounds, time.perf_counter)
        ratios[f"{name}, time of transformers / radhpc"] = seconds["transformers"] / seconds["radhpc"]
        ratios[f"{name}, radhpc: views/s of two threads / one"] = 2 * both["one"] / both["two"]
        figures |= {f"CPU ms for {name}, {who}": 1e3 * value for who, value in seconds.items()}
    return ratios, figures | {"largest difference, in millionths": 1e6 * largest}


def _twice(pool: ThreadPoolExecutor, task: Task) -> None:
    for done in [pool.submit(task), pool.submit(task)]:
        done.result()


def _radiograph(number: int, height: int, width: int) -> Image.Image:
    """A drawn radiograph of 8 bits with noise of a few levels."""
    drawn = Image.fromarray(phantom.Picture(0, number, "PA", 512)().pixels.astype(np.float32))
    large = np.asarray(drawn.resize((width, height), Image.Resampling.BICUBIC)) / 16
    noise = np.random.default_rng(number).standard_normal((height, width)) * 3
    return Image.fromarray(np.clip(large + noise, 0, 255).astype(np.uint8))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def _square(size: int) -> dict[str, int]:
    return {"height": size, "width": size}


def _expand(view: Image.Image) -> Image.Image:
    """To a square of CLIP's mean colour, as a user of LLaVA does it."""
    side, colour = max(view.size), tuple(int(255 * mean) for mean in CLIP_MEAN)
    square = Image.new("RGB", (side, side), colour)
    square.paste(view.convert("RGB"), ((side - view.width) // 2, (side - view.height) // 2))
    return square


if __name__ == "__main__":
    main()

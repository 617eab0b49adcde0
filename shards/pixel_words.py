"""Reads the words that are written into the pixels of finished shards, for a person to look at.

    words = read_pixels("/data/shards/own", load_reader(), lambda done, total: None)
    words.suspects, words.samples, words.file      # images that look like text, samples with words, a private list

Only images in which shards.images.text_in_pixels sees something are read, with RapidOCR (the extra `ocr`; its weights
come with it). Words that say how an image was taken (AP, ERECT, L, a window's numbers) are left aside. Others are
listed with the key of their sample where their owner alone reads them. What the search does not see is not read.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.image_decoding import decode
from radhpc.core.manifest import Manifest
from radhpc.core.sample import Sample
from radhpc.storage.store import Store
from shards.images.text_in_pixels import find_text
from shards.verify import Progress

Reader = Callable[[npt.NDArray[np.uint8]], list[str]]  # lines of text in an image, (h, w, 3)
MARGIN = 24  # pixels around what looks like text
# How and where an image was taken, as written beside it; compared without spaces, as readers lose them.
_MARKERS = (
    r"ap|pa|lat(?:eral)?|[lr]l|[lr]|left|right|links|rechts|droite|gauche|sin|dx|(?:semi)?erect|upright|standing|sitting"
    r"|supine|prone|decub(?:itus)?|mobile|portable|bedside|bett|stehend|liegend|sitzend|(?:in|ex)spiration|expiration"
    r"|chest|t(?:h)?orax|view|[wlcz]-?\d{1,5}"
)
_MARKER = re.compile(rf"(?:{_MARKERS})*")
_SEPARATORS = re.compile(r"[\W_]")


@dataclass(frozen=True)
class PixelWords:
    """Words that were read in the images of a dataset."""

    suspects: int  # images that look as if text is written into them
    samples: int  # with words that are no markers
    file: Path | None  # a line for each of them: key, image, words; None for none


def load_reader() -> Reader:
    """Load RapidOCR. Raises UserError where it is not installed."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError as error:
        raise UserError("--read-pixels: needs RapidOCR, the extra `ocr`: make install EXTRAS=ocr") from error
    engine: Any = RapidOCR()
    return lambda image: [str(line[1]) for line in engine(image)[0] or []]


def is_marker(text: str) -> bool:
    """Return whether a line says only how an image was taken."""
    return _MARKER.fullmatch(_SEPARATORS.sub("", text.lower())) is not None


def read_pixels(url: str, read: Reader, progress: Progress = lambda done, total: None) -> PixelWords:
    """Read the suspicious images of a dataset. Raises UserError where it cannot be opened."""
    store = Store(url)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    suspects, lines, keys = 0, list[str](), set[str]()
    for row in range(len(index)):
        members = {member.name.split(".", 1)[1]: member for member in index.members(row)}
        shard = manifest.shards[int(index.shard[row])].name
        description = members.pop("json")
        sample = Sample.model_validate_json(store.read_range(shard, description.offset, description.length))
        for number, (member, view) in enumerate(zip(members.values(), sample.images, strict=True)):
            image = np.asarray(decode(store.read_range(shard, member.offset, member.length), view).convert("RGB"))
            boxes, words = find_text(image), list[str]()
            suspects += bool(boxes)
            for left, top, right, bottom in boxes:
                part = image[max(0, top - MARGIN) : bottom + MARGIN, max(0, left - MARGIN) : right + MARGIN]
                words += [" ".join(text.split()) for text in read(np.ascontiguousarray(part)) if not is_marker(text)]
            if words:
                keys.add(sample.key)
                lines.append(f"{sample.key}\t{number}\t{' | '.join(words)}\n")
        progress(row + 1, len(index))
    store.close()
    return PixelWords(suspects, len(keys), _write(manifest, lines) if lines else None)


def _write(manifest: Manifest, lines: list[str]) -> Path:
    """List the words where the user alone reads them: they may be patients'."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "radhpc" / "pixels"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / f"{manifest.dataset}-{manifest.build_hash[:12]}.tsv"
    write_atomically(path, "".join(lines).encode(), 0o600)
    return path

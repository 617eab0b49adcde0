"""Check whether a picture is a radiograph at all: a plain test of colour, gray levels and detail.

    radiograph_warnings(view, modality=None) -> ["it is in colour"]       # empty: no reason to doubt it

Enters: a view of 8 bits, as image_decoding.py decodes it. Each limit lies between what was measured on real chest
radiographs (22, and one of another archive) and phantoms, which all pass, and drawings, pages of text, charts, noise
and photographs, which do not. It tells no chest from a knee, and no smooth gray photograph or CT slice saved as a
picture from either: that needs a model (see feature_index.py, which measures how far a study is from the training
studies).
"""

import numpy as np
from PIL import Image
from PIL.Image import Resampling

SIDE = 256  # pixels that a view is resized to before its detail is measured
COLOUR = 5.0  # mean spread of a pixel's channels in gray levels; radiographs 0, photographs in colour 25 to 77
BITS = 4.5  # entropy of the gray levels; radiographs 5.2 to 7.8, charts and drawings 0.4 to 2
DETAIL = 0.32  # mean Laplacian in standard deviations; radiographs up to 0.23, gray photographs 0.19 to 0.41, text 2
FLAT = 5.0  # standard deviation of the gray levels; radiographs 39 to 92
SHAPE = 2.5  # longer side by shorter; radiographs up to 1.4
PROJECTIONS = ("CR", "DX", "RG", "RF", "XA", "MG", "PX")  # of DICOM's modalities


def radiograph_warnings(view: Image.Image, modality: str | None = None) -> list[str]:
    """Return the reasons against a radiograph, in words; `modality` as a DICOM header gives it."""
    reasons = []
    if modality is not None and modality not in PROJECTIONS:
        reasons.append(f"its DICOM header says {modality}")
    if max(view.size) > SHAPE * min(view.size):
        reasons.append(f"it is {view.width} x {view.height} pixels")
    if view.mode != "L":
        pixels = np.asarray(_resized(view.convert("RGB")), np.float64)
        if float(np.mean(pixels.max(axis=2) - pixels.min(axis=2))) > COLOUR:
            reasons.append("it is in colour")
    gray = view.convert("L")
    shares = np.bincount(np.asarray(gray).ravel(), minlength=256) / (gray.width * gray.height)
    pixels = np.asarray(_resized(gray), np.float64)
    if pixels.std() < FLAT:
        return [*reasons, "there is nothing to see on it"]
    if float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum()) < BITS:
        reasons.append("it has few gray levels, as a drawing")
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    if float(np.abs(4 * pixels[1:-1, 1:-1] - around).mean() / pixels.std()) > DETAIL:
        reasons.append("it has finer detail than a radiograph")
    return reasons


def _resized(view: Image.Image) -> Image.Image:
    """Shrink by areas and enlarge smoothly: an enlarged pixel has no edges of its own."""
    return view.resize((SIDE, SIDE), Resampling.BOX if min(view.size) >= SIDE else Resampling.BILINEAR)

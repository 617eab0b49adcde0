"""Draws a chest radiograph: soft tissue, lungs, heart, ribs, and the findings, as 12-bit values.

    draw("PA", 256, [Finding("effusion left", "left", 0.5)], anatomy, exposure)       # (256, 256) uint16

Coordinates are those of the thorax: x from -1 to 1 with the patient's right at -1 (the viewer's left, as
radiographs are hung), y from -1 (neck) to 1 (abdomen). Brightness is how much the body absorbs, 0 to about 1.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

BITS = 12
Projection = Literal["PA", "L"]
PROJECTIONS: tuple[Projection, ...] = ("PA", "L")
Plane = npt.NDArray[np.floating[Any]]  # (size, size), float32 throughout

AIR, LUNG, TISSUE, HEART, FLUID, FILLED, NODULE, LEAD = 0.02, 0.25, 0.46, 0.52, 0.67, 0.73, 0.85, 0.95  # brightness
COARSE = 256  # pixels: pictures from here on are drawn at half the size and enlarged, soft as real ones are
TEXTURES = 8  # vessel patterns kept in memory; each patient gets a shifted, mirrored one


@dataclass(frozen=True)
class Finding:
    """A finding: its label, its side of the patient, and its extent from 0, the least that is drawn, to 1, the most."""

    label: str
    side: Literal["left", "right"]
    extent: float


def draw(
    view: Projection, size: int, findings: list[Finding], anatomy: np.random.Generator, exposure: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """Draw one view. `anatomy` belongs to the patient, `exposure` to this picture."""
    x, y = _place(size // 2 if size >= COARSE else size, exposure)
    picture = (_frontal if view == "PA" else _lateral)(x, y, findings, anatomy)
    _mark(picture)
    if size >= COARSE:
        picture = np.array(Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC))
    picture *= exposure.uniform(0.85, 1.15)
    picture += exposure.uniform(0.0, 0.06)
    picture += exposure.standard_normal((size, size), dtype=np.float32) * exposure.uniform(0.005, 0.012)
    picture *= 3000
    return np.clip(picture, 0, (1 << BITS) - 1).astype(np.uint16)


def _place(size: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Coordinates of each pixel in the thorax: the patient stands a little off, turned, near or far."""
    scale, turn = 1 / rng.uniform(1.11, 1.17), rng.uniform(-0.02, 0.02)
    right, down = rng.uniform(-0.02, 0.02, size=2)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    u, v = line[None, :] - np.float32(right), line[:, None] - np.float32(down)
    cosine, sine = np.float32(np.cos(turn) * scale), np.float32(np.sin(turn) * scale)
    return u * cosine - v * sine, u * sine + v * cosine


def _mark(picture: Plane) -> None:
    """Lay the lead letter L in the corner on the patient's left; brighter than any body, it pins the window."""
    side = len(picture)
    top, bottom, left, right, width = (round(share * side) for share in (0.03, 0.16, 0.90, 0.985, 0.04))
    picture[top:bottom, left : left + width] = LEAD
    picture[bottom - width : bottom, left:right] = LEAD


def _frontal(x: Plane, y: Plane, findings: list[Finding], rng: np.random.Generator) -> Plane:
    by_label = {finding.label: finding for finding in findings}
    x, y = x / rng.uniform(0.97, 1.03), y / rng.uniform(0.97, 1.03)
    away = np.abs(x)

    shoulders = 0.28 + 0.64 * np.clip((y + 0.88) * 4.5, 0, 1) - 0.05 * np.clip((y + 0.66) * 4, 0, 1)
    body = soft(away - shoulders, 0.05)
    picture = body * (TISSUE + 0.05 - 0.05 * away) + AIR
    picture += soft(away - 0.07, 0.05) * body * (0.03 + 0.02 * np.sin(y * 34))  # spine

    texture = _texture(x.shape[0], rng)
    bases = {"left": rng.uniform(0.43, 0.50), "right": rng.uniform(0.37, 0.44)}
    middle = round(0.42 * x.shape[1])  # a lung lies in its half of the picture, and a little beyond
    for side, sign, half in (("left", 1, slice(middle, None)), ("right", -1, slice(None, -middle))):
        patch = picture[:, half], x[:, half] * sign, y[:, half]
        picture[:, half] = _lung(*patch, bases[side], side, texture[:, half], by_label)

    picture += _bones(y, away, body)
    large = by_label.get("cardiomegaly")
    normal = rng.uniform(0.38, 0.46)  # cardiothoracic ratio
    heart = _mediastinum(x, y, 0.62 + 0.08 * large.extent if large else normal)
    return np.maximum(picture, heart, out=picture)


def _lung(
    picture: Plane, out: Plane, y: Plane, base: float, side: str, texture: Plane, findings: dict[str, Finding]
) -> Plane:
    """Draw one lung and its findings; `out` is the distance from the midline toward this side."""
    along = np.sqrt(np.clip(1 - np.square(np.minimum(y - 0.30, 0) / 1.10), 0, None))
    edge = out - 0.37 * along - 0.40  # negative inside, the chest wall at zero
    dome = 2.1 * np.square(out - 0.36) + base  # height of the diaphragm
    lung = soft(edge, 0.03)
    lung *= soft(0.40 - 0.27 * along - out, 0.03)
    lung *= soft(y - dome, 0.03)
    vessels = texture * np.clip(1 - np.square(out - 0.2) - np.square(y + 0.05), 0, 1)  # thin out toward the edge
    inside = LUNG + 0.07 * vessels

    air = findings.get("pneumothorax")
    if air and air.side == side:
        rim = edge + (0.18 + 0.10 * air.extent) * (1 + 0.9 * np.clip(-y, 0, 1))  # wider at the apex
        inside += 0.18  # the lung, collapsed and dense
        inside = blend(inside, 0.03, soft(-rim, 0.015))
        inside += 0.35 * soft(np.abs(rim) - 0.012, 0.012)  # the pleural line
    for label, finding in findings.items():
        if finding.side == side:
            if label.startswith("consolidation"):
                inside = blend(inside, FILLED, _consolidation(label, out, y, finding.extent, texture))
            elif label.startswith("nodule"):
                inside = blend(inside, NODULE, _nodule(label, out, y, finding.extent, side))
            elif label.startswith("effusion"):
                level = base - 0.10 - 0.16 * finding.extent - 0.9 * np.square(np.clip(out - 0.30, 0, None))
                inside = blend(inside, FLUID, soft(level - y, 0.03))
    return blend(picture, inside, lung)


_LOBES = {  # centre and radii of the filled part: out, y
    "consolidation right upper": (0.42, -0.44, 0.34, 0.27),
    "consolidation right middle": (0.34, 0.05, 0.29, 0.19),
    "consolidation right lower": (0.54, 0.36, 0.28, 0.19),
    "consolidation left upper": (0.44, -0.36, 0.32, 0.30),
    "consolidation left lower": (0.60, 0.30, 0.22, 0.22),
}
_ZONES = {"nodule upper": -0.50, "nodule middle": -0.08, "nodule lower": 0.27}  # y of the centre


def _consolidation(label: str, out: Plane, y: Plane, extent: float, texture: Plane) -> Plane:
    """Return the mask of a filled lobe: patchy inside, with soft edges."""
    across, down, width, height = _LOBES[label]
    grow = 0.9 + 0.2 * extent
    distance = np.hypot((out - across) / (width * grow), (y - down) / (height * grow))
    return soft(distance - 0.85 - 0.08 * texture, 0.40) * (0.88 + 0.12 * texture)


def _nodule(label: str, out: Plane, y: Plane, extent: float, side: str) -> Plane:
    """Return the mask of a round shadow with a sharp edge."""
    radius = 0.115 + 0.035 * extent
    across = 0.40 + 0.16 * ((extent * 7.3) % 1)
    if side == "left" and label == "nodule lower":
        across = 0.60  # beside the heart
    return soft(np.hypot(out - across, y - _ZONES[label]) - radius, 0.025)


def _bones(y: Plane, away: Plane, body: Plane) -> Plane:
    """Ribs (the back parts bright, the front parts faint) and clavicles."""
    cage = soft(away - 0.80, 0.06)
    cage *= soft(0.10 - away, 0.04)
    cage *= soft(np.abs(y + 0.05) - 0.66, 0.2)
    back = y * 6.5 + away * (2.4 * away - 1.6)
    front = y * 6.5 + away * 3.6
    bones = 0.06 * _stripes(back, 0.20) + 0.025 * _stripes(front, 0.22)
    bones *= cage
    clavicle = soft(np.abs(y + 0.62 + 0.3 * np.square(away - 0.75)) - 0.025, 0.02)
    clavicle *= soft(np.abs(away - 0.42) - 0.34, 0.04)
    return np.maximum(bones, 0.11 * clavicle * body)


def _mediastinum(x: Plane, y: Plane, share: float) -> Plane:
    """Heart, great vessels and hila; `share` is the heart's part of the inner thorax's width."""
    width = share * 0.77  # half the heart's width; the inner thorax is 1.54 wide
    across, down = x - (0.36 * width + 0.03), y - 0.27
    main, cross = (across + 0.30 * down) / width, (down - 0.30 * across) / (0.30 + 0.12 * share)
    shadow = soft(np.square(main) + np.square(cross) - 1, 0.20)
    shadow = np.maximum(shadow, soft(np.abs(x - 0.02) - 0.03 * np.square(y) - 0.13, 0.05))  # great vessels
    shadow = np.maximum(shadow, soft(np.square(x - 0.13) + np.square(y + 0.34) - 0.010, 0.010))  # aortic knob
    shadow *= HEART
    hila: Plane = np.square((np.abs(x) - 0.20) / 0.09) + np.square((y + 0.06) / 0.14)
    hila = 0.40 * soft(hila - 1, 1.2)
    return np.maximum(shadow, hila)


def _lateral(x: Plane, y: Plane, findings: list[Finding], rng: np.random.Generator) -> Plane:
    """Draw the side view, spine to the viewer's right; findings are fainter here."""
    outline = 0.36 + 0.36 * np.clip((y + 0.90) * 2.4, 0, 1)
    body = soft(np.abs(x) - outline, 0.05)
    picture = body * HEART + AIR
    dome = 0.46 + 0.30 * np.square(np.clip(x + 0.30, 0, None)) + 0.20 * np.clip(-x - 0.30, 0, None)
    lung = soft(np.hypot((x + 0.02) / 0.60, (y - 0.10) / 0.92) - 1, 0.06)
    lung *= soft(y - dome, 0.03)
    inside = LUNG + 0.04 + 0.09 * _texture(x.shape[0], rng) * np.clip(1.1 - np.hypot(x, y), 0, 1)
    large = any(finding.label == "cardiomegaly" for finding in findings)
    tilted = (x + 0.25 * y + 0.16) / (0.34 if large else 0.25)
    inside = blend(inside, TISSUE, soft(np.square(tilted) + np.square((y - 0.24) / 0.26) - 1, 0.4))
    for finding in findings:
        kind, zone = finding.label.split()[0], finding.label.split()[-1]
        height = {"upper": -0.42, "middle": 0.06, "lower": 0.34}.get(zone, 0.0)
        depth = {"upper": 0.05, "middle": -0.22, "lower": 0.28}.get(zone, 0.0)
        if kind == "consolidation":
            inside = blend(inside, FILLED, 0.6 * soft(np.hypot((x - depth) / 0.26, (y - height) / 0.20) - 0.8, 0.4))
        elif kind == "nodule":
            distance = np.hypot(x - depth, y - height) - 0.03 * finding.extent
            inside = blend(inside, NODULE, 0.6 * soft(distance - 0.10, 0.03))
        elif kind == "effusion":
            inside = blend(inside, FLUID, soft(0.50 - 0.4 * np.square(x) - y, 0.06) * soft(0.05 - x, 0.1))
    picture = blend(picture, inside, lung)
    spine = soft(np.abs(x - 0.50 - 0.10 * np.square(y)) - 0.09, 0.06) * (0.10 + 0.03 * np.sin(y * 30))
    picture += body * spine + 0.05 * lung * _stripes((y - 0.55 * x) * 5.2, 0.18)
    return picture


def soft(distance: Plane, edge: float) -> Plane:
    """Return one where the distance is negative, zero where positive, a ramp of width `edge` between."""
    ramp = distance * (-1 / edge)
    ramp += 0.5
    return np.clip(ramp, 0, 1, out=ramp)


def blend(under: Plane, over: Plane | float, share: Plane) -> Plane:
    """Blend two planes: `over` where the share is one, `under` where it is zero."""
    change = over - under
    change *= share
    change += under
    return change


def _stripes(phase: Plane, width: float) -> Plane:
    """Soft bands at whole numbers, `width` of the period wide on either side."""
    return soft(np.abs(phase - np.rint(phase)) - width, 0.12)


def _texture(size: int, rng: np.random.Generator) -> Plane:
    """Return the patient's vessel pattern, about -1 to 1."""
    picture = _textures(size)[rng.integers(TEXTURES)]
    picture = np.roll(picture, tuple(rng.integers(size, size=2)), axis=(0, 1))
    return picture[:, :: rng.choice((1, -1))]


@lru_cache(maxsize=2)
def _textures(size: int) -> tuple[Plane, ...]:
    """Ridges between smooth hills look like branching vessels; the pattern wraps around."""
    return tuple(_ridges(size, np.random.default_rng((5, number))) for number in range(TEXTURES))


def _ridges(size: int, rng: np.random.Generator) -> Plane:
    total = np.zeros((size, size), np.float32)
    for cells, weight in ((10, 0.6), (22, 0.4)):
        coarse = np.pad(rng.standard_normal((cells, cells), dtype=np.float32), 2, mode="wrap")
        side = round(size * (cells + 4) / cells)
        smooth = np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))
        start = (side - size) // 2
        smooth = smooth[start : start + size, start : start + size]
        total += weight * (1 - np.minimum(np.abs(smooth) * 2.5, 2))
    return total

"""Draws a chest radiograph: soft tissue, lungs, heart, ribs, and the findings, as 12-bit values.

    draw("PA", 256, [Finding("effusion left", "left", 0.5)], anatomy, exposure)       # (256, 256) uint16

Coordinates are those of the thorax: x from -1 to 1 with the patient's right at -1 (the viewer's left, as
radiographs are hung), y from -1 (neck) to 1 (abdomen). Brightness is how much the body absorbs, 0 to about 1.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

BITS = 12
Projection = Literal["PA", "L"]
PROJECTIONS: tuple[Projection, ...] = ("PA", "L")
Plane = npt.NDArray[np.float32]  # (size, size)

AIR, LUNG, TISSUE = 0.02, 0.20, 0.56  # brightness
TEXTURES = 8  # vessel patterns kept in memory; each patient gets a shifted, mirrored one


@dataclass(frozen=True)
class Finding:
    """What is found, on which side (of the patient), and how much of it: 0 the least that is drawn, 1 the most."""

    label: str
    side: Literal["left", "right"]
    extent: float


def draw(
    view: Projection, size: int, findings: list[Finding], anatomy: np.random.Generator, exposure: np.random.Generator
) -> npt.NDArray[np.uint16]:
    """Draw one view. `anatomy` belongs to the patient, `exposure` to this picture."""
    x, y = _place(size, exposure)
    picture = (_frontal if view == "PA" else _lateral)(x, y, findings, anatomy)
    picture = picture * np.float32(exposure.uniform(0.85, 1.15)) + np.float32(exposure.uniform(0.0, 0.06))
    picture += exposure.standard_normal((size, size), dtype=np.float32) * np.float32(exposure.uniform(0.008, 0.02))
    return np.asarray(np.clip(picture * 3000, 0, (1 << BITS) - 1), np.uint16)


def _place(size: int, rng: np.random.Generator) -> tuple[Plane, Plane]:
    """Coordinates of each pixel in the thorax: the patient stands a little off, turned, near or far."""
    scale, turn = 1 / rng.uniform(0.90, 1.04), rng.uniform(-0.05, 0.05)
    right, down = rng.uniform(-0.06, 0.06, size=2)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    u, v = line[None, :] - np.float32(right), line[:, None] - np.float32(down)
    cosine, sine = np.float32(np.cos(turn) * scale), np.float32(np.sin(turn) * scale)
    return u * cosine - v * sine, u * sine + v * cosine


def _frontal(x: Plane, y: Plane, findings: list[Finding], rng: np.random.Generator) -> Plane:
    by_label = {finding.label: finding for finding in findings}
    wide, tall = np.float32(rng.uniform(0.95, 1.05)), np.float32(rng.uniform(0.96, 1.04))
    x, y = x / wide, y / tall
    away = np.abs(x)

    body = soft(away - np.interp(y, [-1.0, -0.86, -0.66, -0.4, 1.0], [0.26, 0.30, 0.93, 0.86, 0.92]), 0.04)
    picture = AIR + body * (TISSUE + 0.05 * (1 - away))
    picture += body * 0.14 * soft(away - 0.075, 0.03) * (1 + 0.25 * np.sin(y * 34))  # spine

    base = {side: np.float32(rng.uniform(0.40, 0.47) + (0.03 if side == "left" else -0.03)) for side in ("left", "right")}
    texture = _texture(x.shape[0], rng)
    for side, sign in (("left", 1), ("right", -1)):
        picture = _lung(picture, x * sign, y, base[side], side, texture, by_label)

    picture += _bones(x, y, away, body)
    large = by_label.get("cardiomegaly")
    share = 0.62 + 0.08 * large.extent if large else rng.uniform(0.38, 0.46)  # cardiothoracic ratio
    return np.asarray(np.maximum(picture, _mediastinum(x, y, np.float32(share), rng)), np.float32)


def _lung(
    picture: Plane, out: Plane, y: Plane, base: np.float32, side: str, texture: Plane, findings: dict[str, Finding]
) -> Plane:
    """One lung and what is found in it; `out` is the distance from the midline toward this side."""
    along = np.sqrt(np.clip(1 - np.square((y - 0.30) / 1.10), 0, None)) * (y < 0.30) + (y >= 0.30)
    edge = out - (0.40 + 0.37 * along)  # negative inside, the chest wall at zero
    dome = base + 0.34 * np.square((out - 0.36) / 0.40)  # height of the diaphragm
    lung = soft(edge, 0.03) * soft((0.40 - 0.27 * along) - out, 0.03) * soft(y - dome, 0.03)
    inside = LUNG + 0.10 * texture * np.exp(-2.2 * np.hypot(out - 0.2, y + 0.05))

    air = findings.get("pneumothorax")
    if air and air.side == side:
        rim = (0.13 + 0.08 * air.extent) * (1 + 0.9 * np.clip(-y, 0, 1))  # wider at the apex
        inside = inside + 0.06 + (0.03 - inside - 0.06) * soft(-edge - rim, 0.015)
        inside = inside + 0.26 * soft(np.abs(edge + rim) - 0.012, 0.012)  # the pleural line
    for label, finding in findings.items():
        if finding.side == side:
            if label.startswith("consolidation"):
                inside = inside + (0.50 - inside) * _consolidation(label, out, y, finding.extent, texture)
            elif label.startswith("nodule"):
                inside = inside + 0.34 * _nodule(label, out, y, finding.extent, side)
            elif label.startswith("effusion"):
                level = base - 0.12 - 0.16 * finding.extent - 0.9 * np.square(np.clip(out - 0.30, 0, None)) + 0.02
                inside = inside + (TISSUE + 0.10 - inside) * soft(level - y, 0.03)
    return np.asarray(picture + (inside - picture) * lung, np.float32)


_LOBES = {  # centre and radii of the filled part: out, y
    "consolidation right upper": (0.42, -0.44, 0.34, 0.27),
    "consolidation right middle": (0.34, 0.06, 0.26, 0.17),
    "consolidation right lower": (0.54, 0.36, 0.26, 0.17),
    "consolidation left upper": (0.44, -0.36, 0.32, 0.30),
    "consolidation left lower": (0.60, 0.30, 0.22, 0.22),
}
_ZONES = {"nodule upper": -0.50, "nodule middle": -0.08, "nodule lower": 0.27}  # y of the centre


def _consolidation(label: str, out: Plane, y: Plane, extent: float, texture: Plane) -> Plane:
    """A filled lobe: patchy inside, with soft edges."""
    across, down, width, height = _LOBES[label]
    grow = 0.9 + 0.2 * extent
    distance = np.hypot((out - across) / (width * grow), (y - down) / (height * grow))
    return np.asarray(soft(distance - 0.85, 0.35) * (0.88 + 0.12 * texture), np.float32)


def _nodule(label: str, out: Plane, y: Plane, extent: float, side: str) -> Plane:
    """A round shadow with a sharp edge."""
    radius = 0.115 + 0.035 * extent
    across = 0.40 + 0.16 * ((extent * 7.3) % 1)
    if side == "left" and label == "nodule lower":
        across = 0.60  # beside the heart
    return soft(np.hypot(out - across, y - _ZONES[label]) - radius, 0.025)


def _bones(x: Plane, y: Plane, away: Plane, body: Plane) -> Plane:
    """Ribs (the back parts bright, the front parts faint) and clavicles."""
    cage = body * soft(away - 0.80, 0.06) * soft(np.float32(0.10) - away, 0.04) * soft(np.abs(y + 0.05) - 0.72, 0.15)
    back = (y - 0.30 * away + 0.35 * np.square(away)) / 0.155
    front = (y + 0.55 * away - 0.25) / 0.155
    bands = 0.075 * _stripes(back, 0.20) + 0.030 * _stripes(front, 0.22)
    bone = soft(np.abs(y + 0.62 + 0.16 * away - 0.10 * np.sin(away * 4)) - 0.025, 0.02) * soft(np.abs(away - 0.40) - 0.33, 0.04)
    return np.asarray(cage * bands + 0.12 * body * bone, np.float32)


def _mediastinum(x: Plane, y: Plane, share: np.float32, rng: np.random.Generator) -> Plane:
    """Heart, great vessels and hila; `share` is the heart's part of the inner thorax's width."""
    width = share * 0.77  # half the heart's width; the inner thorax is 1.54 wide
    centre = 0.36 * width + 0.03
    tilt = 0.30
    across, down = x - centre, y - np.float32(0.27)
    main, cross = across + tilt * down, down - tilt * across
    heart = soft(np.hypot(main / width, cross / (0.30 + 0.12 * share)) - 1, 0.10)
    vessels = soft(np.abs(x - 0.02) - (0.13 + 0.03 * np.square(y)), 0.04) * soft(-0.95 - y, 0.05)
    knob = soft(np.hypot(x - 0.13, y + 0.34) - 0.10, 0.05)
    hila = 0.42 * soft(np.hypot((np.abs(x) - 0.20) / 0.09, (y + 0.06) / 0.14) - 1, 0.6)
    return np.asarray(np.maximum((TISSUE + 0.08) * np.maximum(np.maximum(heart, vessels), knob), hila), np.float32)


def _lateral(x: Plane, y: Plane, findings: list[Finding], rng: np.random.Generator) -> Plane:
    """The side view, spine to the viewer's right; findings are fainter here."""
    body = soft(np.abs(x) - np.interp(y, [-1.0, -0.8, -0.5, 1.0], [0.34, 0.42, 0.74, 0.80]), 0.05)
    picture = AIR + body * (TISSUE + 0.08)
    dome = 0.46 + 0.28 * np.clip(x + 0.25, 0, None) + 0.10 * np.clip(-x - 0.25, 0, None)
    lung = soft(np.hypot((x + 0.02) / 0.60, (y - 0.10) / 0.92) - 1, 0.06) * soft(y - dome, 0.03)
    texture = _texture(x.shape[0], rng)
    inside = LUNG + 0.08 + 0.08 * texture * np.exp(-2.5 * np.hypot(x, y))
    large = any(finding.label == "cardiomegaly" for finding in findings)
    heart = soft(np.hypot((x + 0.22 + 0.25 * (y - 0.25)) / (0.34 if large else 0.25), (y - 0.24) / 0.26) - 1, 0.15)
    inside = inside + 0.22 * heart
    for finding in findings:
        kind, zone = finding.label.split()[0], finding.label.split()[-1]
        height = {"upper": -0.42, "middle": 0.06, "lower": 0.34}.get(zone, 0.0)
        depth = {"upper": 0.05, "middle": -0.22, "lower": 0.28}.get(zone, 0.0)
        if kind == "consolidation":
            inside = inside + 0.20 * soft(np.hypot((x - depth) / 0.26, (y - height) / 0.20) - 0.8, 0.4)
        elif kind == "nodule":
            inside = inside + 0.22 * soft(np.hypot(x - depth, y - height) - 0.10 - 0.03 * finding.extent, 0.03)
        elif kind == "effusion":
            inside = inside + 0.24 * soft(0.48 - 0.25 * np.clip(x, 0, None) - y, 0.06) * soft(np.float32(0.05) - x, 0.1)
    spine = soft(np.abs(x - 0.50 - 0.10 * np.square(y)) - 0.09, 0.05) * (1 + 0.3 * np.sin(y * 30))
    ribs = 0.05 * _stripes((y - 0.55 * x) / 0.19, 0.18)
    return np.asarray(picture + (inside - picture) * lung + body * (0.14 * spine + ribs * lung), np.float32)


def soft(distance: npt.ArrayLike, edge: float) -> Plane:
    """One where the distance is negative, zero where positive, a ramp of width `edge` between."""
    return np.clip(np.float32(0.5) - np.asarray(distance, np.float32) / np.float32(edge), 0, 1)


def _stripes(phase: Plane, width: float) -> Plane:
    """Soft bands at whole numbers, `width` of the period wide on either side."""
    return soft(np.abs(phase - np.rint(phase)) - width, 0.12)


def _texture(size: int, rng: np.random.Generator) -> Plane:
    """The patient's vessel pattern, about -1 to 1."""
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
        total += np.float32(weight) * (1 - np.minimum(np.abs(smooth) * 2.5, 2))
    return total

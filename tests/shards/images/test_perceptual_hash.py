"""The same picture keeps its fingerprint, another patient's has another one."""

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from shards.datasets import phantom
from shards.images.perceptual_hash import BLANK, LIMIT, fingerprint, near
from shards.images.windowing import apply_window

pytestmark = pytest.mark.timeout(60)


def picture(number: int, size: int = 256, view: str = "PA") -> np.ndarray:
    return apply_window(phantom.Picture(3, number, view, size)().pixels)[0]  # type: ignore[arg-type]


def rows(pictures: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.frombuffer(fingerprint(one), np.uint8) for one in pictures])


def jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def resized(pixels: np.ndarray, factor: float) -> np.ndarray:
    side = round(len(pixels) * factor)
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def toned(pixels: np.ndarray, curve: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.rint(255 * np.clip(curve(np.arange(256) / 255), 0, 1)).astype(np.uint8)[pixels]


def labelled(pixels: np.ndarray) -> np.ndarray:
    written = pixels.copy()
    written[8:24, -40:-4] = 255
    return written


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quality 50": lambda p: jpeg(p, 50),
    "quality 95": lambda p: jpeg(p, 95),
    "a quarter": lambda p: resized(p, 0.25),
    "twice": lambda p: resized(p, 2),
    "brighter": lambda p: toned(p, lambda x: x * 1.1 + 0.04),
    "darker": lambda p: toned(p, lambda x: x * 0.85 - 0.03),
    "gamma 0.8": lambda p: toned(p, lambda x: x**0.8),
    "gamma 1.25": lambda p: toned(p, lambda x: x**1.25),
    "window": lambda p: toned(p, lambda x: (x - 0.03) / 0.92),
    "label": labelled,
    "colour": lambda p: np.dstack([p, p, p]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_near_itself_alone(change: str) -> None:
    pictures = [picture(number) for number in range(0, 60, 6)]  # each of another patient
    changed = [CHANGES[change](one) for one in pictures]
    assert any(not np.array_equal(a, b) for a, b in zip(pictures, changed, strict=True))
    assert near(rows(pictures), rows(changed)).tolist() == [[n, n] for n in range(10)]


def test_a_picture_that_was_cut_is_nearest_to_itself() -> None:
    pictures = [picture(number, 512) for number in range(0, 60, 6)]
    little = near(rows(pictures), rows([one[2:-2, 2:-2] for one in pictures])).tolist()
    assert little == [[n, n] for n in range(10)]
    cut = rows([one[5:-5, 5:-5] for one in pictures])  # by a hundredth
    differ = np.bitwise_count(rows(pictures)[:, None] ^ cut[None]).sum(axis=2, dtype=int)
    assert differ.argmin(axis=1).tolist() == list(range(10))
    assert differ.diagonal().max() < 2 * LIMIT


@pytest.mark.parametrize("size", [128, 256])
def test_pictures_of_different_patients_are_not_near(size: int) -> None:
    options = phantom.OPTIONS(seed=3)
    patients = [phantom.study(number, options).patient for number in range(150)]
    for view in ("PA", "L"):
        prints = rows([picture(number, size, view) for number in range(150)])
        pairs = near(prints, prints)
        assert [pair for pair in pairs.tolist() if patients[pair[0]] != patients[pair[1]]] == []
        assert len(pairs) >= 150  # each with itself


@pytest.mark.parametrize("value", [0, 100, 255])
def test_a_picture_without_structure_is_near_nothing(value: int) -> None:
    flat = np.full((300, 200), value, np.uint8)
    noisy = flat.copy()
    noisy[::7, ::5] ^= 1
    dot = flat.copy()
    dot[140:150, 90:100] ^= 255
    for blank in (flat, noisy, dot, np.dstack([flat] * 3)):
        assert fingerprint(blank) == BLANK
    assert len(near(rows([flat, noisy]), rows([flat, dot, picture(0)]), 256)) == 0


def test_a_fingerprint_is_the_same_on_every_machine() -> None:
    y, x = np.mgrid[:700, :500]
    drawn = ((x * x + 3 * y * y + x * y) // 1000 % 256).astype(np.uint8)
    assert fingerprint(drawn).hex() == "fefdfbe7cf3ef9f3ce3df38e39e71cf3fffcff87c1ffffc307f8f07efc1ffe0f"


def test_near_finds_what_a_plain_loop_finds() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 256, (70, 32), np.uint8), rng.integers(0, 256, (900, 32), np.uint8)
    for n in range(0, 900, 9):  # near copies, some of them just beyond the limit
        bits = np.unpackbits(ours[n % 70])
        bits[rng.choice(256, LIMIT + n // 9 % 3 - 1, replace=False)] ^= 1
        theirs[n] = np.packbits(bits)
    theirs[5], ours[3] = 0, 0
    expected = [
        [i, j]
        for i in range(70)
        for j in range(900)
        if np.unpackbits(ours[i] ^ theirs[j]).sum() <= LIMIT and ours[i].any() and theirs[j].any()
    ]
    assert len(expected) > 60
    assert near(ours, theirs).tolist() == expected
    many = np.tile(theirs, (80, 1))  # more than one chunk
    assert len(near(ours, many)) == 80 * len(expected)
    assert near(ours[:0], theirs).shape == near(ours, theirs[:0]).shape == (0, 2)


def test_bits_that_all_differ_are_far() -> None:
    bits = np.full((1, 32), 0xAA, np.uint8)
    assert len(near(bits, ~bits)) == 0

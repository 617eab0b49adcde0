"""Windows map raw values to eight bits: by lookup table as by arithmetic."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from shards.images.windowing import apply_window

pytestmark = pytest.mark.timeout(60)


def test_constant_images_do_not_divide_by_zero() -> None:
    for value in (0, 700, 65535):
        shown, window = apply_window(np.full((20, 20), value, np.uint16))
        assert shown.max() == 0
        assert window == (value, value)
    nearly = np.full((100, 100), 700, np.uint16)
    nearly[50, 50] = 900  # less than half a percent: the percentiles coincide
    assert apply_window(nearly)[1] == (700, 900)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(
        st.sampled_from([np.uint16, np.int16, np.int32]),
        st.tuples(st.integers(1, 12), st.integers(1, 12)),
        elements=st.integers(-3000, 30000).map(abs),
    )
)
def test_the_table_gives_what_arithmetic_gives(pixels: np.ndarray) -> None:
    shown, window = apply_window(pixels)
    slow, same = apply_window(pixels.astype(np.float64))
    assert window == same
    assert np.array_equal(shown, slow)
    order = np.argsort(pixels, axis=None)
    assert (np.diff(shown.ravel()[order].astype(int)) >= 0).all()
    expected = np.percentile(pixels, (0.5, 99.5), method="inverted_cdf")
    assert window == (tuple(expected) if expected[0] != expected[1] else (pixels.min(), pixels.max()))


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.int16, (5, 7), elements=st.integers(-32768, 32767)),
    st.floats(-1e5, 1e5),
    st.floats(-1e5, 1e5),
)
def test_a_window_upside_down_inverts(pixels: np.ndarray, black: float, white: float) -> None:
    shown, window = apply_window(pixels, (black, white))
    assert window == (black, white)
    inverted, _ = apply_window(pixels, (white, black))
    if black != white:
        assert np.abs(shown.astype(int) + inverted - 255).max() <= 1

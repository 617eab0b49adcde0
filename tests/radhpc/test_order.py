"""The order: a permutation per epoch, computed for any position, the same for every topology."""

import numpy as np
from hypothesis import given, settings, strategies as st

from radhpc.order import epoch_key, permute, samples_at


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_permutation_maps_one_to_one(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 10**12), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(deadline=None)
def test_a_position_needs_no_other(n: int, key: int, data: st.DataObject) -> None:
    positions = np.asarray(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(positions, n, key)
    assert [int(permute(np.asarray([p]), n, key)[0]) for p in positions] == together.tolist()
    assert together.min() >= 0
    assert together.max() < n


@given(n=st.integers(1, 200), start=st.integers(0, 500), count=st.integers(0, 500), cuts=st.lists(st.integers(0, 500)))
@settings(deadline=None)
def test_any_cutting_gives_the_same_row(n: int, start: int, count: int, cuts: list[int]) -> None:
    """Interrupted anywhere and gone on, however often: the same samples in the same order."""
    whole = samples_at(start, count, n, seed=1, stage=0).tolist()
    edges = sorted({0, count, *(cut for cut in cuts if cut <= count)})
    pieces = [samples_at(start + a, b - a, n, seed=1, stage=0).tolist() for a, b in zip(edges, edges[1:], strict=False)]
    assert [sample for piece in pieces for sample in piece] == whole


def test_each_epoch_is_complete_and_differs() -> None:
    epochs = samples_at(0, 300, 100, seed=0, stage=0).reshape(3, 100)
    for epoch in epochs:
        assert sorted(epoch) == list(range(100))
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], samples_at(0, 100, 100, seed=1, stage=0))
    assert not np.array_equal(epochs[0], samples_at(0, 100, 100, seed=0, stage=1))


def test_neighbours_are_far_apart() -> None:
    """A shuffle worth its name: the mean distance of neighbours is that of a random permutation, n / 3."""
    n = 10_000
    row = permute(np.arange(n), n, epoch_key(0, 0, 0))
    assert abs(np.abs(np.diff(row)).mean() / (n / 3) - 1) < 0.05

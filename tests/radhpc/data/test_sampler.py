"""The order: computed for any position, each sample once an epoch, mixed over a window, in fair shares of datasets."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from radhpc.data.sampler import PERIOD, Sampler, permute, schedule

COUNTS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
WINDOW = st.none() | st.integers(1, 12)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(deadline=None)
def test_a_permutation_maps_one_to_one(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 10**12), key=st.integers(0, 2**64 - 1), data=st.data())
@settings(deadline=None)
def test_a_permuted_position_needs_no_other(n: int, key: int, data: st.DataObject) -> None:
    positions = np.asarray(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    together = permute(positions, n, key)
    assert [int(permute(np.asarray([p]), n, key)[0]) for p in positions] == together.tolist()
    assert together.min() >= 0
    assert together.max() < n


def test_permutations_of_several_sizes_at_once_are_those_of_each() -> None:
    sizes = np.asarray([1, 2, 5, 64, 65, 1000])
    positions, n = np.concatenate([np.arange(size) for size in sizes]), np.repeat(sizes, sizes)
    keys = n.astype(np.uint64) * np.uint64(7)
    each = [permute(np.arange(size), int(size), int(size) * 7) for size in sizes]
    assert np.array_equal(permute(positions, n, keys), np.concatenate(each))


@given(counts=COUNTS, window=WINDOW, epochs=st.integers(1, 4))
@settings(deadline=None)
def test_each_sample_once_an_epoch(counts: list[int], window: int | None, epochs: int) -> None:
    order = Sampler([counts], "key", window, None)
    n = len(order)
    drawn = order.at(np.arange(epochs * n))
    for epoch in range(epochs):
        assert sorted(drawn.sample[drawn.epoch == epoch]) == list(range(n))


@given(
    counts=st.lists(COUNTS, min_size=1, max_size=4),
    window=WINDOW,
    weights=st.lists(st.floats(0.05, 20), min_size=4, max_size=4),
    start=st.integers(0, 10**7),
    length=st.integers(1, 400),
    cuts=st.lists(st.integers(0, 400)),
)
@settings(deadline=None, max_examples=60)
def test_any_cutting_gives_the_same_row(
    counts: list[list[int]], window: int | None, weights: list[float], start: int, length: int, cuts: list[int]
) -> None:
    """Interrupted anywhere and gone on, however often, from a state that is one number."""

    def order() -> Sampler:  # a new life remembers nothing
        return Sampler(counts, "key", window, weights[: len(counts)] if len(counts) > 1 else None)

    whole = order().at(np.arange(start, start + length))
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    pieces = [order().at(np.arange(start + a, start + b)) for a, b in zip(edges, edges[1:], strict=False)]
    for name in ("dataset", "epoch", "sample"):
        assert np.concatenate([getattr(piece, name) for piece in pieces]).tolist() == getattr(whole, name).tolist()
    backwards = order().at(np.arange(start, start + length)[::-1])
    assert backwards.sample[::-1].tolist() == whole.sample.tolist()


@given(weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
@settings(deadline=None, max_examples=15)
def test_a_schedule_is_less_than_one_draw_away_from_its_shares(weights: list[float]) -> None:
    row = schedule(tuple(weights))
    counts = np.bincount(row, minlength=len(weights))
    shares = np.asarray(weights) / sum(weights)
    assert counts.min() >= 1
    assert np.abs(counts - shares * PERIOD).max() <= 1 + (shares * PERIOD < 1).sum()
    drawn = np.cumsum(row[:, None] == np.arange(len(weights)), axis=0)
    assert np.abs(drawn - np.arange(1, PERIOD + 1)[:, None] * counts / PERIOD).max() < 1


@given(
    counts=st.lists(COUNTS, min_size=2, max_size=4),
    window=WINDOW,
    weights=st.lists(st.floats(0.2, 5), min_size=4, max_size=4),
)
@settings(deadline=None, max_examples=30)
def test_each_dataset_of_a_mixture_goes_through_epochs_of_its_own(
    counts: list[list[int]], window: int | None, weights: list[float]
) -> None:
    order = Sampler(counts, "key", window, weights[: len(counts)])
    drawn = order.at(np.arange(600))
    first = 0
    for n, shards in enumerate(counts):
        samples, epochs = drawn.sample[drawn.dataset == n], drawn.epoch[drawn.dataset == n]
        assert (np.diff(epochs) >= 0).all()
        for epoch in range(int(epochs[-1])):  # all but the last are complete
            assert sorted(samples[epochs == epoch]) == list(range(first, first + sum(shards)))
        first += sum(shards)


def test_epochs_seeds_and_stages_differ() -> None:
    def samples(key: str, epoch: int, window: int | None) -> list[int]:
        return Sampler([[10] * 10], key, window, None).at(np.arange(100) + 100 * epoch).sample.tolist()

    for window in (None, 3, 10):
        rows = [samples("0/0/hash", 0, window), samples("0/0/hash", 1, window), samples("1/0/hash", 0, window)]
        rows += [samples("0/1/hash", 0, window), samples("0/0/other", 0, window)]
        assert len(set(map(tuple, rows))) == len(rows)


def test_a_block_takes_one_run_of_each_shard_of_the_window() -> None:
    """What an object store is read by: a block is as large as a shard and holds `window` runs of neighbours."""
    shards, samples, window = 50, 64, 8
    order = Sampler([[samples] * shards], "key", window, None)
    row = order.at(np.arange(shards * samples)).sample
    open_shards = []
    for block in row.reshape(shards, samples):
        by_shard = {int(shard): np.sort(block[block // samples == shard] % samples) for shard in set(block // samples)}
        assert len(by_shard) == window
        for rows in by_shard.values():
            assert len(rows) == samples // window
            assert (np.diff(rows) % samples == 1).sum() >= len(rows) - 2  # a run may pass the shard's end
        open_shards.append(set(by_shard))
    for before, after in zip(open_shards, open_shards[1:], strict=False):
        assert len(after - before) == 1  # one shard enters, one leaves


def test_a_full_shuffle_puts_neighbours_far_apart() -> None:
    """The mean distance of neighbours is that of a random permutation, n / 3."""
    n = 10_000
    row = Sampler([[100] * 100], "key", None, None).at(np.arange(n)).sample
    assert abs(np.abs(np.diff(row)).mean() / (n / 3) - 1) < 0.05


@pytest.mark.parametrize("window", [None, 64])
def test_a_billion_samples_take_little_memory(window: int | None) -> None:
    counts = np.full(1_000_000, 1000)
    tracemalloc.start()
    order = Sampler([counts], "key", window, None)
    drawn = order.at(np.asarray([0, 10**9 - 1, 10**9, 7 * 10**9 + 5]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert drawn.epoch.tolist() == [0, 0, 1, 7]
    assert peak < 100e6

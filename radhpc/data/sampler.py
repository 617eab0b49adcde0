"""Order the samples: a pure function of (seed, stage, epoch, manifests, weights), computed for any position.

    order = Sampler([[1000, 1000, 400]], key="seed 0, stage 0")     # one dataset in three shards
    order.at(np.arange(64)).sample                                 # the samples of the first batch
    order.at(np.asarray([10**9]))                                  # of a position far away: as fast

Nothing is replayed and nothing is saved but the position. Three parts make it up:

1. A keyed pseudo-random permutation of 0..n-1 (`permute`): a balanced Feistel network on the next even power of two,
   with cycle walking for what falls outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
2. A window of shards (`_DatasetPermutation`), so that an object store is read in long runs. In every epoch the shards
   are permuted, and each is dealt in `window` runs of neighbouring samples over as many blocks that follow each
   other: a block holds one run of each of `window` shards, and is permuted as a whole. From block to block one shard
   enters and one leaves, so a block is about as large as a shard, whatever the window. No window: one block, a full
   shuffle.
3. A schedule over datasets with weights (`schedule`): a fixed row of PERIOD draws in which every dataset is, at every
   length, less than one draw away from its share. Each dataset goes through its own epochs.
"""

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

PERIOD = 1 << 14  # draws after which the schedule of a mixture repeats: weights are kept to 1 / PERIOD
_ROUNDS = 6
_EPOCHS = 2  # of a dataset, whose tables are kept
_PIECE = 1 << 16  # positions that are permuted at a time

Positions = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def number(*parts: object) -> int:
    """Return 64 bits that differ between any two sequences of parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def permute(positions: Positions, n: int | Positions, key: int | Words) -> Positions:
    """Map positions to 0..n-1, one to one for each n and key, which are one for all or one for each position."""
    sizes = np.broadcast_to(np.asarray(n, np.int64), positions.shape)
    assert positions.size == 0 or (positions.min() >= 0 and (positions < sizes).all())
    keys = np.broadcast_to(np.asarray(key, np.uint64), positions.shape)
    unique, which = np.unique(sizes, return_inverse=True) if np.ndim(n) else (np.asarray([n]), np.zeros(1, np.int64))
    bits = np.asarray([_half_bits(int(size)) for size in unique], np.uint64)[which]
    half = np.broadcast_to(bits.reshape(positions.shape) if np.ndim(n) else bits, positions.shape)
    values = _feistel(positions.astype(np.uint64), half, keys)
    limits = sizes.astype(np.uint64)
    while (outside := np.flatnonzero(values >= limits)).size:  # a walk along a cycle comes back inside
        values[outside] = _feistel(values[outside], half[outside], keys[outside])
    return values.astype(np.int64)


def _half_bits(n: int) -> int:
    """Return the bits of each side of the network, for the smallest even power of two that holds n values."""
    assert n > 0
    return max(1, ((n - 1).bit_length() + 1) // 2)


def _feistel(values: Words, half: Words, keys: Words) -> Words:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_ in range(_ROUNDS):
        word = keys + np.uint64(round_ * 0x9E3779B97F4A7C15 & (2**64 - 1))
        left, right = right, left ^ (_mix(right + word) & mask)
    return np.asarray((left << half) | right)


def _mix(values: Words) -> Words:
    """Apply the finalizer of splitmix64 (Steele et al., 2014): each input bit changes each output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))


@dataclass(frozen=True)
class _Epoch:
    """The tables of one epoch of one dataset: 12 bytes for each shard."""

    key: int
    shards: npt.NDArray[np.int32]  # (shards,) the shard at each place
    ends: Positions  # (blocks,) end of each block (exclusive)


class _DatasetPermutation:
    """The order of one dataset, epoch after epoch."""

    def __init__(self, counts: Sequence[int] | Positions, key: str, window: int | None) -> None:
        counts = np.asarray(counts, np.int64)
        assert counts.size
        assert counts.min() > 0
        self.size = int(counts.sum())
        self._key = key
        self._counts = counts if window is not None else np.asarray([self.size], np.int64)
        self._first = np.cumsum(self._counts) - self._counts  # (shards,) number of each shard's first sample
        self._window = min(window or 1, len(self._counts))
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()

    def at(self, draws: Positions) -> tuple[Positions, Positions]:
        """Return (epoch, sample) of each draw from an endless sequence of epochs."""
        epochs, samples = draws // self.size, np.empty_like(draws)
        for epoch in np.unique(epochs):
            rows = np.flatnonzero(epochs == epoch)
            samples[rows] = self._samples(draws[rows] - epoch * self.size, self._epoch(int(epoch)))
        return epochs, samples

    def _samples(self, positions: Positions, epoch: _Epoch) -> Positions:
        width = self._window
        blocks, which = np.unique(np.searchsorted(epoch.ends, positions, "right"), return_inverse=True)
        starts = np.where(blocks > 0, epoch.ends[blocks - 1], 0)
        inside = permute(
            positions - starts[which],
            (epoch.ends[blocks] - starts)[which],
            _mix(blocks.astype(np.uint64) + np.uint64(epoch.key))[which],
        )
        # Block b holds run j of the shard at place b - j. `edges` are the ends of the runs of all these blocks, one
        # behind the other, as if nothing had been permuted.
        runs = np.arange(width)
        shards = epoch.shards[(blocks[:, None] - runs) % len(epoch.shards)]
        low = runs * self._counts[shards] // width
        lengths = (runs + 1) * self._counts[shards] // width - low
        edges = np.cumsum(lengths.ravel())
        offsets = np.cumsum(epoch.ends[blocks] - starts) - (epoch.ends[blocks] - starts)
        flat = offsets[which] + inside
        run = np.searchsorted(edges, flat, "right")
        shard = shards.ravel()[run]
        row = low.ravel()[run] + flat - (edges - lengths.ravel())[run]
        # Runs start elsewhere in every epoch, or the same samples would meet again and again.
        turned = _mix(shard.astype(np.uint64) ^ np.uint64(epoch.key)) % self._counts[shard].astype(np.uint64)
        return np.asarray(self._first[shard] + (row + turned.astype(np.int64)) % self._counts[shard])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            key = number(self._key, epoch)
            places, width = len(self._counts), self._window
            shards = np.empty(places, np.int32)
            for first in range(0, places, _PIECE):  # in pieces, whose intermediate values stay in the processor's cache
                piece = np.arange(first, min(places, first + _PIECE))
                shards[piece] = permute(piece, places, key)
            held, sizes = self._counts[shards], np.zeros(places, np.int64)
            for run in range(width):
                sizes += np.roll((run + 1) * held // width - run * held // width, run)
            while len(self._epochs) >= _EPOCHS:
                self._epochs.popitem(last=False)
            self._epochs[epoch] = _Epoch(key, shards, np.cumsum(sizes))
        return self._epochs[epoch]


@functools.lru_cache(8)
def schedule(weights: tuple[float, ...], period: int = PERIOD) -> npt.NDArray[np.int32]:
    """Return the dataset of each of `period` draws: (period,).

    After every draw the number of draws of each dataset differs from its share by less than one: Tijdeman's solution of
    the chairman assignment problem (Discrete Mathematics 32, 1980). Shares are rounded to whole draws of the period,
    none below one.
    """
    relative = np.asarray(weights, np.float64)
    assert len(relative) <= period
    assert (relative > 0).all()
    shares = relative / relative.sum() * period
    counts = np.maximum(1, np.floor(shares).astype(np.int64))
    while (rest := period - int(counts.sum())) != 0:  # by the largest remainder
        counts[int(np.argmax(shares - counts) if rest > 0 else np.argmin(shares - counts + 2 * (counts == 1)))] += (
            1 if rest > 0 else -1
        )
    if len(relative) == 1:
        return np.zeros(period, np.int32)
    # In whole numbers: what is due to a dataset at draw t is t * count / period. It may be drawn once it is owed at
    # least 1 / (2k - 2), and the one whose debt would first grow too large comes first.
    slack = 2 * len(relative) - 2
    drawn = np.zeros(len(relative), np.int64)
    result = np.empty(period, np.int32)
    for t in range(period):
        owed = (t + 1) * counts - drawn * period  # in 1 / period draws
        deadline = np.where(owed * slack >= period, ((slack - 1) * period / slack - owed) / counts, np.inf)
        result[t] = np.argmin(deadline)
        drawn[result[t]] += 1
    assert (drawn == counts).all()
    return result


@dataclass(frozen=True)
class Draws:
    """The samples at some positions; all of shape (positions,)."""

    dataset: Positions
    epoch: Positions  # of that dataset, from 0
    sample: Positions  # numbered over all datasets, one behind the other


class Sampler:
    """The samples of one stage, in their order, without an end.

    shards: the number of samples of each shard, dataset by dataset. weights: how often each dataset is drawn; None
    for a single dataset. key: everything else that the order depends on. window: shards that are mixed at a time;
    None: all samples of a dataset.
    """

    def __init__(
        self, shards: Sequence[Sequence[int] | Positions], key: str, window: int | None, weights: Sequence[float] | None
    ) -> None:
        assert len(shards) == (1 if weights is None else len(weights))
        self.datasets = [_DatasetPermutation(counts, f"{key}/{n}", window) for n, counts in enumerate(shards)]
        self.sizes = [dataset.size for dataset in self.datasets]
        self._first = np.cumsum([0, *self.sizes])
        if weights is not None:
            self._schedule = schedule(tuple(weights))
            drawn = self._schedule[:, None] == np.arange(len(shards), dtype=np.int32)
            self._before = np.cumsum(drawn, axis=0, dtype=np.int32) - drawn  # (PERIOD, datasets) earlier in the period
            self._counts = drawn.sum(axis=0)

    def __len__(self) -> int:
        return int(self._first[-1])

    def at(self, positions: Positions) -> Draws:
        """Return the samples at positions 0, 1, ... of the stage; any positions, in any order."""
        if len(self.datasets) == 1:
            epochs, samples = self.datasets[0].at(positions)
            return Draws(np.zeros_like(positions), epochs, samples)
        periods, place = np.divmod(positions, PERIOD)
        dataset = self._schedule[place].astype(np.int64)
        draws = periods * self._counts[dataset] + self._before[place, dataset]
        epochs, samples = np.empty_like(positions), np.empty_like(positions)
        for n, one in enumerate(self.datasets):
            rows = np.flatnonzero(dataset == n)
            epochs[rows], inside = one.at(draws[rows])
            samples[rows] = self._first[n] + inside
        return Draws(dataset, epochs, samples)

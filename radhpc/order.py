"""The order of samples: a pure function of (seed, stage, epoch), computed for any position, never replayed.

A keyed pseudo-random permutation of 0..n-1: a balanced Feistel network on the next even power of two, with
cycle walking for values that fall outside (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
No memory, no state: position p of epoch e is some arithmetic away. Example:

    permute(np.arange(10), n=10, key=epoch_key(seed=0, stage=0, epoch=3))
"""

import hashlib

import numpy as np
import numpy.typing as npt

_ROUNDS = 6

Positions = npt.NDArray[np.int64]


def epoch_key(seed: int, stage: int, epoch: int) -> int:
    """64 bits that differ between any two (seed, stage, epoch)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{stage}/{epoch}".encode(), digest_size=8).digest(), "little")


def permute(positions: Positions, n: int, key: int) -> Positions:
    """Map positions (any shape, each in 0..n-1) to samples 0..n-1, one to one."""
    assert n > 0
    assert positions.size == 0 or (positions.min() >= 0 and positions.max() < n)
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of each side
    values = _feistel(positions.astype(np.uint64), half, key)
    while (outside := values >= np.uint64(n)).any():  # a walk along a cycle comes back inside
        values[outside] = _feistel(values[outside], half, key)
    return values.astype(np.int64)


def _feistel(values: npt.NDArray[np.uint64], half: np.uint64, key: int) -> npt.NDArray[np.uint64]:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_ in range(_ROUNDS):
        left, right = right, left ^ (_mix(right + np.uint64((key + round_ * 0x9E3779B97F4A7C15) & (2**64 - 1))) & mask)
    return (left << half) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele et al., 2014): each input bit changes each output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def samples_at(start: int, count: int, n: int, seed: int, stage: int) -> Positions:
    """The samples at `count` positions from `start` of an endless row of epochs, each a permutation of n.

    Shape (count,). A range may cross the boundary of two epochs; each of them stays complete.
    """
    positions = np.arange(start, start + count, dtype=np.int64)
    result = np.empty_like(positions)
    for epoch in np.unique(positions // n):
        here = positions // n == epoch
        result[here] = permute(positions[here] % n, n, epoch_key(seed, stage, int(epoch)))
    return result

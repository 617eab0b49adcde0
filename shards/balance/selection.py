"""Selection: which studies of each cluster stay, always the same ones for a seed.

kept = select(keys, cluster, always, cap=20, seed=0)        # (n,) bool
"""

import hashlib

import numpy as np
import numpy.typing as npt

from shards.balance.studies import Ints

NOISE = -1  # the cluster of points that are like no other


def select(
    keys: npt.NDArray[np.bytes_], cluster: Ints, always: npt.NDArray[np.bool_], cap: int, seed: int
) -> npt.NDArray[np.bool_]:
    """Return (n,) bool: all noise, all of `always`, and up to `cap` studies of each cluster, `always` first."""
    draw = np.array([_draw(seed, key) for key in keys.tolist()])
    order = np.lexsort((draw, ~always, cluster))
    starts = np.flatnonzero(np.diff(cluster[order], prepend=cluster[order][0] - 1))
    position = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    kept = np.empty(len(keys), bool)
    kept[order] = position < cap
    return np.asarray(kept | always | (cluster == NOISE), bool)


def sample_positions(positions: Ints, count: int, seed: int) -> Ints:
    """Return `count` of the positions, ascending: a pure function of the seed."""
    if len(positions) <= count:
        return positions
    draw = np.array([_draw(seed, b"%d" % position) for position in positions.tolist()])
    return np.sort(positions[np.argsort(draw, kind="stable")[:count]])


def points_to_draw(weight: Ints, count: int, seed: int) -> Ints:
    """Return `count` points for the picture: a third have the most studies, as few points may hold half of them."""
    heaviest = np.argsort(-weight, kind="stable")
    others = sample_positions(np.sort(heaviest[count // 3 :]), count - count // 3, seed)
    return np.sort(np.concatenate([heaviest[: count // 3], others]))


def _draw(seed: int, key: bytes) -> np.uint64:
    """Return a pseudo-random number for a key."""
    return np.uint64(int.from_bytes(hashlib.blake2b(b"%d/%b" % (seed, key), digest_size=8).digest(), "big"))

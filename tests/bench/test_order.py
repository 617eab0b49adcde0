"""The measurement of the order: its judgements of known shuffles, its simulated requests, and the object it prints."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bench import order as measured
from radhpc.core.recipe import StreamSettings
from radhpc.data.sampler import Sampler
from radhpc.data.stream import BatchPlan
from radhpc.storage.node_cache import BLOCK
from tests.conftest import ROOT

RECIPE = StreamSettings.model_validate({"window": 4, "prefetch_megabytes": 16})


def test_an_archive_in_its_own_order_is_no_shuffle() -> None:
    n = 40 * measured.HELD
    sorted_, full = measured.quality(np.arange(n)), measured.quality(np.random.default_rng(1).permutation(n))
    assert sorted_.neighbours == pytest.approx(1 / n)
    assert sorted_.spread == pytest.approx(np.sqrt(measured.BATCH), rel=0.05)  # as one sample of a full shuffle
    assert sorted_.together == pytest.approx(1.0)  # 256 is a multiple of 4
    assert sorted_.shards < 2
    assert full.neighbours == pytest.approx(1 / 3, rel=0.02)
    assert full.spread == pytest.approx(1.0, abs=0.2)
    assert full.together == pytest.approx((measured.BATCH - 1) / (n - 1), rel=0.15)


@pytest.mark.parametrize("workers", [1, 3, 8])
def test_webdataset_loses_and_repeats_nothing_here(workers: int) -> None:
    epoch = measured.webdataset(workers, 0, 21)
    assert np.array_equal(np.sort(epoch), np.arange(21 * measured.HELD))


def test_a_buffer_lets_nothing_out_before_it_came() -> None:
    row = np.arange(20_000)
    left = measured._buffered(row, 100, np.random.default_rng(0))
    place = np.empty_like(row)
    place[left] = row
    assert (place >= row - 100).all()
    assert place.max() - row[place.argmax()] > 0
    assert 80 < (place - row + 100)[:10_000].mean() < 120  # waits as long as the buffer is, in the mean


def test_the_requests_of_a_rank_hold_its_samples() -> None:
    archive = measured.Archive(40 * measured.PER_SHARD)
    numbers = Sampler([[measured.PER_SHARD] * 40], "key", 4, None).at(np.arange(600)).sample
    requests = measured.requested(archive, [numbers], RECIPE)
    for shard, start, stop in zip(*archive.bytes(numbers), strict=True):
        assert any(one.shard == shard and one.start <= start and stop <= one.stop for one in requests)
    assert len(requests) <= len(numbers)


def test_a_cache_that_holds_all_fetches_each_block_once_and_whole() -> None:
    archive = measured.Archive(4 * measured.PER_SHARD)
    numbers = np.random.default_rng(0).permutation(archive.samples)[:2000]
    reads = measured.requested(archive, [numbers], RECIPE)
    asked = measured.through(measured.Kept(archive, set(), 1.0), reads)
    blocks = [(one.shard, at) for one in asked for at in range(one.start // BLOCK, -(-one.stop // BLOCK))]
    assert len(blocks) == len(set(blocks))
    assert set(blocks) >= archive.blocks(numbers)
    assert all(one.start % BLOCK == 0 and (one.stop % BLOCK == 0 or one.stop == archive.shard_bytes) for one in asked)
    assert not measured.through(measured.Kept(archive, set(blocks), 1.0), reads)


def test_a_cache_that_turns_all_away_fetches_what_is_wanted() -> None:
    archive = measured.Archive(100 * measured.PER_SHARD)
    reads = measured.requested(archive, [np.random.default_rng(0).permutation(archive.samples)[:500]], RECIPE)
    asked = measured.through(measured.Kept(archive, set(), 1e-9), reads)
    bytes_ = sum(one.stop - one.start for one in asked) / sum(one.stop - one.start for one in reads)
    assert 1 < bytes_ < 2.5  # one block of 32 is let in, and is 28 samples long


def test_dealt_turns_are_the_batch() -> None:
    archive = measured.Archive(40 * measured.PER_SHARD)
    plan = BatchPlan(archive.samples, 96, 4, 3)
    numbers = np.random.default_rng(0).permutation(archive.samples)[:192]
    each = [measured.turns((numbers, archive.sizes(numbers)), plan, rank) for rank in range(3)]
    assert np.array_equal(np.sort(np.concatenate(each)), np.sort(numbers))
    assert np.array_equal(np.sort(np.concatenate([one[:32] for one in each])), np.sort(numbers[:96]))


@pytest.mark.parametrize("batch", [256, 4096])
def test_the_simulated_requests_are_about_the_estimated(batch: int) -> None:
    archive = measured.Archive(400 * measured.PER_SHARD)
    order = Sampler([[measured.PER_SHARD] * 400], "key", 64, None)
    (row,) = measured._asked(order, archive, 64, 1, 1, (batch,), 4096)
    assert row.requests == pytest.approx(row.estimate, rel=0.5)
    assert row.gigabytes == pytest.approx(row.wanted, rel=0.2)
    assert 1 <= row.overread < 1.3


@pytest.mark.heavy
@pytest.mark.timeout(180)
def test_the_quick_measurement_prints_its_object() -> None:
    command = [sys.executable, "-m", "bench.order", "--quick", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert found.returncode == 0, found.stderr
    (line,) = found.stdout.splitlines()
    answer = json.loads(line)
    assert set(answer) == {"ratios", "figures", "machine"}
    ratios, figures = answer["ratios"], answer["figures"]
    assert ratios["spread of batch means, no window / full shuffle"] == pytest.approx(1, abs=0.3)
    assert ratios["spread of batch means, window 4 / full shuffle"] > 3
    assert ratios["spread of batch means, window 64, built by launch.py / full shuffle"] == pytest.approx(1, abs=0.3)
    assert figures["MB, one dataset, window 64"] < 100
    assert figures["requests, 8 ranks, batch 8,000, window 64, cache, all fits"] < 1000

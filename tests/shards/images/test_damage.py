"""Damage at random places of pictures in every codec: blocks that are gone are named wherever the file can tell."""

import pytest

from bench import damage

pytestmark = pytest.mark.timeout(120)
CODECS = damage.codecs()


@pytest.mark.parametrize("codec", damage.PROMISED)
def test_blocks_that_are_zeroed_overwritten_or_lost_are_named(codec: str) -> None:
    damaged, undetected = damage.measure(CODECS[codec], 70, seed=1)
    assert min(damaged[kind] for kind in damage.GONE) >= 10
    assert {kind: undetected[kind] for kind in damage.GONE if undetected[kind]} == {}


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec not in damage.PROMISED])
def test_an_end_that_is_lost_is_named_in_every_codec(codec: str) -> None:
    damaged, undetected = damage.measure(CODECS[codec], 21, seed=1)
    assert damaged["end lost"] == 3
    assert undetected["end lost"] == 0

"""The measurements of resumes and of the gateway run, and print what programs rely on."""

import pytest

from tests.bench.test_stream import run_quick


@pytest.mark.timeout(180)
def test_the_first_batch_and_the_memory() -> None:
    answer = run_quick("bench.resume")
    assert answer["figures"]["samples"] == 4000
    assert answer["ratios"]["memory, end of an epoch / its beginning"] < 1.5
    assert answer["ratios"]["first batch, latest position / position 0"] > 0


@pytest.mark.ceph
@pytest.mark.timeout(240)
def test_reads_from_a_gateway(ceph_installed: None) -> None:
    answer = run_quick("bench.gateway_reads")
    assert answer["ratios"]["megabytes per second, radhpc by default / obstore's fastest"] > 0
    assert 0 < answer["figures"]["bytes read / bytes of the samples"] < 1.5

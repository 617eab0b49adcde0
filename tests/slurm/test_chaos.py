"""Some rounds of bench/chaos.py: whatever happens, the samples, losses and weights are those of a calm run."""

from pathlib import Path

import pytest

from bench import chaos


@pytest.mark.box
@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_trouble_leaves_no_trace(tmp_path: Path) -> None:
    if not chaos.FAKETIME.exists():
        pytest.skip("LIBFAKETIME IS NOT INSTALLED: no clock is moved here; see `make faketime`")
    ratios, figures = chaos.chaos(tmp_path / "chaos", ["flipped", "clock", "kill", "full"], seed=1, steps=60)
    assert 0 < ratios["goodput"] < 1
    assert figures["lives"] == 5
    assert figures["checkpoints skipped"] >= 1

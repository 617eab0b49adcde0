"""Some rounds of bench/chaos.py: whatever happens, the samples, losses and weights are those of a calm run.

The checkpoints are objects of a store here; the other tests have files.
"""

import shutil
import tempfile
from pathlib import Path

import pytest

from bench import chaos


@pytest.mark.box
@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_trouble_leaves_no_trace() -> None:
    if missing := chaos.lacking():
        pytest.skip(f"NO CLOCK IS MOVED HERE: {missing}; see `make faketime`")
    folder = Path(tempfile.mkdtemp())  # short, as a box's folder must be
    ratios, figures = chaos.chaos(folder, ["flipped", "clock", "decision", "full"], 1, 70, in_store=True)
    shutil.rmtree(folder)
    assert 0 < ratios["goodput"] < 1
    assert figures["lives"] >= 5
    assert figures["checkpoints skipped"] >= 1

"""The measurement runs, and prints what programs rely on."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.heavy
@pytest.mark.timeout(180)
def test_the_quick_measurement_prints_its_object() -> None:
    command = [sys.executable, "-m", "bench.build", "--quick", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert found.returncode == 0, found.stderr
    (line,) = found.stdout.splitlines()
    answer = json.loads(line)
    assert set(answer) == {"ratios", "figures", "machine"}
    assert "cores" in answer["machine"]
    assert all(value > 0 for kind in ("ratios", "figures") for value in answer[kind].values())
    assert {"CPU time, whole path / library decode", "studies per second, two workers / one"} < set(answer["ratios"])
    assert any(name.startswith("peak memory, listing") for name in answer["ratios"])

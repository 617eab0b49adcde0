"""The measurement runs, and prints what programs rely on."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.heavy
@pytest.mark.timeout(120)
def test_the_quick_measurement_prints_its_object() -> None:
    command = [sys.executable, "-m", "bench.decode", "--quick", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert found.returncode == 0, found.stderr
    (line,) = found.stdout.splitlines()
    answer = json.loads(line)
    assert set(answer) == {"ratios", "figures", "machine"}
    assert all(value > 0 for kind in ("ratios", "figures") for value in answer[kind].values())
    assert {"decode, time of Pillow / radhpc", "Mllama, time of transformers / radhpc"} < set(answer["ratios"])
    assert answer["figures"]["largest difference, in millionths"] <= 10

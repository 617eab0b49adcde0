"""The whole line as a newcomer meets it: phantoms, shards, three stages, evaluation, reports."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import ROOT

GOLDEN = json.loads((ROOT / "tests" / "data" / "quickstart_losses.json").read_text())


@pytest.mark.heavy
@pytest.mark.timeout(1500)
def test_quickstart_reads_unseen_radiographs(launch_json: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    result = launch_json("quickstart", "--run", tmp_path / "run", timeout=1400)
    assert result.keys() >= {"run", "seconds", "macro_f1", "baselines"}
    assert result["macro_f1"] >= 0.9
    assert max(result["baselines"].values()) < 0.3
    audit = launch_json("status", tmp_path / "run", "--audit")
    assert all(epoch["exactly_once"] for epoch in audit["epochs"])
    assert {p.name for p in (tmp_path / "run" / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert len(list((tmp_path / "run" / "evaluation").glob("step-*/table.md"))) == 3
    check_losses(tmp_path / "run" / "tensorboard")


def check_losses(board: Path) -> None:
    """Compare the loss curve with the recorded one, as far as machines agree that add numbers in other orders.

    The first steps are arithmetic alone; later ones amplify the last digits of a sum, so that blocks of 20 steps are
    compared. Whoever changes the order of samples, the loss or the optimizer on purpose records the curve anew.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses: dict[int, float] = {}
    for path in board.rglob("events*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            losses |= {event.step: event.value for event in events.Scalars("train/loss")}
    curve = np.asarray([losses[step] for step in sorted(losses)])
    np.testing.assert_allclose(curve[:20], GOLDEN["first"], rtol=1e-3)
    np.testing.assert_allclose(curve.reshape(-1, 20).mean(1), GOLDEN["means_of_20"], rtol=0.15)

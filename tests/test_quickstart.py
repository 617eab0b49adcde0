"""The whole line as a newcomer meets it: phantoms, shards, three stages, evaluation, reports."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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

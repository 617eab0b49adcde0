"""Findings by the multi-label head, beside yes and no; on the board; and an export of a model with parts of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sklearn.metrics import roc_auc_score

from radhpc import worker
from radhpc.cli.models import context_of
from radhpc.core.errors import UserError
from radhpc.core.files import read_json, read_lines
from radhpc.core.recipe import build, read_yaml
from radhpc.core.run_folder import RunFolder
from radhpc.evaluation.evaluate import score
from radhpc.evaluation.scoring import Scoring, load_rows
from radhpc.serving.export import HEADS, check, export
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import restore_engine
from radhpc.training.sources import open_source
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(300)

CHANGES = ["evaluation={samples: 8, batch: 4, max_new_tokens: 4, images: 1, conventions: [radeval_raw]}"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """The last stage of the tiny Radixpert alone, on two datasets' names: fusion, heads and adapters."""
    folder = tmp_path_factory.mktemp("heads")
    path = ROOT / "recipes" / "tiny" / "radixpert.yaml"
    data = read_yaml(path)
    stage = data["stages"][-1]
    del stage["adapters"]
    data |= {"stages": [{**stage, "steps": 3, "batch": 4, "micro_batch": 2}], "shards": [str(phantom_shards)]}
    data["stages"][0]["optimizer"]["sharpness"] = None
    data["evaluation"] = {}
    made = RunFolder.create(folder / "run", build(data, CHANGES, path))
    assert worker.run(str(made.path)).state == "finished"
    return made.path


def test_the_head_is_scored_beside_yes_and_no(run: Path) -> None:
    (folder,) = (run / "evaluation").glob("step-*")
    result, rows = read_json(folder / "scores.json")["scores"], load_rows(folder)
    names = list(rows[0].head or ())
    assert names == list(RunFolder.open(run).recipe().findings.names)
    reported = [name for name in result if name.startswith("head_auroc/") and name != "head_auroc/macro"]
    for name in reported:
        label = name.partition("/")[2]
        truth = [row.labels["chexpert"].get(label) or 0 for row in rows]
        known = [n for n, value in enumerate(truth) if value != -1]
        expected = roc_auc_score([truth[n] for n in known], [(rows[n].head or {})[label] for n in known])
        assert result[name]["value"] == pytest.approx(expected)
        assert "probability by the multi-label head" in result[name]["convention"]
    assert reported, "no finding is there and not there among these studies"
    assert result["head_auroc/macro"]["value"] == pytest.approx(np.mean([result[name]["value"] for name in reported]))
    assert "auroc/macro" not in result, "nobody asked about findings"
    asked = [row.__class__(**{**vars(row), "likelihoods": row.head}) for row in rows]
    both = score(asked, Scoring(RunFolder.open(run).recipe().evaluation))
    assert both["auroc/macro"]["value"] == both["head_auroc/macro"]["value"]
    assert both["auroc/macro"]["convention"] != both["head_auroc/macro"]["convention"]


def test_the_head_says_the_same_alone(run: Path) -> None:
    context = context_of(run)
    engine, cursor = restore_engine(context)
    encoder = build_encoder(context, cursor.stage)
    (folder,) = (run / "evaluation").glob("step-*")
    written = {row["key"]: row["head"] for row in read_lines(folder / "reports.jsonl")}
    source = open_source(context, cursor.stage, "test")
    number = next(n for n in range(len(source)) if source.key(n) in written)
    row = encoder.encode(*source.read(number))
    result = engine.predict_findings(encoder.batch([row]))
    assert result is not None
    assert list(written[source.key(number)].values()) == pytest.approx(result[0].tolist(), abs=2e-6)


def test_the_board_tells_datasets_tasks_operations_and_curves_apart(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()

    def curve(tag: str) -> dict[int, float]:
        return {point.step: point.value for point in board.Scalars(tag)}

    whole = curve("loss/generation")
    assert curve("loss_by_dataset/phantom") == pytest.approx(whole)
    assert curve("loss_by_task/report") == pytest.approx(whole), "phantoms have reports alone"
    assert all(value > 0 for value in curve("speed/teraflops_per_rank").values())
    assert any(tag.startswith("precision_and_recall/head_") for tag in board.Tags()["tensors"])


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "whole"])
def test_the_fusion_travels_and_the_heads_are_kept(run: Path, tmp_path: Path, merge: bool) -> None:
    """Its example.py runs where radhpc cannot be imported; another gate of the fusion would be noticed."""
    exported, probe = export(context_of(run), tmp_path / "out", merge)
    assert check(exported, probe) < 1e-4
    weights = exported.out if merge else exported.out / "base"
    assert (weights / "hierarchical_fusion.py").exists()
    config: dict[str, Any] = read_json(weights / "config.json")
    assert config["auto_map"] == {"AutoModelForImageTextToText": "hierarchical_fusion.FusedMllama"}
    names = set(load_file(weights / "model.safetensors"))
    assert any(name.startswith("model.fusion.") for name in names)
    assert not any(name.startswith("heads.") for name in names)
    assert "findings.1.weight" in load_file(exported.out / HEADS)
    if merge:
        tensors = load_file(weights / "model.safetensors")
        changed = {"model.fusion.gate": tensors["model.fusion.gate"] + 0.5}
        save_file(tensors | changed, weights / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="its logits differ"):
            check(exported, probe)

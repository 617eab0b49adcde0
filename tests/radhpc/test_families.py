"""The model families beside Mllama: they train all stages on one process and on two, resume, generate, and are exact."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.chaos import losses
from radhpc import models
from radhpc.collate import Encoder
from radhpc.errors import UserError
from radhpc.models.connector import Abstractor, Sasa
from radhpc.recipe import Connector, Model, Recipe, load
from radhpc.run_dir import RunDir
from radhpc.tokenizer import train as train_tokenizer
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(180)

TINY = {"llava": "gla", "swin_qwen": "lightmedvlm", "qwen3_vl": "qwen3_vl"}  # family: its tiny recipe
FAMILIES = sorted(TINY)
# Two steps of each stage, without what ranks draw for themselves.
SHORT = [
    "checkpoint.every=2", "evaluation.samples=3", "evaluation.batch=2", "evaluation.max_new_tokens=4",
    "evaluation.images=0",
]  # fmt: skip


def short(family: str, shards: object) -> Recipe:
    path = ROOT / "recipes" / "tiny" / f"{TINY[family]}.yaml"
    changes = [f"shards=[{shards}]", *SHORT]
    for stage in load(path).stages:
        where = f"stages.{stage.name}"
        changes += [f"{where}.{key}" for key in ("epochs=null", "steps=2", "batch=4", "micro_batch=2")]
        changes += [f"{where}.lora.dropout=0"] if stage.lora else []
    if family == "swin_qwen":
        changes.append("model.connector.dropout=0")
    return load(path, changes)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["Findings: a nodule in the left upper lobe. Impression: no effusion."] * 20, 320, folder)
    return str(folder)


@pytest.fixture(scope="module")
def built(tokenizer: str) -> Callable[[str], tuple[Any, Any]]:
    """A family and its model by name, each built once."""
    known: dict[str, tuple[Any, Any]] = {}

    def build(family: str) -> tuple[Any, Any]:
        if family not in known:
            made: Any = models.family(short(family, "none").model, tokenizer)
            known[family] = made, made.build(seed=1)
        return known[family]

    return build


def view(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width)).astype(np.uint8))


def encoder(family: Any, name: str) -> Encoder:
    recipe = short(name, "none")
    return Encoder(family, recipe.text, recipe.images)


# Whole runs.

TWICE = """
import os, sys
from radhpc import loop, worker
from radhpc.stop import Interrupted

usual, calls = loop._agree, []

def agree(step, *others):
    calls.append(step.number)
    if len(calls) == 4:  # the second step of the second stage
        raise Interrupted("SIGTERM")
    return usual(step, *others)

def live(run):
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # a life's store may outlive it
    return worker.run(run).state

for run in sys.argv[1:]:
    calls.clear()
    loop._agree = agree
    assert live(run) == "interrupted"
    loop._agree = usual
    assert live(run) == "finished"
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> dict[str, tuple[Path, Path]]:
    """Of each family a run on one process, and one on two ranks that is interrupted in its second stage."""
    from radhpc import worker

    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for family in FAMILIES:
        recipe = short(family, phantom_shards)
        one, two = (RunDir.create(folder / f"{family}-{ranks}", recipe) for ranks in (1, 2))
        assert worker.run(str(one.path)).state == "finished"
        found[family] = one.path, two.path
    port = 20000 + os.getpid() % 20000
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "LOCAL_WORLD_SIZE": "2"}
    command = [sys.executable, "-c", TWICE, *(str(two) for _, two in found.values())]
    ranks = [
        subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    try:
        assert [rank.wait(150) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_all_stages_on_one_process_and_on_two_ranks_that_resume(
    runs: dict[str, tuple[Path, Path]], family: str
) -> None:
    one, two = runs[family]
    alone, together = losses(one), losses(two)
    stages = short(family, "none").stages
    assert sorted(alone) == sorted(together) == list(range(1, 2 * len(stages) + 1))
    assert [together[step] for step in alone] == pytest.approx(list(alone.values()), rel=2e-5)
    assert len(set(alone.values())) == len(alone), "nothing was learnt"
    assert [event["stage"] for event in RunDir.open(two).events("stage_finished")] == [stage.name for stage in stages]
    for run in (one, two):
        scores = [json.loads(path.read_text()) for path in sorted(run.glob("evaluation/*/scores.json"))]
        assert len(scores) == len(stages)
        assert all(score["samples"] == 3 for score in scores)
    assert (one / "adapter" / "adapter_model.safetensors").exists()

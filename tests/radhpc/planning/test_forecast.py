"""The forecast of `plan` on fake tensors against the memory that the same step takes on real ones."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radhpc.core import recipe as recipes
from radhpc.core.run_folder import RunFolder
from radhpc.planning.forecast import forecast
from slurm.preflight.plan import costs, fits
from slurm.profile import Profile
from tests.conftest import ROOT

pytestmark = [pytest.mark.timeout(250)]

# Large enough that tensors outweigh what the interpreter and its libraries take: some hundred megabytes.
WIDE = [
    "model.config.text.hidden_size=256", "model.config.text.intermediate_size=1024",
    "model.config.text.num_hidden_layers=4", "model.config.text.num_attention_heads=4",
    "model.config.text.cross_attention_layers=[1, 3]",
    "stages.scratch.batch=32", "stages.scratch.micro_batch=16",
    "stages.adapt.batch=32", "stages.adapt.micro_batch=16",
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "more"), [(0, []), (1, ["model.checkpoint_activations=true"])], ids=["plain", "recomputed"]
)
def test_the_forecast_peak_is_what_a_step_takes(recipe_file: Path, number: int, more: list[str]) -> None:
    overrides = [*WIDE, *more]
    recipe = recipes.load(recipe_file, overrides)
    predicted = forecast(recipe, world=1)[number].gigabytes_per_gpu
    done = subprocess.run(
        [sys.executable, "-m", "tests.radhpc.planning.measure_step", recipe_file, json.dumps(overrides), str(number)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=200,
        env={"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    measured = float(done.stdout.splitlines()[-1])
    print(f"stage {number} {more}: predicted {predicted:.3f} GB, measured {measured:.3f} GB")
    assert measured > 0.1, "too small to tell"
    assert predicted == pytest.approx(measured, rel=0.15)


def test_sharding_and_a_folder_with_its_configuration_alone(recipe_file: Path, tmp_path: Path) -> None:
    from transformers import MllamaConfig

    config = recipes.load(recipe_file).model.config
    assert config is not None
    MllamaConfig(text_config={**config["text"], "vocab_size": 128256}, vision_config=config["vision"]).save_pretrained(
        tmp_path / "model"
    )
    recipe = recipes.load(
        recipe_file,
        [f"model={{weights: {tmp_path / 'model'}}}", "text.max_tokens=77", "stages.scratch.batch=8", "precision=bf16"],
    )
    one, four = forecast(recipe, world=1), forecast(recipe, world=4)
    assert [stage.name for stage in one] == ["scratch", "adapt", "refine"]
    assert one[0].trainable == one[0].parameters >= 2 * 32 * 128256
    assert 2 * one[1].trainable == one[2].trainable, "twice the rank"
    assert [stage.tokens for stage in one] == [77] * 3, "without a tokenizer no text can be measured"
    assert [stage.steps for stage in one] == [stage.steps for stage in four]
    assert one[0].checkpoint_megabytes == pytest.approx(one[0].trainable * 12 / 1e6, rel=0.01)
    assert four[0].checkpoint_megabytes == pytest.approx(one[0].checkpoint_megabytes, rel=0.01)
    assert four[0].gigabytes_per_gpu < one[0].gigabytes_per_gpu
    assert (one[0].micro_batch, four[0].micro_batch) == (2, 2)


def test_the_verb_says_what_it_knows_and_null_for_what_it_does_not(
    launch_json: Callable[..., Any], recipe_file: Path, tmp_path: Path
) -> None:
    result = launch_json("plan", recipe_file, "--run", tmp_path)
    keys = "fits gigabytes_per_gpu parameters trainable steps hours checkpoint_megabytes save_seconds grace_seconds"
    assert set(keys.split()) <= set(result)
    assert result["fits"]
    assert result["hours"] is None
    assert result["grace_seconds"] is None
    assert result["steps"] == sum(stage["steps"] for stage in result["stages"])
    assert result["save_seconds"] > 0
    assert all(result["fits_on"].values())
    assert not list(tmp_path.glob(".radhpc*")), "the measurement leaves nothing"


def test_what_cannot_fit_is_refused_and_hours_come_from_a_run(recipe_file: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    stages = [replace(stage, gigabytes_per_gpu=22.9) for stage in forecast(recipes.load(recipe_file), world=1)]
    like = RunFolder.create(tmp_path / "run", recipes.load(recipe_file))
    like.record("started", world=2)
    like.write_progress(samples_per_second=3.0)
    profile = Profile(cluster="local", tasks_per_node=4, gpus_per_node=4, constraint="t4")
    result = costs(stages, profile, tmp_path, like)
    assert not result["fits"]
    assert "22.9 GB" in result["problems"][0]
    assert "T4" in result["problems"][0]
    assert result["fits_on"] == {
        "T4": False, "RTX 3090": True, "A100 40GB": True, "A100 80GB": True, "H100 80GB": True,
    }  # fmt: skip
    assert result["samples_per_second"] == 6.0
    assert "scaled from 2 to 4 ranks" in result["samples_per_second_from"]
    samples = sum(stage.samples for stage in stages)
    assert result["hours"] == pytest.approx(samples / 6 / 3600)
    assert result["gpu_hours"] == pytest.approx(result["hours"] * 4)
    assert fits(13.0, 14.7 * 2**30)
    assert not fits(15.0, 14.7 * 2**30), "the context and workspaces want room, too"

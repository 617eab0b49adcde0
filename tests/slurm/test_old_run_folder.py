"""A run folder of an older release goes on: with the code that it froze, submitted and read by today's."""

import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.run_folder import RunFolder
from slurm import frozen_code, scheduler
from tests.conftest import TINY_MODEL
from tests.slurm.test_preemption import events
from tests.waiting import wait_for

STEPS = (120, 20)  # of the two stages: the first one lasts for seconds, so that it is stopped midway
RECIPE = (
    """
name: old
shards: ['SHARDS']
model:
"""
    + TINY_MODEL
    + f"""
stages:
  - {{name: scratch, steps: {STEPS[0]}, batch: 6, micro_batch: 3, train: ['.*'], optimizer: {{learning_rate: 1.0e-3}}}}
  - name: adapt
    steps: {STEPS[1]}
    batch: 6
    lora: {{rank: 2, alpha: 4, dropout: 0.1, targets: '.*language_model.*(q|v)_proj'}}
    optimizer: {{learning_rate: 1.0e-3}}
checkpoint: {{every: 100}}
evaluation: {{samples: 2, batch: 2, max_new_tokens: 4, images: 0, neighbours: 0}}
"""
)


@pytest.fixture
def old(old_checkout: Path) -> Callable[..., str]:
    """Return a function that calls the launch.py of commit a0139ea."""

    def call(*arguments: object) -> str:
        command = [sys.executable, "launch.py", *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=old_checkout, capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return call


@pytest.mark.timeout(240)
def test_a_run_of_an_older_release_goes_on_with_its_own_code(
    old: Callable[..., str],
    launch: Callable[..., Any],
    launch_json: Callable[..., dict[str, Any]],
    local_profile: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    run, whole, shards, recipe = (tmp_path / name for name in ("run", "whole", "shards", "old.yaml"))
    sizes = ["--longest-side", 56, "--shard-samples", 16, "--workers", 1, "studies=60", "size=96"]
    old("build", "phantom", "--out", shards, *sizes)
    recipe.write_text(RECIPE.replace("SHARDS", str(shards)))
    profile = local_profile(1)
    old("train", recipe, "--on", profile, "--run", run)
    old("train", recipe, "--on", profile, "--run", whole)  # beside it, and never interrupted
    wait_for(lambda: bool(events(run, "first_step")))
    old("stop", run)
    wait_for(lambda: not scheduler.state(RunFolder.open(run).job()))
    (interrupted,) = events(run, "interrupted")
    assert 0 < interrupted["step"] < STEPS[0], "it was not stopped midway: nothing is tested"
    assert (run / "code" / "verbs").is_dir(), "this is not the old code"
    assert launch_json("status", run)["state"] == "stopped"

    launch("resume", run, "--on", profile)
    wait_for(lambda: bool(events(run, "finished")) and bool(events(whole, "finished")))
    first, second = events(run, "submitted")
    assert first["code"] == second["code"] == frozen_code.environment(run / "code")["code"] != frozen_code.current()
    assert not events(run, "environment_changed")
    assert [event["step"] for event in events(run, "resumed")] == [interrupted["step"]]

    last = Path("checkpoints") / f"step-{sum(STEPS):06d}" / "state.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()
    audit = launch_json("status", run, "--audit")
    assert [topology["from_step"] for topology in audit["topologies"]] == [0, interrupted["step"]]
    assert audit["epochs"]
    assert all(epoch["exactly_once"] for epoch in audit["epochs"])

    assert launch_json("status", run)["step"] == sum(STEPS)
    assert launch("logs", run).stdout.count("rank 0 starts on") >= 2  # of both lives
    image = tmp_path / "image.jpg"
    image.write_bytes(_first_image(shards))
    assert isinstance(launch_json("generate", run, "--image", image)["text"], str)


def _first_image(shards: Path) -> bytes:
    """Return the bytes of the first JPEG of the test split."""
    with tarfile.open(min(shards.glob("test-*.tar"))) as archive:
        for member in archive:
            if member.name.endswith((".jpg", ".jpeg")):
                file = archive.extractfile(member)
                assert file is not None
                return file.read()
    raise AssertionError(f"{shards}: no JPEG in its test split")

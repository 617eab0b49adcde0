"""The published systems' twins on a real SLURM: a SIGKILL in the second stage costs no stage, no sample and no answer.

The suite takes one of them on two ranks. All of them, on one rank and on two, is a matter of ten minutes:

    RADHPC_TWINS=all python -m pytest tests/slurm/test_stages.py
"""

import os
import signal
import tarfile
from pathlib import Path

import pytest

from bench.chaos import rank_pid
from radhpc.core.ledger import read_ledger
from radhpc.core.recipe import load
from tests.conftest import ROOT
from tests.slurm.test_preemption import Launch, Slurm, events, finish, step
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.timeout(400)]

TWINS = ("radixpert", "gla", "lightmedvlm", "cxr_qlora", "qwen3_vl")
STEPS = 6  # of each stage
by_hand = pytest.mark.skipif(os.environ.get("RADHPC_TWINS") != "all", reason="by hand: RADHPC_TWINS=all")
CASES = [
    pytest.param(twin, ranks, marks=() if (twin, ranks) == ("radixpert", 2) else by_hand)
    for twin in TWINS
    for ranks in (1, 2)
]


@pytest.mark.parametrize(("twin", "ranks"), CASES)
def test_a_twin_goes_on_in_the_stage_that_it_was_killed_in(
    twin: str, ranks: int, launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, phantom_shards: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    path, run = ROOT / "recipes" / "tiny" / f"{twin}.yaml", tmp_path / "run"
    stages = [stage.name for stage in load(path).stages]
    changes = [f"stages.{name}.{key}" for name in stages for key in ("epochs=null", f"steps={STEPS}", "batch=8")]
    changes += [f"shards=[{phantom_shards}]", "checkpoint.every=2", "evaluation.samples=2"]
    changes += ["evaluation.max_new_tokens=4", "evaluation.neighbours=0", "evaluation.images=0"]
    box_profile.write_text(box_profile.read_text().replace("nodes: 2", f"nodes: {ranks}"))
    launch("train", path, *changes, "--on", box_profile, "--run", run)
    job = events(run, "submitted")[-1]["job"]
    before = STEPS if len(stages) > 1 else 0  # of the first stage, where there is a second one
    wait_for(lambda: any(event["step"] > before for event in events(run, "saved")) and step(run) > before + 2, 180)
    os.kill(rank_pid(job, ranks - 1), signal.SIGKILL)
    wait_for(lambda: bool(events(run, "requeued")), 60)
    finish(slurm, run, job)

    assert [event["event"] for event in events(run, "rank_lost", "crashed")] == ["rank_lost"]
    assert before < events(run, "resumed")[0]["step"] <= before + STEPS, "it did not go on in the stage it was in"
    assert [event["stage"] for event in events(run, "stage_finished")] == stages, "none was trained twice"
    assert all(number > before for number in read_ledger(run / "ledger").replayed), "a step of the first stage"
    audit = launch_json("status", run, "--audit")
    assert audit["epochs"], "nothing was audited"
    assert all(epoch["exactly_once"] for epoch in audit["epochs"])
    assert {each["world_size"] for each in audit["topologies"]} == {ranks}
    assert all(epoch["seen"] == STEPS * 8 for epoch in audit["epochs"])
    said = launch_json("generate", run, "--image", picture(phantom_shards, tmp_path), "--max-new-tokens", 4)
    assert isinstance(said["text"], str)


def picture(shards: Path, folder: Path) -> Path:
    """A view out of the shards, as a file."""
    with tarfile.open(next(shards.glob("*.tar"))) as archive:
        member = next(member for member in archive if member.name.endswith(".jpg"))
        file = archive.extractfile(member)
        assert file is not None
        (folder / "view.jpg").write_bytes(file.read())
    return folder / "view.jpg"

"""A training on a real SLURM outlives whatever happens to it: preempted, killed, cancelled, stopped.

Promise 5. Each run on two nodes is compared with one that nobody disturbed: the same samples in the same steps, and
the same adapter, bit for bit.
"""

import json
import os
import re
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import losses, rank_pid
from radhpc.core.files import read_lines
from radhpc.core.ledger import read_ledger
from tests.waiting import wait_for

pytestmark = [pytest.mark.box, pytest.mark.timeout(400)]

Launch = Callable[..., Any]
Slurm = Callable[..., str]

# Long enough that a signal comes in the middle: a step takes some hundredths of a second.
LONGER = ["stages.scratch.steps=30", "stages.adapt.epochs=5", "stages.refine.steps=60"]
EVERY = 10


def start(launch: Launch, recipe: Path, profile: Path, run: Path, changes: Sequence[str] = LONGER) -> str:
    launch("train", recipe, *changes, f"checkpoint.every={EVERY}", "--on", profile, "--run", run)
    return events(run, "submitted")[-1]["job"]  # type: ignore[no-any-return]


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if not names or event["event"] in names]


def step(run: Path) -> int:
    return max(read_ledger(run / "ledger").steps, default=0)


def job_state(slurm: Slurm, job: str) -> str:
    found = re.search(r"JobState=(\S+)", slurm("scontrol", "show", "job", job))
    assert found
    return found[1]


def finish(slurm: Slurm, run: Path, job: str) -> None:
    """Wait for the end. SLURM holds a requeued job back for some ten seconds, and must: its first life is cleaned up
    meanwhile, and what is sent to end that one would end the second.
    """

    def ends() -> list[str]:
        rows = [event["event"] for event in events(run, "submitted", "finished", "failed", "crashed", "cancelled")]
        return rows[len(rows) - rows[::-1].index("submitted") :]  # an earlier job of the run may have ended otherwise

    wait_for(lambda: bool(ends()), 240)
    assert "finished" in ends(), events(run)[-3:]
    wait_for(lambda: job_state(slurm, job) == "COMPLETED")


def assert_equal(run: Path, undisturbed: Path) -> None:
    """No step lost, none repeated in what the weights saw, and the same adapter."""
    mine, wanted = read_ledger(run / "ledger"), read_ledger(undisturbed / "ledger")
    assert mine.steps == wanted.steps
    assert losses(run) == losses(undisturbed)
    name = "adapter/adapter_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_preempted_run_comes_back_and_a_cancelled_one_does_not_until_it_is_resumed(
    launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path,
    undisturbed: Path,
) -> None:  # fmt: skip
    """In its second life SLURM still remembers the preemption of the first: that must not bring it back."""
    run = tmp_path / "run"
    job = start(launch, recipe_file, box_profile, run)
    wait_for(lambda: step(run) >= 14)
    slurm("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 2")
    wait_for(lambda: bool(events(run, "requeued")), 60)
    at = events(run, "interrupted")[0]
    assert at["cause"] == "SIGTERM"
    saved = [event for event in events(run, "saved") if event["step"] == at["step"]]
    assert saved, "the step of the interruption was not saved"

    wait_for(lambda: bool(events(run, "resumed")) and step(run) > at["step"] + 2, 120)
    names = [event["event"] for event in events(run)]
    order = [names.index(name) for name in ("interrupted", "preempted", "requeued")]
    assert order == sorted(order), "requeued before the ranks had committed"
    assert [event["step"] for event in events(run, "resumed")] == [at["step"]], "not the step it was stopped at"
    assert events(run, "started")[0]["job"] == events(run, "started")[1]["job"] == job

    slurm("scancel", job)
    wait_for(lambda: job_state(slurm, job) == "CANCELLED", 60)
    # A job for all nodes gets its turn: had the cancelled one come back, it would have been there before.
    slurm("sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "true")
    assert job_state(slurm, job) == "CANCELLED"
    assert len(events(run, "started")) == 2
    assert len(events(run, "requeued")) == 1
    last = events(run, "saved")[-1]["step"]
    assert last == step(run), "what was trained before the cancellation was not saved"

    finish(slurm, run, launch_json("resume", run)["job"])
    assert not read_ledger(run / "ledger").replayed, "a step was trained twice"
    assert_equal(run, undisturbed)


def test_a_run_is_killed_meets_its_time_limit_and_is_stopped(
    launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path,
    undisturbed: Path,
) -> None:  # fmt: skip
    """A rank is killed: at most one interval of checkpoints is trained again. SIGUSR2, as SLURM sends it before the
    limit, here by hand, because the real one comes after a minute at the earliest. Then `stop`, until `resume`.
    """
    run = tmp_path / "run"
    job = start(launch, recipe_file, box_profile, run)
    assert "in use by slurm job" in launch("resume", run, status=2).stderr
    wait_for(lambda: any(event["step"] >= EVERY for event in events(run, "saved")))  # not still in flight
    os.kill(rank_pid(job, 1), signal.SIGKILL)
    wait_for(lambda: bool(events(run, "requeued")), 60)
    assert [event["event"] for event in events(run, "rank_lost", "crashed")] == ["rank_lost"]

    killed_at = step(run)
    wait_for(lambda: len(events(run, "started")) == 2 and step(run) > killed_at, 120)
    slurm("scancel", "--signal=USR2", job)
    wait_for(lambda: len(events(run, "requeued")) == 2, 60)
    assert [event["cause"] for event in events(run, "requeued")] == ["rank_lost", "time_limit"]

    signalled_at = step(run)
    wait_for(lambda: len(events(run, "started")) == 3 and step(run) > signalled_at, 120)
    launch("stop", run)
    wait_for(lambda: job_state(slurm, job) == "COMPLETED", 60)
    assert launch_json("status", run)["state"] == "stopped"
    assert len(events(run, "requeued")) == 2

    finish(slurm, run, launch_json("resume", run)["job"])
    assert len(read_ledger(run / "ledger").replayed) <= EVERY
    assert_equal(run, undisturbed)


def test_a_mistake_stays_down(
    launch: Launch, launch_json: Launch, slurm: Slurm, box_profile: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """A regular expression that matches nothing is known only in the job: one line, and no requeue."""
    run = tmp_path / "run"
    launch("train", recipe_file, "stages.scratch.train=[nowhere]", "--on", box_profile, "--run", run)
    wait_for(lambda: bool(events(run, "failed")), 90)
    state = launch_json("status", run)
    assert state["state"] == "failed"
    assert "'nowhere' matches no parameter" in state["cause"]
    assert not events(run, "requeued")


def test_a_wrong_partition_is_one_line(launch: Launch, box_profile: Path, recipe_file: Path, tmp_path: Path) -> None:
    box_profile.write_text(box_profile.read_text().replace("partition: preemptible", "partition: imaginary"))
    message = launch("train", recipe_file, "--on", box_profile, "--run", tmp_path / "run", status=2).stderr
    assert "partition 'imaginary': no such partition; there are preemptible, urgent" in message
    assert "Traceback" not in message


def test_real_radiographs_on_two_nodes(
    launch: Launch, launch_json: Launch, real_notes: Path, box_profile: Path, tmp_path: Path
) -> None:
    """Real images and notes -> shards -> LoRA on two nodes -> a text for an image."""
    from tests.conftest import ROOT

    shards, run = tmp_path / "shards", tmp_path / "run"
    built = launch_json("build", "image_text", "--raw", real_notes, "--out", tmp_path / "all")
    assert built["samples"] == 22
    assert not built["skipped"]
    # One patient stays out of the shards, so that the text below is written for images nobody has trained on.
    records = json.loads((real_notes / "data.json").read_text())
    held_out = [real_notes / record["image"] for record in records if record["patient"] == "20"]
    kept = [{**r, "image": str(real_notes / r["image"])} for r in records if r["patient"] != "20"]
    (tmp_path / "kept.json").write_text(json.dumps(kept))
    built = launch_json("build", "image_text", "--raw", tmp_path / "kept.json", "--out", shards, "outside=allow")
    assert built["samples"] == 22 - len(held_out)
    recipe = ROOT / "recipes" / "image_text.yaml"
    launch("train", recipe, f"shards=[{shards}]", "--on", box_profile, "--run", run, "--watch", timeout=390)
    curve = losses(run)
    first, last = list(curve.values())[:3], list(curve.values())[-3:]
    assert sum(last) < 0.8 * sum(first), (first, last)
    audit = launch_json("status", run, "--audit")
    assert all(epoch["exactly_once"] for epoch in audit["epochs"])
    assert held_out
    for image in held_out:
        assert launch_json("generate", run, "--image", image)["text"]

"""`nodes: 1-2`: each life of a run takes the nodes there are, and the training stays the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.chaos import losses, setting
from radhpc.core.errors import UserError
from radhpc.core.ledger import read_ledger
from slurm import profile as profiles
from tests.slurm.test_preemption import events, finish, start, step
from tests.waiting import wait_for

Launch = Callable[..., Any]

STEPS = ["stages.scratch.steps=60", "stages.adapt.lora.dropout=0", "evaluation.every=null"]


@pytest.mark.box
@pytest.mark.timeout(400)
def test_a_run_on_two_nodes_comes_back_on_one_and_then_on_two(
    launch_json: Launch, launch: Launch, slurm: Callable[..., str], box: str, box_profile: Path, recipe_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """An urgent job takes one of the two nodes and keeps it; the second life begins on the other one. SLURM warns by
    SIGUSR2, as some sites have it, and that is not taken for the time limit.
    """
    box_profile.write_text(box_profile.read_text().replace("nodes: 2", "nodes: 1-2"))
    run = tmp_path / "run"
    job = start(launch, recipe_file, box_profile, run, STEPS)
    wait_for(lambda: step(run) >= 4)
    with setting(box, "SlurmctldParameters=preempt_send_user_signal"):
        urgent = slurm(
            "sbatch", "--parsable", "--partition=urgent", "--nodes=1", "--exclusive", "--output=/dev/null",
            "--wrap", "sleep 600",
        ).strip()  # fmt: skip
        wait_for(lambda: bool(events(run, "requeued")), 60)
    assert events(run, "interrupted")[0]["cause"] == "SIGUSR2"
    wait_for(lambda: len(events(run, "started")) == 2 and step(run) >= events(run, "preempted")[0]["step"] + 3)
    slurm("scancel", urgent)
    slurm("scancel", "--signal=USR2", job)  # as before the time limit
    finish(slurm, run, job)
    assert [event["world"] for event in events(run, "started")] == [2, 1, 2]
    assert [event["cause"] for event in events(run, "requeued")] == ["preempted", "time_limit"]
    assert not events(run, "rank_lost", "environment_changed")
    audit = launch_json("status", run, "--audit")
    assert all(epoch["exactly_once"] for epoch in audit["epochs"])
    assert [life["world_size"] for life in audit["topologies"]] == [2, 1, 2]
    assert not read_ledger(run / "ledger").replayed
    undisturbed = tmp_path / "undisturbed"
    launch("train", recipe_file, *STEPS, "--on", "inline", "--run", undisturbed)
    assert read_ledger(run / "ledger").steps == read_ledger(undisturbed / "ledger").steps
    mine, wanted = losses(run), losses(undisturbed)
    assert mine.keys() == wanted.keys()
    # Sums of another order grow apart slowly, as any training does; the first sixty steps stay within a thousandth.
    assert max(abs(mine[n] - wanted[n]) / wanted[n] for n in range(1, 61)) < 1e-3


@pytest.mark.parametrize(
    ("nodes", "least", "most"), [(1, 1, 1), ("3", 3, 3), ("1-4", 1, 4), ("2-2", 2, 2), ("02-4", None, None)]
)
def test_a_number_of_nodes_or_a_range(nodes: int | str, least: int | None, most: int | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"cluster: slurm\ntasks_per_node: 2\nnodes: {nodes!r}\n")
    if least is None:
        with pytest.raises(UserError, match="nodes"):
            profiles.load(str(path))
        return
    profile = profiles.load(str(path))
    assert (profile.least_nodes, profile.most_nodes, profile.world) == (least, most, 2 * (most or 0))


@pytest.mark.parametrize("nodes", ["0", "4-1", "1-", "-3", "1,2", "true", "two", "1.5"])
def test_other_numbers_of_nodes_are_refused_in_one_line(nodes: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"cluster: slurm\nnodes: {nodes}\n")
    with pytest.raises(UserError, match=r"nodes: allowed are a number from 1 on, or a range such as 1-4 \(given") as e:
        profiles.load(str(path))
    assert len(str(e.value).splitlines()) == 1

"""The policy, case by case, with what SLURM 22.05 was seen to say in each of them."""

from typing import Any

import pytest

from slurm.profile import Profile
from slurm.requeue import decide

RUNNING = {"JobState": "RUNNING", "PreemptTime": "None", "Restarts": "0"}
PREEMPTED = {**RUNNING, "PreemptTime": "2026-11-22T02:00:00"}
CANCELLED = {**RUNNING, "JobState": "COMPLETING"}


def ends(*states: str, cause: str = "") -> list[dict[str, Any]]:
    return [{"state": state, "cause": cause if state != "finished" else "", "step": 7} for state in states]


@pytest.mark.parametrize(
    ("job", "found", "exit_status", "losses", "restarts", "cause", "comes_back"),
    [
        (RUNNING, ends("finished", "finished"), 0, 1, 0, "finished", False),
        (PREEMPTED, ends("finished", "finished"), 0, 1, 0, "finished", False),
        (PREEMPTED, ends("interrupted", "interrupted", cause="SIGTERM"), 0, 1, 0, "preempted", True),
        (PREEMPTED, ends("interrupted", "interrupted", cause="SIGUSR2"), 0, 1, 0, "preempted", True),
        (RUNNING, ends("interrupted", "interrupted", cause="SIGTERM"), 0, 1, 0, "preempted", True),
        (RUNNING, ends("interrupted", "interrupted", cause="SIGUSR2"), 0, 1, 0, "time_limit", True),
        (CANCELLED, ends("interrupted", "interrupted", cause="SIGTERM"), 0, 1, 0, "cancelled", False),
        ({**CANCELLED, "PreemptTime": "2026-11-22T02:00:00"}, ends(), 143, 1, 0, "cancelled", False),
        (
            {**CANCELLED, "Restarts": "1"},
            ends("interrupted", "interrupted", cause="SIGTERM"),
            0,
            1,
            1,
            "cancelled",
            False,
        ),
        (
            {**CANCELLED, "Restarts": "2"},
            ends("interrupted", "interrupted", cause="SIGTERM"),
            0,
            1,
            1,
            "preempted",
            False,
        ),
        (RUNNING, ends("interrupted", "interrupted", cause="stop"), 0, 1, 0, "stopped", False),
        (PREEMPTED, ends("pruned", "pruned", cause="pruned"), 0, 1, 0, "pruned", False),
        ({**CANCELLED, "Restarts": "1"}, ends("pruned", "pruned", cause="pruned"), 0, 1, 0, "pruned", False),
        (RUNNING, ends("lost_peer"), 137, 1, 0, "rank_lost", True),
        (RUNNING, ends("lost_peer"), 137, 3, 0, "rank_lost", True),
        (RUNNING, ends("lost_peer"), 137, 4, 0, "rank_lost", False),
        (RUNNING, ends(), 137, 1, 0, "rank_lost", True),
        (PREEMPTED, ends("lost_peer"), 137, 9, 0, "preempted", True),
        (RUNNING, ends("crashed", "lost_peer", cause="boom"), 1, 1, 0, "crashed", False),
        (RUNNING, ends("mistake", "mistake", cause="no such key"), 2, 1, 0, "failed", False),
        (RUNNING, ends("finished"), 137, 1, 0, "rank_lost", True),
    ],
)
def test_the_policy(
    job: dict[str, str], found: list[dict[str, Any]], exit_status: int, losses: int, restarts: int, cause: str,
    comes_back: bool,
) -> None:  # fmt: skip
    profile = Profile(cluster="slurm", nodes=2, retries=3)
    verdict = decide(job, found, 2, exit_status, profile, losses, restarts)
    assert (verdict.cause, verdict.comes_back) == (cause, comes_back)


def test_a_profile_may_refuse_to_come_back() -> None:
    profile = Profile(cluster="slurm", nodes=2, requeue=False)
    found = ends("interrupted", "interrupted", cause="SIGTERM")
    assert not decide(PREEMPTED, found, 2, 0, profile, 1).comes_back

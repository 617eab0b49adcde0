"""The policy, case by case, with what SLURM 22.05 was seen to say in each of them."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from slurm import scheduler
from slurm.profile import Profile
from slurm.requeue import Decision, History, crash_signature, decide, excluded_nodes, history, split_earlier_attempt

RUNNING = {"JobState": "RUNNING", "PreemptTime": "None", "Restarts": "0"}
PREEMPTED = {**RUNNING, "PreemptTime": "2026-11-22T02:00:00"}
CANCELLED = {**RUNNING, "JobState": "COMPLETING"}


def ends(*states: str, cause: str = "") -> list[dict[str, Any]]:
    return [{"state": state, "cause": cause if state != "finished" else "", "step": 7} for state in states]


@pytest.mark.parametrize(
    ("job", "found", "exit_status", "losses", "restarts", "cause", "requeue"),
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
            True,
        ),
        (RUNNING, ends("interrupted", "interrupted", cause="stop"), 0, 1, 0, "stopped", False),
        (PREEMPTED, ends("pruned", "pruned", cause="pruned"), 0, 1, 0, "pruned", False),
        ({**CANCELLED, "Restarts": "1"}, ends("pruned", "pruned", cause="pruned"), 0, 1, 0, "pruned", False),
        (RUNNING, ends("lost_peer"), 137, 1, 0, "rank_lost", True),
        (RUNNING, ends("lost_peer"), 137, 3, 0, "rank_lost", True),
        (RUNNING, ends("lost_peer"), 137, 4, 0, "rank_lost", False),
        (RUNNING, ends(), 137, 1, 0, "rank_lost", True),
        (PREEMPTED, ends("lost_peer"), 137, 9, 0, "preempted", True),
        (RUNNING, ends("crashed", "lost_peer", cause="boom"), 1, 1, 0, "crashed", True),
        (RUNNING, ends("mistake", "mistake", cause="no such key"), 2, 1, 0, "failed", False),
        (RUNNING, ends("finished"), 137, 1, 0, "rank_lost", True),
    ],
)
def test_the_policy(
    job: dict[str, str], found: list[dict[str, Any]], exit_status: int, losses: int, restarts: int, cause: str,
    requeue: bool,
) -> None:  # fmt: skip
    profile = Profile(cluster="slurm", nodes=2, retries=3)
    decision = decide(job, dict(enumerate(found)), 2, exit_status, profile, History(losses=losses - 1), restarts)
    assert (decision.cause, decision.requeue) == (cause, requeue)


def test_a_profile_may_refuse_to_come_back() -> None:
    profile = Profile(cluster="slurm", nodes=2, requeue=False)
    found = dict(enumerate(ends("interrupted", "interrupted", cause="SIGTERM")))
    assert not decide(PREEMPTED, found, 2, 0, profile).requeue


PROFILE = Profile(cluster="slurm", nodes=2, retries=3, crash_retries=2, lives_without_progress=5, node_losses=2)


def life(end: str, *, saved: int | None = None, **details: Any) -> list[dict[str, Any]]:
    saves = [] if saved is None else [{"event": "saved", "step": saved}]
    return [{"event": "started"}, *saves, *([{"event": end, **details}] if end else [])]


def run(*lives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"event": "submitted"}, *itertools.chain(*lives)]


INTERRUPTED = dict(enumerate(ends("interrupted", "interrupted", cause="SIGTERM")))


@pytest.mark.parametrize(
    ("lives", "requeue"),
    [
        ([life("preempted")] * 4, False),
        ([life("preempted")] * 3, True),
        ([life("preempted", saved=5), *[life("preempted")] * 4], False),
        ([*[life("preempted")] * 3, life("preempted", saved=5), life("preempted")], True),
        ([*[life("preempted", saved=5)] * 9], False),  # the same step again and again
        ([life("preempted", saved=step) for step in range(99)], True),
    ],
)
def test_lives_without_progress_end_the_run_with_the_reason(lives: list[Any], requeue: bool) -> None:
    decision = decide(PREEMPTED, INTERRUPTED, 2, 0, PROFILE, history(run(*lives, life(""))))
    assert decision.cause == "preempted"
    assert decision.requeue == requeue
    assert ("lives in a row" in decision.gave_up) != requeue


def test_a_person_who_resumes_starts_the_counts_anew() -> None:
    events = [*run(*[life("rank_lost")] * 9), *run(life(""))]
    assert decide(RUNNING, {}, 2, 137, PROFILE, history(events)).requeue


@pytest.mark.parametrize(("saved", "requeue"), [(3, True), (None, False)])
def test_the_time_limit_brings_back_only_what_progressed(saved: int | None, requeue: bool) -> None:
    found = dict(enumerate(ends("interrupted", "interrupted", cause="SIGUSR2")))
    decision = decide(RUNNING, found, 2, 0, PROFILE, history(run(life("", saved=saved))))
    assert (decision.cause, decision.requeue) == ("time_limit", requeue)
    assert ("before a new checkpoint" in decision.gave_up) != requeue


TRACEBACK = """Traceback (most recent call last):
  File "/home/me/radhpc/worker.py", line 70, in run
    outcome = _run(run_dir, ranks, stop)
  File "/home/me/radhpc/loop.py", line {line}, in train
    engine.step()
ValueError: {said}
"""


def crash(line: int, said: str) -> dict[int, dict[str, Any]]:
    trace = TRACEBACK.format(line=line, said=said)
    return {0: {"state": "crashed", "cause": said, "traceback": trace}, 1: {"state": "lost_peer", "cause": ""}}


def test_a_crash_comes_back_while_its_traceback_is_new() -> None:
    def crashed(line: int, saved: int | None = None) -> list[dict[str, Any]]:
        return life("crashed", saved=saved, fingerprint=crash_signature(TRACEBACK.format(line=line, said="x")))

    def after(*lives: list[dict[str, Any]], saved: int | None = None) -> Decision:
        return decide(RUNNING, crash(10, "21 of 22"), 2, 1, PROFILE, history(run(*lives, life("", saved=saved))))

    assert after().requeue
    assert after(crashed(11)).requeue
    assert "same place" in after(crashed(10)).gave_up, "the number in the message made it another crash"
    assert "same place" in after(crashed(10), crashed(11)).gave_up
    assert after(crashed(10), saved=7).requeue, "a checkpoint later it is worth another try"
    assert "3 crashes" in after(crashed(11), crashed(12), saved=7).gave_up


def test_a_node_that_was_lost_twice_is_left_out_where_others_remain() -> None:
    put_back = {**CANCELLED, "Restarts": "1"}
    events = run(life("node_lost", nodes=["n2"]), life("hung", nodes=["n1"]), life(""))
    decision = decide(put_back, {}, 2, 143, PROFILE, history(events), 0, ["n2"])
    assert (decision.cause, decision.nodes, decision.requeue) == ("node_lost", ("n2",), True)
    assert excluded_nodes(put_back, decision, history(events), PROFILE, ["n1", "n3", "n4"]) == "n2"
    assert excluded_nodes(put_back, decision, history(events), PROFILE, ["n1", "n2"]) == "", (
        "one node would be left for two"
    )
    again = decide(PREEMPTED, INTERRUPTED, 2, 0, PROFILE, history([*events, *life("node_lost", nodes=["n2"])]))
    assert (
        excluded_nodes(put_back, again, history([*events, *life("node_lost", nodes=["n2"])]), PROFILE, ["n1", "n3"])
        == "n2"
    )
    assert excluded_nodes(put_back, decision, history(events[:1]), PROFILE, ["n1", "n3", "n4"]) == "", "its first loss"


def test_a_hang_names_the_culprits_node() -> None:
    end = {"state": "hung", "cause": "rank 1 on n7: no progress", "culprits": [{"rank": 1, "host": "n7"}]}
    decision = decide(RUNNING, {0: end, 1: end}, 2, 1, PROFILE)
    assert (decision.cause, decision.nodes, decision.requeue) == ("hung", ("n7",), True)


def test_a_lost_rank_is_named() -> None:
    decision = decide(RUNNING, {0: {"state": "lost_peer", "cause": ""}}, 3, 137, PROFILE, down=["n2"])
    assert (decision.cause, decision.why) == ("node_lost", "n2: ranks 1, 2 of 3 ended without a word, exit status 137")


def test_a_second_attempt_does_not_count_the_first_ones_words() -> None:
    requeued = {"event": "requeued", "job": "7"}
    events = [*life("rank_lost", job="7"), requeued, *life("crashed", job="7", fingerprint="ab")]
    assert split_earlier_attempt(events, "7") == (events[:-1], ["crashed"])
    assert split_earlier_attempt([*events, requeued], "7") == ([*events, requeued], []), (
        "the life after it has said nothing"
    )


def test_the_controller_may_be_away_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot ask whether a job was cancelled must neither bring it back nor give it up at once."""
    program, called = tmp_path / "scontrol", tmp_path / "called"
    program.write_text(f"#!/bin/sh\necho x >> {called}\n[ $(wc -l < {called}) -ge 3 ] && echo JobId=7\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(scheduler, "_PAUSES", (0.01,) * 2)
    assert scheduler.own_job("7") == {"JobId": "7"}
    called.unlink()
    assert scheduler.requeue("7") == ""
    program.write_text("#!/bin/sh\necho no controller >&2\nexit 1\n")
    assert scheduler.requeue("7") == "no controller"
    with pytest.raises(RuntimeError, match="no answer"):
        scheduler.own_job("7")

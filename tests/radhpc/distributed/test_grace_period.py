"""What fits into the grace, as arithmetic, and the clock that a signal starts."""

import math
import os
import signal
import time

import pytest
from hypothesis import given, strategies as st

from radhpc.core.run_folder import RunFolder
from radhpc.distributed.grace_period import RESERVE, SAFETY, RecentMaximum, choose
from radhpc.distributed.stop import CAUSES, Interrupted, Stop

seconds = st.floats(0, 1000)


@pytest.mark.parametrize(
    ("left", "here", "in_flight", "new", "plan"),
    [
        (math.inf, False, None, 500.0, "this step"),
        (math.inf, False, 400.0, 500.0, "this step"),
        (28.0, False, None, 11.0, "this step"),
        (28.0, False, 10.0, 11.0, "last snapshot"),
        (12.0, False, 4.0, 11.0, "last snapshot"),
        (5.0, False, 4.0, 11.0, "last checkpoint"),
        (5.0, False, None, 11.0, "last checkpoint"),
        (5.0, True, 4.0, 11.0, "last checkpoint"),
        (28.0, True, 10.0, 20.0, "this step"),
        (-1.0, True, None, 11.0, "this step"),  # it is committed already
        (-1.0, False, None, 0.0, "last checkpoint"),
        (28.0, False, None, 0.0, "this step"),  # nothing measured: it is tried
    ],
)
def test_the_choice(left: float, here: bool, in_flight: float | None, new: float, plan: str) -> None:
    assert choose(left, here, in_flight, new) == plan


@given(seconds, st.booleans(), st.none() | seconds, seconds)
def test_what_is_chosen_fits_and_more_time_never_chooses_less(
    left: float, here: bool, in_flight: float | None, new: float
) -> None:
    order = ["last checkpoint", "last snapshot", "this step"]
    plan = choose(left, here, in_flight, new)
    assert order.index(choose(left + 1, here, in_flight, new)) >= order.index(plan)
    work = (in_flight or 0) + (new if plan == "this step" and not here else 0)
    if plan != "last checkpoint" and not (here and in_flight is None):
        assert SAFETY * work + RESERVE <= left + 1e-6
    if plan == "last snapshot":
        assert in_flight is not None


def test_the_estimate_is_the_longest_of_the_last_few() -> None:
    longest = RecentMaximum([9.0])
    assert RecentMaximum().seconds == 0
    for value in (1, 2, 3, 2):
        longest.add(value)
    assert longest.seconds == 9
    longest.add(1)
    assert longest.seconds == 3


@pytest.fixture
def graces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADHPC_GRACE_SECONDS", "20")
    monkeypatch.setenv("RADHPC_SIGNAL_SECONDS", "120")


def test_the_first_signal_of_a_kind_starts_its_clock(graces: None) -> None:
    with Stop() as stop:
        assert math.isinf(stop.left)
        assert stop.margin is None
        os.kill(os.getpid(), signal.SIGUSR2)
        assert 119 < stop.left <= 120
        os.kill(os.getpid(), signal.SIGTERM)
        assert 19 < stop.left <= 20  # this kill is the surer one
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)  # as SLURM repeats it
        assert stop.left < 19.75
        assert CAUSES[stop.code] == "SIGTERM"


@pytest.mark.parametrize(
    ("had", "left"),
    [
        (3500, 100),  # near the limit of an hour: what is left of it
        (3400, 200),  # SLURM may warn early
        (60, 20),  # far from it: a preemption, of which SLURM was told to warn by this signal
        (3590, 20),  # SIGTERM is about to follow, and the grace after it
        (-7200, 20),  # the clock was set back
        (9000, 20),
    ],
)
def test_what_is_left_after_the_warning(graces: None, monkeypatch: pytest.MonkeyPatch, had: int, left: int) -> None:
    monkeypatch.setenv("RADHPC_LIMIT_SECONDS", "3600")
    monkeypatch.setenv("RADHPC_JOB_STARTED", str(int(time.time()) - had))
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert left - 1.5 < stop.left <= left


def test_ctrl_c_and_a_request_have_no_deadline(graces: None, tmp_path: object) -> None:
    run = RunFolder(str(tmp_path))
    with Stop(run, poll_seconds=0) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert math.isinf(stop.left)
        run.request_stop()
        with pytest.raises(Interrupted, match="stop"):
            stop.check(list)
        assert math.isinf(stop.left)


def test_without_a_scheduler_nobody_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RADHPC_GRACE_SECONDS", raising=False)
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert math.isinf(stop.left)
        assert stop.waited > 0


def test_the_profile_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    from slurm.profile import load
    from slurm.submit import profile_environment

    monkeypatch.delenv("RADHPC_GRACE_SECONDS", raising=False)
    with profile_environment(load("box")):
        assert float(os.environ["RADHPC_GRACE_SECONDS"]) == 20
        assert float(os.environ["RADHPC_SIGNAL_SECONDS"]) == 60
        assert float(os.environ["RADHPC_LIMIT_SECONDS"]) == 3600
    with profile_environment(load("local")):
        assert "RADHPC_GRACE_SECONDS" not in os.environ

"""Where a run's time went: every second of every life goes into exactly one account."""

from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from slurm.monitoring.goodput import account, lives, restarts

Row = dict[str, Any]


def row(at: float, event: str, **details: Any) -> Row:
    return {"time": datetime.fromtimestamp(1_700_000_000 + at, UTC).isoformat(), "event": event, **details}


def life(at: float, world: int = 2, resumed: int | None = None) -> list[Row]:
    """A start-up of ten seconds."""
    rows = [row(at, "started", world=world, job="7")]
    rows += [] if resumed is None else [row(at + 2, "resumed", step=resumed)]
    return [*rows, row(at + 10, "first_step", step=(resumed or 0) + 1, seconds=1.0)]


def test_an_undisturbed_run_loses_its_start_up_alone() -> None:
    rows = [
        row(0, "submitted", job="7"),
        *life(100),
        row(131, "saved", step=20, seconds=1.0),
        row(141, "evaluated", step=20, seconds=10.0),
        row(162, "saved", step=40, seconds=1.0),
        row(162, "stage_finished", stage="adapt", number=0, step=40),
        row(163, "finished", step=40),
    ]
    found = account(rows)
    assert found.lost == 2 * 10
    assert found.useful == 2 * (20 + 20)
    assert found.overhead == 2 * (1 + 10 + 1 + 1)
    assert found.used == 2 * 63
    assert found.goodput == pytest.approx(40 / 63)
    assert not restarts(rows)


def test_libraries_that_load_before_the_ranks_meet_are_start_up() -> None:
    rows = [row(50, "starting", world=2, job="7"), *life(100, world=4), row(131, "saved", step=20, seconds=1.0)]
    (one,) = lives(rows)
    assert (one.world, one.seconds) == (4, 81)
    assert account(rows).lost == 4 * 60


def test_steps_that_are_made_again_are_lost_and_causes_are_counted() -> None:
    rows = [
        *life(0),
        row(31, "saved", step=20, seconds=1.0),
        row(46, "rank_lost", step=0),
        row(46, "requeued", cause="rank_lost"),
        *life(100, 4, resumed=20),
        row(131, "saved", step=40, seconds=1.0),
        row(132, "interrupted", cause="SIGTERM", step=40),
        row(132, "preempted", step=40),
        row(132, "requeued", cause="preempted"),
        *life(200, 4, resumed=40),
        row(221, "saved", step=50, seconds=1.0),
        row(221, "cancelled", step=50),
    ]
    found = account(rows)
    assert found.lost == 2 * (10 + 15) + 4 * 10 + 4 * 10
    assert found.useful == 2 * 20 + 4 * 20 + 4 * 10
    assert found.overhead == 2 * 1 + 4 * (1 + 1) + 4 * 1  # saves, and the second from one to the way out
    assert restarts(rows) == {"rank_lost": 1, "preempted": 1}


def test_what_is_recorded_after_a_requeue_does_not_undo_it() -> None:
    rows = [*life(0), row(20, "node_lost"), row(21, "requeued", cause="node_lost"), row(22, "excluded", nodes=["n1"])]
    assert restarts(rows) == {"node_lost": 1}
    assert restarts([*rows, row(23, "failed", why="scontrol requeue: refused")]) == {}


def test_a_fall_back_to_an_older_checkpoint_undoes_what_counted() -> None:
    rows = [*life(0), row(21, "saved", step=10, seconds=1.0), row(32, "saved", step=20, seconds=1.0)]
    before = account(rows)
    after = account([*rows, row(40, "submitted", job="8"), *life(50, resumed=10)])
    assert before.useful == 2 * 20
    assert after.useful == 2 * 10
    assert after.lost == before.lost + 2 * 10 + 2 * 10


def test_an_asynchronous_save_holds_the_steps_before_its_snapshot() -> None:
    saved = row(60, "saved", step=10, seconds=30.0, blocked_seconds=1.0)
    rows = [*life(0), saved, row(70, "rank_lost"), row(70, "requeued")]
    found = account(rows)
    assert found.useful == 2 * 20
    assert found.overhead == 2 * 1
    assert found.lost == 2 * (10 + 39)  # what was made while it was written, and after


def test_a_living_run_counts_until_now_and_an_unseen_end_until_its_last_event() -> None:
    rows = [*life(0), row(20, "saved", step=10, seconds=0.0)]
    assert account(rows).used == 2 * 20
    assert account(rows, 1_700_000_050.0).used == 2 * 50
    assert account(rows, 1_700_000_050.0).useful == 2 * 40
    # In the queue again: the life before it is over.
    assert account([*rows, row(20, "submitted")], 1_700_000_050.0).used == 2 * 20
    # The same job started again, and nobody recorded why: a node that went down.
    assert restarts([*rows, *life(100, resumed=10)]) == {"unknown": 1}
    assert account([]).goodput is None


ROWS = st.lists(
    st.one_of(
        st.builds(lambda world: ("started", {"world": world, "job": "7"}), st.integers(1, 8)),
        st.just(("starting", {"world": 3, "job": "7"})),
        st.builds(lambda step: ("resumed", {"step": step}), st.integers(0, 50)),
        st.builds(lambda step: ("first_step", {"step": step, "seconds": 1.0}), st.integers(0, 50)),
        st.builds(
            lambda step, took, part: ("saved", {"step": step, "seconds": took, "blocked_seconds": took * part}),
            st.integers(0, 50), st.floats(0, 1000), st.floats(0, 1),
        ),
        st.builds(lambda took: ("evaluated", {"step": 1, "seconds": took}), st.floats(0, 1000)),
        st.sampled_from([(name, {}) for name in (
            "submitted", "stage_finished", "interrupted", "preempted", "requeued", "rank_lost", "finished", "straggler",
        )]),
    ),
    max_size=40,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    rows=ROWS,
    steps=st.lists(st.floats(-50, 500), min_size=40, max_size=40),
    living=st.booleans(),
    ahead=st.floats(0, 99),
)
def test_the_accounts_hold_for_any_events(
    rows: list[tuple[str, Row]], steps: list[float], living: bool, ahead: float
) -> None:
    """Whatever happened, in whatever order, even with a clock that was set back now and then."""
    at, events = 0.0, []
    for (name, details), step in zip(rows, steps, strict=False):
        at += step
        events.append(row(at, name, **details))
    now = 1_700_000_000 + at + ahead if living else None
    found, begun = account(events, now), lives(events, now)
    assert found.used == pytest.approx(sum(one.world * one.seconds for one in begun), abs=1e-3)
    assert min(found.useful, found.lost, found.overhead) >= 0
    assert found.goodput is None or 0 <= found.goodput <= 1
    counts = Counter(event["event"] for event in events)
    assert max(counts["started"], counts["starting"]) <= len(begun) <= counts["started"] + counts["starting"]
    assert sum(restarts(events).values()) <= len(begun)

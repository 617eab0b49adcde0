"""The protocol of a run is closed: its words stand in one module, all are used, and on disk they never change."""

import ast
import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path

import pytest

import radhpc
import slurm
from radhpc.core import protocol
from radhpc.core.protocol import LIFE_ENDS, REQUEUE_VERDICTS, Cause, Event, Outcome, OutcomeState, RunState
from radhpc.core.run_folder import RunFolder

ENUMS: tuple[type[StrEnum], ...] = (Event, RunState, OutcomeState, Cause)
# What stands in the folders of runs that were trained by commit a0139ea and later.
ON_DISK = {
    Event: "submitted started resumed skipped_checkpoint saved stage_finished evaluated quarantined interrupted "
    "preempted requeued rank_lost time_limit cancelled stopped crashed failed node_lost hung gave_up excluded finished "
    "starting first_step stuck straggler compiled code_replaced environment_changed engine_changed pruned taken_over "
    "profiled neighbours",
    OutcomeState: "finished interrupted mistake pruned lost_peer crashed hung superseded",
    RunState: "pending running finished stopped failed pruned missing",
}
# Words of other protocols that happen to be the same: (file, word).
OTHERS = {
    ("radhpc/probe.py", "started"),  # the lines of `doctor --probe`
    ("radhpc/probe.py", "failed"),
    ("slurm/preflight/probe.py", "started"),
    ("slurm/preflight/probe.py", "failed"),
    ("slurm/preflight/probe.py", "SIGTERM"),
    ("slurm/preflight/probe.py", "SIGUSR2"),
    ("slurm/box.py", "started"),  # a key of `python -m slurm.box`
    ("radhpc/core/run_folder.py", "stop"),  # the request's file
    ("radhpc/training/compilation.py", "compiled"),  # a folder
    ("radhpc/data/audit.py", "quarantined"),  # keys of `status --audit --json`
    ("radhpc/serving/demo.py", "neighbours"),
    ("slurm/monitoring/tables.py", "quarantined"),
    ("slurm/monitoring/tables.py", "neighbours"),
    ("radhpc/data/retrieval.py", "neighbours"),  # names a stream of random numbers
    ("radhpc/distributed/watchdog.py", "starting"),  # the first phase of a heartbeat
}


def sources() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the product but the protocol itself."""
    for package in (radhpc, slurm):
        folder = Path(package.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            if path != Path(protocol.__file__):
                yield path.relative_to(folder.parent).as_posix(), ast.parse(path.read_text())


def test_events_are_recorded_and_asked_for_by_their_members() -> None:
    literal = [
        f"{name}:{node.lineno}"
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
        if (node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id) in ("record", "events", "event")
        if any(isinstance(argument, ast.Constant) and isinstance(argument.value, str) for argument in node.args[:2])
    ]
    assert not literal


def test_no_word_of_the_protocol_is_written_elsewhere() -> None:
    words = {member.value for enum in (Event, OutcomeState, Cause) for member in enum} - {""}
    found = {
        (name, node.value)
        for name, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words
    }
    assert found <= OTHERS, found - OTHERS
    assert found >= OTHERS, "the list of exceptions only shrinks"


@pytest.mark.parametrize("enum", ENUMS, ids=lambda enum: enum.__name__)
def test_every_member_is_used(enum: type[StrEnum]) -> None:
    used = {
        node.attr
        for _, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == enum.__name__
    }
    assert used == set(enum.__members__)


@pytest.mark.parametrize(("enum", "words"), ON_DISK.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_words_on_disk_stay(enum: type[StrEnum], words: str) -> None:
    assert {member.value for member in enum} == set(words.split())


def test_every_end_of_a_life_has_a_state() -> None:
    assert set(REQUEUE_VERDICTS) < set(LIFE_ENDS)
    assert LIFE_ENDS.get("preempted") == "stopped", "a word read from a file finds its member"  # type: ignore[call-overload]


def test_an_unknown_event_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="renamed"):
        RunFolder(tmp_path).record("renamed")  # type: ignore[arg-type]
    assert not (tmp_path / "events.jsonl").exists()


def test_an_end_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.record_end(3, Outcome(OutcomeState.INTERRUPTED, Cause.SIGTERM, 40))
    assert list(run.end_paths()) == [3]
    assert run.end_path(3) == tmp_path / "logs" / "end.rank-00003.json"
    end = json.loads(run.end_path(3).read_text())
    assert end.pop("host")
    assert list(end.items()) == [
        ("state", "interrupted"), ("cause", "SIGTERM"), ("step", 40), ("traceback", ""), ("culprits", []),
        ("life", ""),
    ]  # fmt: skip

"""The board of a run with several lives, whatever the clocks of their nodes said."""

import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.board import Board
from tests.waiting import wait_for


def life(folder: Path, resumed_at: int, steps: range) -> Path:
    """Write the curve of one life; returns its file."""
    board = Board(folder, resumed_at)
    for step in steps:
        board.scalars(step, {"train/loss": 100.0 - step})
    board.close()
    return max(folder.iterdir())


def shown(folder: Path) -> list[int]:
    """The steps that TensorBoard shows, in its order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [point.step for point in accumulator.Scalars("train/loss")]


@pytest.mark.parametrize("ahead", [7200, -7200, 0])
def test_no_step_is_shown_twice_after_the_clock_was_moved(tmp_path: Path, ahead: int) -> None:
    """Three lives, each going back to a checkpoint before the end of the last; the first two ran by another clock."""
    for number, (resumed_at, steps) in enumerate(((0, range(1, 9)), (5, range(6, 12)))):
        path = life(tmp_path, resumed_at, steps)
        words = path.name.split(".")  # events.out.tfevents.TIME.HOST...
        words[3] = f"{int(words[3]) + ahead + number:010d}"  # that clock, too, went on between the two
        path.rename(tmp_path / ".".join(words))
    life(tmp_path, 8, range(9, 15))
    assert shown(tmp_path) == list(range(1, 15))


def test_a_life_keeps_its_name_while_the_clock_goes_on(tmp_path: Path) -> None:
    """Somebody may be watching it."""
    first = life(tmp_path, 0, range(1, 4))
    earlier = first.rename(first.with_name(first.name.replace("tfevents.1", "tfevents.0", 1)))
    life(tmp_path, 3, range(4, 6))
    assert earlier.exists()
    assert shown(tmp_path) == [1, 2, 3, 4, 5]


def sent(path: Path) -> Iterator[Any]:
    """The records of an offline file of Weights & Biases: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (room := -at % (1 << 15)) < 7 and room:
            at += room
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # all of a record, or its end
            yield Record.FromString(whole)
            whole = b""


def has_ended(path: Path) -> bool:
    return "exit" in [record.WhichOneof("record_type") for record in sent(path)]


def test_curves_for_weights_and_biases_are_written_offline_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read from the offline folder as `wandb sync` reads it; a second life is a second run of the same group."""
    pytest.importorskip("wandb", reason="wandb is not installed: see docs/offline.md, Extras")
    from radhpc.core.board import WandbCurves
    from radhpc.core.recipe import WandbSettings

    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    settings, run = WandbSettings(project="ablation"), tmp_path / "night"  # type: ignore[call-arg]
    run.mkdir()
    for number, steps in ((1, range(1, 4)), (2, range(3, 6))):
        board = Board(None, steps[0] - 1, WandbCurves(settings, run, number))
        for step in steps:
            board.scalars(step, {"train/loss": 100.0 - step})
        board.text(steps[-1], "evaluation/table", "No effusion of the patient.")
        board.scalars(steps[0], {"checkpoint/save_seconds": 0.5})  # one that ended late
        board.close()
    found = {}
    for path in sorted(run.glob("wandb/offline-run-*/run-*.wandb")):
        wait_for(partial(has_ended, path), 30)  # its own process writes the end
        records = list(sent(path))
        about = next(record.run for record in records if record.WhichOneof("record_type") == "run")
        assert (about.project, about.run_group, about.host) == ("ablation", "night", "-")
        rows = [
            {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            for record in records
            if record.WhichOneof("record_type") == "history"
        ]
        found[about.display_name] = [(float(row["step"]), row.get("train/loss")) for row in rows]
        assert [file.suffix for file in path.parent.rglob("*") if file.is_file() and file.suffix != ".log"] == [
            ".wandb"
        ]
        assert b"effusion" not in path.read_bytes()
        assert Path(__file__).name.encode() not in path.read_bytes(), "nor the program"
    assert found == {
        "night-life-1": [(1, "99"), (2, "98"), (3, "97"), (1, None)],
        "night-life-2": [(3, "97"), (4, "96"), (5, "95"), (3, None)],
    }

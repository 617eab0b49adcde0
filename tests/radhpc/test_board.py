"""The board of a run with several lives, whatever the clocks of their nodes said."""

from pathlib import Path

import pytest

from radhpc.board import Board


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

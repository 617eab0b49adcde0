"""A lock is held by one at a time, whoever is killed and wherever."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from radhpc.core.errors import UserError
from radhpc.core.ownership import folder_lock
from radhpc.core.ownership.folder_lock import Holder, beside, hold

pytestmark = pytest.mark.timeout(60)
FORK = multiprocessing.get_context("fork")
_CALLS = ("link", "unlink", "open", "write", "fsync", "utime", "stat", "close")


def _die_at(call: int) -> None:
    """Let this process die at one of its calls of the system, before it is made or after, by turns."""
    left = [call // 2]

    def patched(real: Any) -> Any:
        def call_or_die(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0 and not call % 2:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*arguments, **options)
            finally:
                if left[0] < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call_or_die

    for name in _CALLS:
        setattr(os, name, patched(getattr(os, name)))


def _child(function: Any, *arguments: Any) -> int:
    process = FORK.Process(target=function, args=arguments)
    process.start()
    process.join(30)
    assert process.exitcode is not None, "it waits for ever"
    return process.exitcode


def _killed_within(path: Path, call: int) -> None:
    _die_at(call)
    with hold(path, "the first", patience=5):
        pass
    os._exit(0)


def _die_holding(path: Path) -> None:
    with hold(path, "the dead", patience=5):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("dead", [False, True], ids=["free", "left by a dead owner"])
def test_the_lock_is_free_again_wherever_its_owner_is_killed(tmp_path: Path, dead: bool) -> None:
    path, call, survived = tmp_path / "lock", 0, False
    while not survived:
        if dead:
            _child(_die_holding, path)
        survived = _child(_killed_within, path, call) == 0
        with hold(path, "the next", patience=5) as lock:
            assert lock.held
        assert not path.exists()
        call += 1
    assert call > 10


def _work(path: Path, place: Path, seed: int, rounds: int) -> None:
    chance = random.Random(seed)
    if seed % 2:
        _die_at(chance.randrange(400))  # while it waits, or takes a dead one's lock, or gives back its own
    for _ in range(rounds):
        with hold(path, f"worker {seed}", patience=40):
            inside = place / f"inside-{os.getpid()}"
            inside.touch()
            others = [
                name for name in os.listdir(place)
                if name.startswith("inside-") and name != inside.name and _lives(int(name[7:]))
            ]  # fmt: skip
            if others:
                (place / "two").write_text(f"{others} beside {inside.name}")
            time.sleep(chance.random() * 0.004)
            if chance.random() < 0.3:
                os.kill(os.getpid(), signal.SIGKILL)
            inside.unlink()
    os._exit(0)


def _lives(pid: int) -> bool:
    return folder_lock.started_at(pid) is not None


def test_never_two_though_owners_die_all_the_time(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    workers = [FORK.Process(target=_work, args=(path, tmp_path, seed, 6)) for seed in range(12)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(50)
        assert worker.exitcode is not None, "it waits for ever"
    assert not (tmp_path / "two").exists(), (tmp_path / "two").read_text()
    with hold(path, "the last", patience=5):
        pass


def test_who_comes_second_is_told_who_is_at_work(tmp_path: Path) -> None:
    second = hold(tmp_path / "lock", "train")
    told = pytest.raises(UserError, match=r"'resume' \(process \d+ on \S+\) is at work here")
    with hold(tmp_path / "lock", "resume"), told as caught, second:
        pass
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_one_that_is_not_there_yet_has_a_lock_beside_it(tmp_path: Path) -> None:
    place = beside(tmp_path / "new" / "out")
    with hold(place, "export"), pytest.raises(UserError, match="'export'"), hold(place, "index"):
        pass
    assert os.listdir(tmp_path / "new") == []


def _other_host(path: Path, age: float) -> Holder:
    holder = Holder("0" * 16, "train", "elsewhere", "boot/pid", 1, "1", 0.0)
    path.write_text(json.dumps(holder.__dict__))
    os.utime(path, (time.time() - age,) * 2)
    return holder


def test_an_owner_on_another_node_is_dead_when_it_is_silent_for_long(tmp_path: Path) -> None:
    _other_host(tmp_path / "lock", folder_lock.STALE - 30)
    with pytest.raises(UserError, match="on elsewhere"), hold(tmp_path / "lock", "resume"):
        pass
    _other_host(tmp_path / "lock", folder_lock.STALE + 30)
    with hold(tmp_path / "lock", "resume") as lock:
        assert lock.held


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"{}", b'{"token": 1}'], ids=["empty", "zeros", "no key", "one"])
def test_a_lock_that_a_power_cut_left_empty_is_no_lock_for_ever(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "lock"
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"), hold(path, "resume"):
        pass
    os.utime(path, (time.time() - folder_lock.STALE - 30,) * 2)
    with hold(path, "resume") as lock:
        assert lock.held


def test_a_living_owner_touches_its_lock_and_one_that_was_given_up_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "REFRESH", 0.05)
    path = tmp_path / "lock"
    with hold(path, "build") as lock:
        os.utime(path, (0, 0))
        until = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.02)
        assert time.time() - path.stat().st_mtime < 10
        path.unlink()
        theirs = _other_host(path, 0)
        assert not lock.held
    assert folder_lock._read(path) == theirs  # it is not ours to remove


def test_a_link_whose_answer_was_lost_is_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def lost(source: Any, name: Any) -> None:
        with contextlib.suppress(FileExistsError):
            real(source, name)
        raise FileExistsError(17, "File exists", str(name))

    monkeypatch.setattr(os, "link", lost)
    with hold(tmp_path / "lock", "resume") as lock:
        assert lock.held

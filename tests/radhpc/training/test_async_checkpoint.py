"""Saves in the background and what the grace allows: real runs of one rank or two, on a disk that is made slow."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from radhpc import worker
from radhpc.core.errors import UserError
from radhpc.core.files import read_lines
from radhpc.core.ledger import Ledger, read_ledger
from radhpc.core.recipe import load
from radhpc.core.run_folder import RunFolder
from radhpc.distributed.grace_period import RESERVE
from radhpc.engine.checkpoint import Checkpoints
from radhpc.storage.checkpoint_storage import FolderStorage, ObjectStorage
from radhpc.storage.store import Store
from tests.conftest import ROOT, TINY_RECIPE, free_port
from tests.radhpc.training.slow_rank import SlowFolder
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(120)

STEPS, EVERY = 12, 4
ONE_STAGE = TINY_RECIPE.split("  - name: adapt")[0].replace("steps: 6", f"steps: {STEPS}") + (
    "checkpoint: {{every: 4, keep: 20}}\nevaluation: {{samples: 2, batch: 1, max_new_tokens: 2, images: 1}}\n"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The sums of these runs do not depend on which process computes them."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowFolder]:
    """All checkpoints of this test are written slowly."""
    monkeypatch.setattr("radhpc.engine.checkpoint.FolderStorage", SlowFolder)
    monkeypatch.setattr(SlowFolder, "spans", [])
    return SlowFolder


@pytest.fixture
def new_run(tmp_path: Path, phantom_shards: Path) -> Callable[..., RunFolder]:
    """A frozen run of one stage."""

    def create(*changes: str, name: str = "run") -> RunFolder:
        path = tmp_path / "one.yaml"
        path.write_text(ONE_STAGE.format(shards=phantom_shards))
        return RunFolder.create(tmp_path / name, load(path, changes))

    return create


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "one.yaml").write_text(ONE_STAGE.format(shards=phantom_shards))
    run = RunFolder.create(folder / "run", load(folder / "one.yaml", ["checkpoint.asynchronous=false"]))
    assert worker.run(str(run.path)).state == "finished"
    return run.path


def state(run: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(run / f"checkpoints/step-{step:06d}/state.safetensors")
    return tensors


def assert_equal(run: Path, undisturbed: Path) -> None:
    ours, theirs = state(run), state(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert read_ledger(run / "ledger").steps == read_ledger(undisturbed / "ledger").steps


def at_step(monkeypatch: pytest.MonkeyPatch, wanted_step: int, act: Callable[[], object]) -> None:
    """Do something right after a step was trained, before its hooks."""
    before = Ledger.append

    def append(self: Ledger, stage: int, step: int, keys: list[str], bad: list[tuple[str, str]]) -> None:
        before(self, stage, step, keys, bad)
        if step == wanted_step:
            act()

    monkeypatch.setattr(Ledger, "append", append)


def preempt() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def events(run: RunFolder, name: Any) -> list[dict[str, Any]]:
    return run.events(name)


def test_steps_wait_for_the_copy_alone(
    new_run: Callable[..., RunFolder], slow: type[SlowFolder], undisturbed: Path
) -> None:
    run = new_run()
    assert worker.run(str(run.path)).state == "finished"
    first, *_ = events(run, "saved")
    assert [event["step"] for event in events(run, "saved")] == [4, 8, 12]
    assert first["copy_seconds"] <= first["blocked_seconds"] < 0.3 * first["seconds"], first
    assert first["seconds"] > slow.seconds
    assert_equal(run.path, undisturbed)


def test_two_saves_never_overlap_and_none_is_left_out(
    new_run: Callable[..., RunFolder], slow: type[SlowFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run("checkpoint.every=1", "stages.scratch.steps=3")
    assert worker.run(str(run.path)).state == "finished"
    assert [event["step"] for event in events(run, "saved")] == [1, 2, 3]
    assert len(slow.spans) == 3
    assert all(end <= begin for (_, end), (begin, _) in zip(slow.spans, slow.spans[1:], strict=False))
    waited = [event["blocked_seconds"] - event["copy_seconds"] for event in events(run, "saved")]
    assert max(waited) > 0.1, "no save had to wait for the one before: nothing was tested"


def ranks(run: RunFolder, seconds: float, world: int, **environment: str) -> list[subprocess.Popen[str]]:
    """The ranks of a run on a slow disk, each a process of its own."""
    port = str(free_port())
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.radhpc.training.slow_rank", run.path, str(seconds)],
            cwd=ROOT,
            env={**os.environ, **shared, "GLOO_SOCKET_IFNAME": "lo", "RANK": str(rank), **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


def wait_while_running(condition: Callable[[], bool], processes: list[subprocess.Popen[str]]) -> None:
    def holds() -> bool:
        if condition():
            return True
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        return False

    wait_for(holds, 60)


def unfinished(run: RunFolder, step: int) -> list[Path]:
    """Return the tensors of a save that is being written."""
    return list((run.path / "checkpoints").glob(f".step-{step:06d}.*.writing/state.safetensors"))


def test_a_kill_while_a_save_is_written_leaves_the_one_before(
    new_run: Callable[..., RunFolder], undisturbed: Path
) -> None:
    run = new_run()
    (process,) = ranks(run, 1.0, 1)
    try:
        wait_while_running(lambda: any(path.stat().st_size for path in unfinished(run, 8)), [process])
    finally:
        process.kill()
        process.communicate()
    assert unfinished(run, 8), "the save had ended before the kill: nothing was tested"
    assert Checkpoints(FolderStorage(run.path / "checkpoints")).newest() == ("step-000004", [])
    assert worker.run(str(run.path)).state == "finished"
    assert [event["step"] for event in events(run, "resumed")] == [4]
    assert_equal(run.path, undisturbed)
    assert not unfinished(run, 8)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to mount a small file system")
def test_a_full_disk_ends_all_ranks_in_one_line_at_the_next_step(
    new_run: Callable[..., RunFolder], undisturbed: Path
) -> None:
    """The disk holds one checkpoint and a half."""
    run = new_run("checkpoint.every=2")
    size = sum(file.stat().st_size for file in (undisturbed / f"checkpoints/step-{STEPS:06d}").iterdir())
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size * 3 // 2}", "tmpfs", run.path / "checkpoints"], check=True
    )
    try:
        processes = ranks(run, 0.0, 2)
        messages = [process.communicate(timeout=90)[1].strip().splitlines()[-1] for process in processes]
        assert messages[0] == messages[1]
        assert (
            "step-000004: the checkpoint could not be written: No space left on device; free some space" in messages[0]
        )
        ends = [json.loads(path.read_text()) for path in sorted((run.path / "logs").glob("end.rank-*.json"))]
        assert [end["state"] for end in ends] == ["mistake", "mistake"]
        assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000002"]
    finally:
        for process in processes:
            process.kill()
            process.wait()
        subprocess.run(["umount", run.path / "checkpoints"], check=True)


@pytest.mark.parametrize(
    ("grace", "step", "planned", "committed"),
    [
        (60.0, 7, "this step", 7),
        (RESERVE + 0.4, 7, "last checkpoint", 4),  # the save of step 4 has taken a second
        (RESERVE + 1.9, 9, "last snapshot", 8),  # that of step 8 is in flight and can land; one more cannot
        (RESERVE - 1, 9, "last checkpoint", 4),  # the one in flight cannot land
    ],
)
def test_what_the_grace_allows_is_committed(
    new_run: Callable[..., RunFolder],
    slow: type[SlowFolder],
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    grace: float,
    step: int,
    planned: str,
    committed: int,
) -> None:
    monkeypatch.setenv("RADHPC_GRACE_SECONDS", str(grace))
    run = new_run()

    with monkeypatch.context() as patched:
        at_step(patched, 6, lambda: wait_for(lambda: events(run, "saved"), 30))
        at_step(patched, step, preempt)
        outcome = worker.run(str(run.path))
    assert (outcome.state, outcome.cause, outcome.step) == ("interrupted", "SIGTERM", step)
    (event,) = events(run, "interrupted")
    assert (event["planned"], event["committed_step"], event["step"]) == (planned, committed, step)
    assert grace - 10 < event["margin_seconds"] < grace
    if planned != "last checkpoint":
        assert event["margin_seconds"] > RESERVE - 0.3
    assert Checkpoints(FolderStorage(run.path / "checkpoints")).newest() == (f"step-{committed:06d}", [])
    assert not list((run.path / "checkpoints").glob(".*")), "something half written is left"
    monkeypatch.setattr(slow, "seconds", 0.0)
    assert worker.run(str(run.path)).state == "finished"
    assert events(run, "resumed")[0]["step"] == committed
    assert_equal(run.path, undisturbed)
    assert sorted(read_ledger(run.path / "ledger").replayed) == list(range(committed + 1, step + 1))


def test_a_save_that_turns_out_too_slow_is_dropped_in_time(
    new_run: Callable[..., RunFolder], slow: type[SlowFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing was measured yet, so it is tried, and given up before the kill."""
    monkeypatch.setenv("RADHPC_GRACE_SECONDS", str(RESERVE + 1))
    monkeypatch.setattr(slow, "seconds", 30.0)
    run = new_run()
    at_step(monkeypatch, 3, preempt)
    assert worker.run(str(run.path)).state == "interrupted"
    (event,) = events(run, "interrupted")
    assert (event["planned"], event["committed_step"]) == ("this step", None)
    assert event["margin_seconds"] > RESERVE - 1
    assert list((run.path / "checkpoints").iterdir()) == []


def test_one_rank_is_told_and_both_leave_together(new_run: Callable[..., RunFolder]) -> None:
    """With a save of step 4 in flight for which the grace of rank 1 is too short."""
    run = new_run("stages.scratch.steps=100000")
    processes = ranks(run, 60.0, 2, RADHPC_GRACE_SECONDS=str(RESERVE + 1))
    try:
        wait_while_running(lambda: unfinished(run, 4), processes)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            process.communicate(timeout=30)
            assert process.returncode == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    (event,) = events(run, "interrupted")
    assert event["committed_step"] is None
    assert 0 < event["margin_seconds"] < RESERVE + 1
    ends = [json.loads(path.read_text()) for path in sorted((run.path / "logs").glob("end.rank-*.json"))]
    assert [(end["state"], end["cause"]) for end in ends] == [("interrupted", "SIGTERM")] * 2
    assert list((run.path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "where",
    [
        "radhpc.data.source.Source.__init__",
        "radhpc.data.source.Source.check_sizes",
        "radhpc.models.tokenizer.train",
        "radhpc.models.families.mllama.MllamaFamily.build",
        "radhpc.training.base_hash._hash_tensors",
        "radhpc.data.stream.Stream._assemble",
        "radhpc.evaluation.evaluate._read",
        "radhpc.evaluation.evaluate.score",
    ],
)
def test_a_signal_in_long_work_is_heard_before_the_work_is_done(
    new_run: Callable[..., RunFolder], undisturbed: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    run, left = new_run(), threading.Event()
    with monkeypatch.context() as patched:

        def long(*_: Any, **__: Any) -> None:
            preempt()
            left.wait(3)  # the work outlasts the life, or takes longer than the life may take to end
            raise RuntimeError("abandoned")

        patched.setattr(where, long)
        outcome = worker.run(str(run.path))
    left.set()
    assert (outcome.state, outcome.cause) == ("interrupted", "SIGTERM")
    (event,) = events(run, "interrupted")
    assert (event["cause"], event["committed_step"]) == ("SIGTERM", outcome.step or event["committed_step"])
    assert event["waited_seconds"] < 1.5
    if where.startswith("radhpc.evaluation.evaluate"):
        assert worker.run(str(run.path)).state == "finished"
        assert_equal(run.path, undisturbed)
        assert (run.path / f"evaluation/step-{STEPS:06d}/scores.json").exists()


def test_a_signal_between_two_micro_batches_keeps_the_step_before(
    new_run: Callable[..., RunFolder], undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radhpc.engine.objective import NextToken

    run, calls, before = new_run(), [0], NextToken.__call__

    def told_in_the_middle(self: NextToken, *arguments: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 3 * 5 + 2:  # the second of three micro-batches of step 6
            preempt()
        return before(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(NextToken, "__call__", told_in_the_middle)
        outcome = worker.run(str(run.path))
    assert (outcome.state, outcome.step) == ("interrupted", 5)
    assert events(run, "interrupted")[0]["committed_step"] == 5
    assert worker.run(str(run.path)).state == "finished"
    assert_equal(run.path, undisturbed)
    assert not read_ledger(run.path / "ledger").replayed


def test_resume_says_where_it_goes_on_before_it_submits(
    new_run: Callable[..., RunFolder], undisturbed: Path, tmp_path: Path, launch_json: Callable[..., dict[str, Any]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    lines = [line for line in read_lines(run / "events.jsonl") if line["event"] != "finished"]
    (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.rmtree(run / "evaluation")
    file = run / f"checkpoints/step-{STEPS:06d}/cursor.json"
    file.write_bytes(file.read_bytes().replace(b'"samples": 72', b'"samples": 73'))
    result = launch_json("resume", run)
    assert result["checkpoint"] == "step-000008"
    assert result["skipped"] == [{"checkpoint": "step-000012", "fault": "cursor.json: checksum differs"}]
    assert_equal(run, undisturbed)


def test_a_run_whose_checkpoints_lie_in_an_object_store(
    new_run: Callable[..., RunFolder], undisturbed: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted, its newest checkpoint damaged, resumed; and a run of the same name does not take it for its own."""
    url = f"checkpoint.url={s3}"
    run = new_run(url)
    with monkeypatch.context() as patched:
        at_step(patched, 9, preempt)
        assert worker.run(str(run.path)).state == "interrupted"
    assert list((run.path / "checkpoints").iterdir()) == []
    checkpoints = Checkpoints(ObjectStorage(f"{s3}/run"))
    assert checkpoints.newest() == ("step-000009", [])
    Store(f"{s3}/run").delete("step-000009/COMMITTED")
    assert worker.run(str(run.path)).state == "finished"
    assert [event["name"] for event in events(run, "skipped_checkpoint")] == ["step-000009"]
    assert [event["step"] for event in events(run, "resumed")] == [8]
    ours, theirs = checkpoints.tensors("step-000012", moments=True), state(undisturbed)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    run.path.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="run/step-000012: a checkpoint of another run lies where this one will write"):
        worker.run(str(new_run(url).path))


def test_a_bug_in_the_background_is_not_lost(
    new_run: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Checkpoints, "save", broken)
    run = new_run()
    with pytest.raises(ZeroDivisionError):
        worker.run(str(run.path))
    (end,) = [json.loads(path.read_text()) for path in (run.path / "logs").glob("end.rank-*.json")]
    assert (end["state"], end["cause"]) == ("crashed", "a bug")


def test_an_impossible_url_is_refused(new_run: Callable[..., RunFolder]) -> None:
    with pytest.raises(UserError, match="checkpoint.url.*allowed are URLs"):
        new_run("checkpoint.url=bucket/prefix")

"""Whole runs from the command line: resume bit for bit, any number of ranks, the audit, bad input."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bench.chaos import losses
from radhpc.core.files import read_lines
from radhpc.core.ledger import read_ledger
from radhpc.core.run_folder import RunFolder
from tests.conftest import ROOT, free_port
from tests.waiting import wait_for

Launch = Callable[..., subprocess.CompletedProcess[str]]
LaunchJson = Callable[..., dict[str, Any]]
Start = Callable[[Path, int], list[ForkServerProcess]]
pytestmark = pytest.mark.heavy

STAGES = {"scratch": 6, "adapt": 9, "refine": 14}  # steps: the adapters see 50 samples once, by six
STEPS = sum(STAGES.values())
LAST = f"checkpoints/step-{STEPS:06d}/state.safetensors"


def events(run: Path) -> list[str]:
    return [event["event"] for event in read_lines(run / "events.jsonl")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """An uninterrupted run on two ranks."""
    from tests.conftest import TINY_RECIPE

    folder = tmp_path_factory.mktemp("reference")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(shards=phantom_shards))
    arguments = ["train", folder / "tiny.yaml", "--on", "local", "--run", folder / "run", "--watch"]
    subprocess.run([os.sys.executable, ROOT / "launch.py", *map(str, arguments)], cwd=ROOT, check=True, timeout=240)
    return folder / "run"


def test_a_run_ends_with_all_that_it_promises(reference: Path, launch_json: LaunchJson) -> None:
    assert events(reference)[0] == "submitted"
    assert events(reference)[-1] == "finished"
    assert sorted(losses(reference)) == list(range(1, STEPS + 1))
    assert {p.name for p in (reference / "evaluation").iterdir()} == {"step-000006", "step-000015", "step-000029"}
    assert (reference.stat().st_mode & 0o077) == 0, "others may read the run folder"
    state = launch_json("status", reference)
    assert (state["state"], state["step"], state["steps"], state["stage"]) == ("finished", STEPS, STEPS, "refine")
    audit = launch_json("status", reference, "--audit")
    epochs = [(epoch["stage"], epoch["epoch"], epoch["expected"], epoch["exactly_once"]) for epoch in audit["epochs"]]
    assert epochs == [
        ("scratch", 0, 36, True),
        ("adapt", 0, 50, True),
        ("refine", 0, 50, True),
        ("refine", 1, 34, True),
    ]
    assert audit["topologies"] == [{"world_size": 2, "engine": "fsdp", "from_step": 0}]


def test_the_pickle_holds_the_run_folder_alone(reference: Path) -> None:
    import pickletools

    (path,) = (reference / "logs").glob("*_submitted.pkl")
    words = [argument for _, argument, _ in pickletools.genops(path.read_bytes()) if isinstance(argument, str)]
    assert str(reference) in words
    others = " ".join(word for word in words if word != str(reference))
    assert "phantom" not in others
    assert "/" not in others, others


def rank_main(run: str, rank: int, world: int, port: int) -> None:
    """One rank, in a process that has imported everything already."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1",
    )  # fmt: skip
    from radhpc import worker

    worker.run(run)


@pytest.fixture
def start() -> Iterator[Start]:
    """A life of a run on so many ranks, from a process that has imported everything: it costs a second, not ten."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["radhpc.worker", "transformers.models.mllama.modeling_mllama"])
    ranks: list[ForkServerProcess] = []

    def call(run: Path, world: int) -> list[ForkServerProcess]:
        port = free_port()
        life = [context.Process(target=rank_main, args=(str(run), rank, world, port)) for rank in range(world)]
        for rank in life:
            rank.start()
        ranks.extend(life)
        return life

    yield call
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_number_of_ranks_does_not_change_the_training(
    reference: Path, start: Start, recipe_file: Path, tmp_path: Path, ranks: int
) -> None:
    """Promise 2: the same losses up to the order of sums; without dropout, whose masks differ from rank to rank."""
    from radhpc.core.recipe import load

    run = tmp_path / "run"
    changes = ["stages.adapt.lora.dropout=0", "evaluation.samples=2"]  # a rank of three has nothing to evaluate
    RunFolder.create(run, load(recipe_file, changes))
    life = start(run, ranks)
    for rank in life:
        rank.join(240)
    assert [rank.exitcode for rank in life] == [0] * ranks
    assert len(list((run / "evaluation").glob("step-*/scores.json"))) == len(
        list((reference / "evaluation").glob("step-*/scores.json"))
    )
    own, expected = losses(run), losses(reference)
    scratch = [abs(own[step] - expected[step]) / expected[step] for step in range(1, 7)]
    assert max(scratch) < 1e-5, scratch
    ledger, reference_ledger = read_ledger(run / "ledger"), read_ledger(reference / "ledger")
    assert ledger.steps == reference_ledger.steps


def test_an_interrupted_run_ends_bit_for_bit_as_one_that_was_not(
    reference: Path, launch: Launch, recipe_file: Path, tmp_path: Path
) -> None:
    """Promise 3, from the command line: SIGTERM to both ranks, then resume."""
    run = tmp_path / "run"
    launch("train", recipe_file, "--on", "local", "--run", run)
    controller = RunFolder.open(run).job()
    assert controller is not None
    wait_for(lambda: any_ledger(run, STAGES["scratch"] + 3), 240)  # both ranks import everything first
    os.kill(controller["pid"], signal.SIGTERM)
    wait_for(lambda: events(run)[-1] in ("interrupted", "finished"))
    wait_for(lambda: not Path(f"/proc/{controller['pid']}/cmdline").exists() or gone(controller["pid"]))
    launch("resume", run, "--watch")
    same_bits(run, reference)


@pytest.mark.parametrize("at_steps", [(3, 18), (5, 7, 16)])
def test_a_run_interrupted_again_and_again_ends_bit_for_bit(
    reference: Path, start: Start, recipe_file: Path, tmp_path: Path, at_steps: tuple[int, ...]
) -> None:
    """Promise 3, in each of the three stages and across their seams."""
    from radhpc.core.recipe import load

    run = tmp_path / "run"
    RunFolder.create(run, load(recipe_file))
    for number, at_step in enumerate((*at_steps, None), 1):
        life = start(run, 2)
        wait_for(lambda n=number: events(run).count("started") == n)  # type: ignore[misc]  # all ranks hear signals
        if at_step is not None:
            wait_for(lambda step=at_step: any_ledger(run, step))  # type: ignore[misc]
            for rank in life:
                assert rank.pid is not None
                os.kill(rank.pid, signal.SIGTERM)
        for rank in life:
            rank.join(240)
        assert [rank.exitcode for rank in life] == [0, 0]
    assert events(run).count("interrupted") == len(at_steps)
    same_bits(run, reference)


def same_bits(run: Path, reference: Path) -> None:
    assert events(run)[-1] == "finished"
    assert "interrupted" in events(run), "the run had ended before the signal came: nothing was tested"
    ours, expected = load_file(run / LAST), load_file(reference / LAST)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert losses(run) == losses(reference)
    ledger, reference_ledger = read_ledger(run / "ledger"), read_ledger(reference / "ledger")
    assert ledger.steps == reference_ledger.steps
    assert not ledger.replayed
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        reference / "adapter" / "adapter_model.safetensors"
    ).read_bytes()


def any_ledger(run: Path, step: int) -> bool:
    return step in read_ledger(run / "ledger").steps


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_run_goes_on_on_another_number_of_ranks_and_under_another_engine(
    reference: Path, launch: Launch, launch_json: LaunchJson, recipe_file: Path, tmp_path: Path,
    local_profile: Callable[[int], Path],
) -> None:  # fmt: skip
    run = tmp_path / "run"
    launch("train", recipe_file, "--on", local_profile(3), "--run", run)
    wait_for(lambda: any_ledger(run, 8))
    RunFolder.open(run).request_stop()  # as `stop` does, but while it still runs: a command takes seconds to start
    wait_for(lambda: launch_json("status", run)["state"] == "stopped")
    before = events(run)
    assert "allowed are fsdp and deepspeed" in launch("resume", run, "--engine", "single", status=2).stderr
    assert "'deepspeed'" in launch("resume", run, "--engine", "deepspede", status=2).stderr
    assert events(run) == before, "a refusal leaves a trace"
    launch("resume", run, "--on", local_profile(2), "--engine", "deepspeed", "--watch")
    audit = launch_json("status", run, "--audit")
    assert all(epoch["exactly_once"] for epoch in audit["epochs"])
    lives = [(topology["world_size"], topology["engine"]) for topology in audit["topologies"]]
    assert lives == [(3, "fsdp"), (2, "deepspeed")]
    assert read_ledger(run / "ledger").steps == read_ledger(reference / "ledger").steps


def test_a_signal_before_a_stages_first_step_keeps_the_stage_before(
    reference: Path, launch_json: LaunchJson, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last checkpoint of a stage is not written over by the untrained state of the next."""
    from radhpc import worker
    from radhpc.core.recipe import load
    from radhpc.distributed.stop import Interrupted
    from radhpc.engine.checkpoint import read_cursor
    from radhpc.training import loop

    before = loop._agree

    def interrupted(step: Any, *others: Any) -> Any:
        calls.append(step.number)
        if len(calls) == STAGES["scratch"] + 1:
            raise Interrupted("SIGTERM")
        return before(step, *others)

    calls: list[int] = []
    monkeypatch.setattr(loop, "_agree", interrupted)
    run = RunFolder.create(tmp_path / "run", load(recipe_file))
    assert worker.run(str(run.path)).state == "interrupted"
    assert calls[-1] == 0
    cursor = read_cursor(run.path / f"checkpoints/step-{STAGES['scratch']:06d}")
    assert (cursor.stage, cursor.stage_done) == (0, True)
    assert worker.run(str(run.path)).state == "finished"
    assert read_ledger(run.path / "ledger").steps == read_ledger(reference / "ledger").steps


def test_bad_input_gets_one_line_and_status_2(
    launch: Launch, reference: Path, recipe_file: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    def refused(*arguments: object) -> str:
        done = launch(*arguments, status=2)
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        return line

    assert "no such file" in refused("train", tmp_path / "none.yaml")
    assert "did you mean 'box'" in refused("train", recipe_file, "--on", "bux")
    assert "no manifest.json" in refused("train", recipe_file, f"shards=[{tmp_path}]")
    assert "a run is there already" in refused("train", recipe_file, "--run", reference)
    assert "no run there" in refused("resume", tmp_path / "none")
    assert "no living job" in refused("stop", reference)
    assert "allowed are train" in refused("evaluate", reference, "--split", "tset")
    broken = tmp_path / "image.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n not really")
    assert "image.png" in refused("generate", reference, "--image", broken)
    assert "missing.png" in refused("generate", reference, "--image", tmp_path / "missing.png")
    cut = tmp_path / "cut"
    shutil.copytree(phantom_shards, cut)
    shard = sorted(cut.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    assert shard.name in refused("train", recipe_file, f"shards=[{cut}]")
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "mine.txt").write_text("keep me")
    assert "not empty" in refused("train", recipe_file, "--run", folder)
    assert (folder / "mine.txt").read_text() == "keep me"


def test_a_corrupt_sample_stops_the_run_or_is_left_out_by_name(
    launch: Launch, recipe_file: Path, phantom_shards: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(phantom_shards, bad)
    shard = sorted(bad.glob("train-*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[700] ^= 1  # inside the first member: the size stays, the checksum does not
    shard.write_bytes(data)
    key = shard_key(bad)
    arguments = ("train", recipe_file, f"shards=[{bad}]", "stages.scratch.epochs=1", "stages.scratch.steps=null")
    done = launch(*arguments, "--run", tmp_path / "strict", status=2)
    assert key in done.stderr
    launch(*arguments, "--run", tmp_path / "lenient", "stream.max_bad_samples=10")
    seen = read_ledger(tmp_path / "lenient" / "ledger")
    assert key in [k for keys in seen.bad.values() for k in keys]
    assert key not in [k for keys in seen.steps.values() for k in keys]


def shard_key(shards: Path) -> str:
    """The first training sample of the first shard whose first member is damaged, by webdataset's own naming."""
    import tarfile

    with tarfile.open(sorted(shards.glob("train-*.tar"))[0]) as tar:
        return tar.getnames()[0].split(".")[0]


def test_a_living_job_keeps_its_run_folder(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch("train", recipe_file, "--on", "local", "--run", run)
    assert "in use by local job" in launch("resume", run, status=2).stderr
    launch("stop", run)
    pid = json.loads((run / "job.json").read_text())["pid"]
    wait_for(lambda: gone(pid))


def test_generate_writes_a_text(reference: Path, launch_json: LaunchJson, tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "image.png"
    Image.linear_gradient("L").resize((90, 120)).convert("I;16").save(path)
    assert isinstance(launch_json("generate", reference, "--image", path, "--image", path)["text"], str)


def test_evaluate_writes_scores(reference: Path, launch_json: LaunchJson) -> None:
    result = launch_json("evaluate", reference, "conventions=[r2gen_iu]", "--split", "validate")
    assert {"value", "low", "high", "convention"} <= result["scores"]["findings_macro_f1"].keys()
    assert (reference / "evaluation" / f"step-{result['step']:06d}-validate" / "scores.json").exists()

"""A mixture of datasets from the command line: killed, resumed on other ranks, audited; and what it refuses.

The audit is tried on what it must not overlook: a key that is missing in the ledger, and one that is foreign to it.
"""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from radhpc import worker
from radhpc.core.errors import UserError
from radhpc.core.ledger import read_ledger
from radhpc.core.recipe import load
from radhpc.core.run_folder import RunFolder
from radhpc.data.audit import audit
from radhpc.data.source import Source
from radhpc.data.stream import stage_sampler, stage_steps
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Interrupted
from radhpc.storage.store import Store
from radhpc.training import loop
from radhpc.training.context import open_context
from radhpc.training.sources import open_source
from tests.waiting import wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(240)]

Launch = Callable[..., subprocess.CompletedProcess[str]]
LaunchJson = Callable[..., dict[str, Any]]
STEPS, BATCH = 30, 6


def one_stage(**changes: Any) -> str:
    """The recipe's stages, replaced by one."""
    stage = {"name": "scratch", "batch": BATCH, "micro_batch": 2, "train": [".*"], "optimizer": {"learning_rate": 1e-3}}
    return f"stages={json.dumps([stage | changes])}"


def phantoms(folder: Path, studies: int, seed: int) -> Path:
    from shards.build import BuildSettings, build

    options = {"studies": str(studies), "size": "64", "seed": str(seed)}
    settings = BuildSettings(workers=1, longest_side=56, shard_samples=8)
    build("phantom", None, str(folder), options, settings, lambda done, total: None)
    return folder


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second dataset, a third of the size of `phantom_shards`."""
    return phantoms(tmp_path_factory.mktemp("others") / "shards", 20, 1)


def rank_of(job: dict[str, Any], rank: int) -> psutil.Process:
    """The process of a rank of a local job."""
    below = psutil.Process(job["pid"]).children(recursive=True)
    (found,) = [process for process in below if process.environ().get("SUBMITIT_LOCAL_GLOBALID") == str(rank)]
    return found


def test_a_mixture_on_s3_survives_a_killed_rank_and_other_ranks_exactly_once(
    launch: Launch, launch_json: LaunchJson, recipe_file: Path, phantom_shards: Path, others: Path, s3: str,
    tmp_path: Path, local_profile: Callable[[int], Path],
) -> None:  # fmt: skip
    urls = [f"{s3}/first", f"{s3}/second"]
    for url, folder in zip(urls, (phantom_shards, others), strict=True):
        for path in folder.iterdir():
            Store(url).upload(path, path.name)
    run = tmp_path / "run"
    changes = [f"shards={{{urls[0]}: 2, {urls[1]}: 1}}", one_stage(steps=STEPS), "evaluation.samples=2"]
    launch("train", recipe_file, "--on", local_profile(3), "--run", run, *changes)
    wait_for(lambda: any(step >= 9 for step in read_ledger(run / "ledger").steps))
    job = RunFolder.open(run).job()
    assert job is not None
    rank_of(job, 1).send_signal(signal.SIGKILL)
    wait_for(lambda: not psutil.pid_exists(job["pid"]) or psutil.Process(job["pid"]).status() == "zombie")
    assert max(read_ledger(run / "ledger").steps) < STEPS, "the run had ended before the rank was killed"
    launch("resume", run, "--on", local_profile(2), "--watch")

    found = launch_json("status", run, "--audit")
    assert [life["world_size"] for life in found["topologies"]] == [3, 2]
    assert found["topologies"][1]["from_step"] >= 4
    assert found["replayed_steps"] >= 1, "the killed life trained beyond its last checkpoint"
    assert found["quarantined"] == []
    sizes = {url: len(Source((url,), "train")) for url in urls}
    for url, draws in zip(urls, (STEPS * BATCH * 2 // 3, STEPS * BATCH // 3), strict=True):
        epochs = [epoch for epoch in found["epochs"] if epoch["dataset"] == url]
        assert [epoch["epoch"] for epoch in epochs] == list(range(len(epochs)))
        assert all(epoch["exactly_once"] and epoch["of"] == sizes[url] for epoch in epochs)
        assert all(epoch["seen"] == epoch["expected"] == sizes[url] for epoch in epochs[:-1])
        assert abs(sum(epoch["seen"] for epoch in epochs) - draws) <= 1
        assert len(epochs) > 2
    assert sum(epoch["seen"] for epoch in found["epochs"]) == STEPS * BATCH

    lost, foreign = tamper(run / "ledger")
    done = launch("status", run, "--audit", "--json")
    broken = json.loads(done.stdout)
    assert [key for epoch in broken["epochs"] for key in epoch["missing"]] == [lost]
    assert [key for epoch in broken["epochs"] for key in epoch["repeated"]] == [foreign]
    assert sum(not epoch["exactly_once"] for epoch in broken["epochs"]) in (1, 2)
    assert "NOT exactly once" in done.stderr
    assert f"missing: {lost}" in done.stderr


def tamper(ledger: Path) -> tuple[str, str]:
    """Take a key out of a line of the last life, and put another in its place."""
    path = max(ledger.glob("life-*.rank-*.jsonl"))
    lines = path.read_text().splitlines(keepends=True)
    line = json.loads(lines[3])
    lost = line["keys"].pop(0)
    line["keys"].append(foreign := "phantom-0000000000000000")
    lines[3] = json.dumps(line) + "\n"
    path.write_text("".join(lines))
    return lost, foreign


def test_a_bad_sample_is_counted_once_over_epochs_and_lives(
    launch: Launch, recipe_file: Path, phantom_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is allowed and one is bad: the run meets it in each epoch and each life, and goes on."""
    bad = tmp_path / "bad"
    shutil.copytree(phantom_shards, bad)
    source = Source((str(bad),), "train")
    order = stage_sampler(source, 0, load(recipe_file).stream, seed=0)
    place = source.locate(order.at(np.asarray([2 * len(source) - 1])).sample)[0]  # the last of the second epoch
    shard = bad / source.datasets[0].manifest.shards[place.shard].name
    data = bytearray(shard.read_bytes())
    data[place.start + 3] ^= 1
    shard.write_bytes(data)
    changes = [f"shards=[{bad}]", one_stage(epochs=2), "evaluation.samples=2"]

    strict = RunFolder.create(tmp_path / "strict", load(recipe_file, changes))
    with pytest.raises(UserError, match=rf"max_bad_samples allows 0; now {place.key}: {shard.name}: json: checksum"):
        worker.run(str(strict.path))

    before, calls = loop._agree, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 13:  # of 17 steps; the first epoch ends in the ninth
            raise Interrupted("SIGTERM")
        return before(*arguments)

    monkeypatch.setattr(loop, "_agree", interrupted)
    run = RunFolder.create(tmp_path / "run", load(recipe_file, [*changes, "stream.max_bad_samples=1"]))
    assert worker.run(str(run.path)).state == "interrupted"
    assert worker.run(str(run.path)).state == "finished"
    assert [event["key"] for event in run.events("quarantined")] == [place.key]
    met = {step: keys for step, keys in read_ledger(run.path / "ledger").bad.items() if keys}
    assert list(met.values()) == [[place.key], [place.key]]
    assert min(met) <= 9 < 13 <= max(met), "once in each life"
    found = audit(run)
    assert found["quarantined"] == [place.key]
    assert [(epoch["seen"], epoch["exactly_once"]) for epoch in found["epochs"]] == [(50, True), (50, True)]
    said = launch("status", run.path, "--audit")
    assert "1 of them unreadable and left out, over 2 lives" in said.stdout + said.stderr


def test_without_a_ledger_the_audit_refuses(launch: Launch, recipe_file: Path, tmp_path: Path) -> None:
    changes = [one_stage(steps=1), "evaluation.samples=1", "stream.audit=false"]
    run = RunFolder.create(tmp_path / "run", load(recipe_file, changes))
    assert worker.run(str(run.path)).state == "finished"
    assert not list((run.path / "ledger").iterdir())
    done = launch("status", run.path, "--audit", status=2)
    (line,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "stream.audit: false" in line
    assert "Traceback" not in done.stderr


class OtherNode(Ranks):
    """Rank 0 of two, whose peer reads its manifests from another folder."""

    def __init__(self, theirs: Any) -> None:
        super().__init__()
        self.theirs = theirs

    def gather(self, value: Any) -> list[Any]:
        return [value, self.theirs]


def test_ranks_that_see_other_manifests_do_not_start(recipe_file: Path, others: Path, tmp_path: Path) -> None:
    """The same folder, other shards in it: a mirror that was not brought up to date."""
    recipe = load(recipe_file)
    run = RunFolder.create(tmp_path / "run", recipe)
    there = Source((str(others),), "train")
    theirs = [(there.hashes, stage_steps(stage, len(there))) for stage in recipe.stages]
    context = open_context(run, recipe, OtherNode(theirs))
    steps = [stage_steps(stage, len(open_source(context, n, "train"))) for n, stage in enumerate(recipe.stages)]
    with pytest.raises(UserError, match="stage 'scratch': rank 1 sees other shards than rank 0: .*the same manifests"):
        worker._agree_on_data(context, steps)
    ranks = OtherNode([(open_source(context, n, "train").hashes, count) for n, count in enumerate(steps)])
    worker._agree_on_data(replace(context, ranks=ranks), steps)
    assert os.listdir(run.path / "checkpoints") == []

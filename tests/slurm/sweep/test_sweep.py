"""A sweep proven before the queue, drawn by seed and number, and worked off by an array that anything may happen to."""

import json
import math
import os
import re
import signal
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from radhpc.core.errors import UserError
from radhpc.core.files import read_lines
from radhpc.core.recipe import load as load_recipe
from radhpc.core.run_folder import RunFolder
from radhpc.evaluation.metrics import score_names
from slurm import precheck, profile as profiles, trial_array
from slurm.cluster import Cluster
from slurm.sweep import definition as sweeps
from slurm.sweep.standing import live_states, submitted_jobs, summary
from slurm.sweep.study import SweepStudy, scores
from slurm.sweep.trial import SweepTrial
from tests.conftest import ROOT
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(280)

Launch = Callable[..., Any]
RATE = "stages.scratch.optimizer.learning_rate"
RANK = "stages.adapt.lora.rank"
SHORT = ["stages.adapt.epochs=null", "stages.adapt.steps=4", "stages.refine.steps=4"]


@pytest.fixture
def write(tmp_path: Path, recipe_file: Path) -> Callable[..., Path]:
    """Write a sweep over the tiny recipe: these keys, over a grid of two rates and two ranks."""

    def call(**keys: Any) -> Path:
        path = tmp_path / "mine.yaml"
        data = {
            "recipe": recipe_file.name,
            "overrides": SHORT,
            "space": {RATE: [1e-3, 1e-4], RANK: [1, 2]},
            "method": "grid",
            **keys,
        }
        path.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}))
        return path

    return call


def create(path: Path, folder: Path) -> SweepStudy:
    return SweepStudy.create(folder, *sweeps.load(path))


def events(run: Path, *names: str) -> list[dict[str, Any]]:
    return [event for event in read_lines(run / "events.jsonl") if not names or event["event"] in names]


def evaluated(run: RunFolder, step: int, value: float, split: str = "validate") -> None:
    """Leave an evaluation in a run folder, as the worker does."""
    folder = run.path / "evaluation" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(
        json.dumps({"step": step, "split": split, "scores": {"loss": {"value": value}}})
    )


# What is known before the queue


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"metod": "grid"}, "mine.yaml: unknown key 'metod' .did you mean 'method'"),
        ({"recipe": "tyni.yaml"}, "tyni.yaml: no such file .did you mean 'tiny.yaml'"),
        ({"space": {"stages.scratch.optimizer.learning_rat": [1e-3]}}, "unknown key 'learning_rat'.*'learning_rate'"),
        ({"space": {"stages.scrach.steps": [1]}}, "mine.yaml: space: .*no 'scrach' there; allowed are 0 to 2"),
        ({"space": {"model.config.text.hiden_size": [8]}}, "no 'hiden_size' there .did you mean 'hidden_size'"),
        ({"space": {RATE: [1e-3, 0]}}, "learning_rate=0: stages.0.optimizer.*greater than 0"),
        ({"space": {RANK: [1, 8]}}, f"space: {RANK}=8: .*lora.rank 4 is below 8; ranks can only grow"),
        ({"space": {RANK: []}}, f"space.{RANK}: an empty list"),
        ({"space": {RANK: [1, 2, 1]}}, f"space.{RANK}: 1 is given twice"),
        ({"space": {RANK: 3}}, f"space.{RANK}"),
        ({"space": {RANK: {"low": 1}}}, "give a list of values, or both 'low' and 'high'"),
        ({"space": {RANK: {"low": 4, "high": 1}}}, "'low' 4 must be below 'high' 1"),
        ({"space": {RANK: {"low": 1, "high": 4, "step": 2}}}, "'step' 2 does not lead from 1 to 4"),
        ({"space": {RATE: {"low": 0.0, "high": 1.0, "log": True}}}, "'log' needs a 'low' above zero"),
        ({"space": {RATE: {"low": 1e-4, "high": 1e-3}}}, "a grid needs a list, whole numbers or a 'step'"),
        ({"space": {RATE: [1e-3], "evaluation.split": ["validate", "train"]}, "overrides": ["evaluation.split=test"]},
         "'evaluation.split' stands in 'space' and in 'overrides'"),
        ({"overrides": ["evaluation.split=test"]}, "not the test's"),
        ({"space": {"evaluation.split": ["validate", "test"]}}, "not the test's"),
        ({"trials": 5}, "this grid has 4 points"),
        ({"method": "random"}, "'trials' is missing"),
        ({"metric": "findings_macro_f"}, "no such score .did you mean 'findings_macro_f1'"),
        ({"pruner": {"min_steps": 4}}, "add 'evaluation.every=4' to overrides"),
        ({"pruner": {"min_steps": 0}}, "pruner.min_steps"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_the_queue(write: Callable[..., Path], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        sweeps.load(write(**keys))
    assert "\n" not in str(caught.value)


def test_a_space_of_many_corners_is_validated_axis_by_axis(write: Callable[..., Path]) -> None:
    space: dict[str, Any] = {f"stages.{stage}.optimizer.{key}": {"low": 1e-4, "high": 1e-3, "log": True}
                             for stage in ("scratch", "adapt", "refine")
                             for key in ("learning_rate", "weight_decay", "epsilon", "clip")}  # fmt: skip
    sweep, base = sweeps.load(write(space=space, method="random", trials=2))
    assert len(sweeps.check(sweep, base, Path("mine.yaml"))) == 2 * len(space)
    with pytest.raises(UserError, match=r"stages.refine.optimizer.final.*less than or equal to 1"):
        sweeps.load(write(space={**space, "stages.refine.optimizer.final": [0.5, 2]}, method="random", trials=2))


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_ready_sweeps_hold(path: Path) -> None:
    sweep, base = sweeps.load(path)
    assert sweep.count > 1
    assert f"#   radhpc sweep recipes/sweeps/{path.name} --on" in path.read_text()
    assert yaml.safe_load(sweep.to_yaml())["space"].keys() == sweep.space.keys()
    assert base.name


def test_a_label_tells_a_section_from_the_others() -> None:
    def labels(name: str, key: str) -> list[Any]:
        axis = sweeps.load(ROOT / "recipes" / "sweeps" / f"{name}.yaml")[0].space[key]
        return [axis.label(value) for value in axis.corners()]

    assert labels("views", "images") == ["views 1", "views 2", "views 3", "views 4"]
    assert labels("lora_or_full", "stages.adapt")[1:] == [
        "lora, rank 32, alpha 64, learning_rate 0.001",
        "train, learning_rate 0.0001",
    ]
    assert labels("sections", "text.sections") == ["findings", "impression"]


def test_what_the_command_refuses(launch: Launch, write: Callable[..., Path], tmp_path: Path) -> None:
    message = launch("sweep", write(space={"stages.scratch.stops": [1]}), "--sweep", tmp_path / "s", status=2).stderr
    assert "unknown key 'stops' (did you mean 'steps'?)" in message
    assert "Traceback" not in message
    assert not (tmp_path / "s").exists()


# What the trials are


def test_a_grid_is_every_point(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(space={RATE: {"low": 1e-3, "high": 3e-3, "step": 1e-3}, RANK: {"low": 1, "high": 2}})
    study = create(path, tmp_path / "s")
    recipes = [study.prepare(n).recipe() for n in reversed(range(6))]
    drawn = {
        (round(r.stages[0].optimizer.learning_rate, 6), r.stages[1].lora and r.stages[1].lora.rank) for r in recipes
    }
    assert drawn == {(rate, rank) for rate in (1e-3, 2e-3, 3e-3) for rank in (1, 2)}
    assert study.prepare(0).recipe() == recipes[-1]


SPACE = {
    RATE: {"low": 1e-5, "high": 1e-1, "log": True},
    RANK: {"low": 1, "high": 4},
    "text.sections": [["findings"], ["impression"]],
}


def test_random_parameters_are_a_function_of_seed_and_number(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(space=SPACE, method="random", trials=4)
    first, second = create(path, tmp_path / "a"), create(path, tmp_path / "b")
    forth = [first.prepare(n).recipe() for n in range(4)]
    back = [second.prepare(n).recipe() for n in reversed(range(4))]
    assert forth == back[::-1]
    assert len({recipe.hash for recipe in forth}) == 4
    other = create(write(space=SPACE, method="random", trials=4, seed=1), tmp_path / "c")
    assert other.prepare(0).recipe() != forth[0]


def test_tpe_learns_from_earlier_trials_and_repeats_itself(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(space={RATE: SPACE[RATE]}, method="tpe", trials=24)

    def search(folder: Path, count: int) -> list[float]:
        study = create(path, folder)
        for n in range(count):
            run = study.prepare(n)
            off = abs(math.log10(run.recipe().stages[0].optimizer.learning_rate) + 2)
            evaluated(run, 14, off)
            run.record("finished", step=14)
            study.report(n)
        found = summary(study)
        assert found["best"]["value"] == min(trial["value"] for trial in found["trials"][:count])
        return [float(study.parameters(n)[RATE] or 0) for n in range(count)]

    drawn = search(tmp_path / "a", 24)
    assert drawn[:13] == search(tmp_path / "b", 13), "the first ten are random, those behind learn"
    early, late = ([abs(math.log10(rate) + 2) for rate in part] for part in (drawn[:10], drawn[14:]))
    assert sum(late) < 0.6 * sum(early), (early, late)


def test_a_job_killed_while_it_asks_asks_for_the_same_again(write: Callable[..., Path], tmp_path: Path) -> None:
    study = create(write(space=SPACE, method="tpe", trials=3), tmp_path / "s")
    drawn = study.parameters(1)
    (study.run_path(1) / "logs").mkdir(parents=True)  # killed while it made the folder
    again = SweepStudy.open(tmp_path / "s")
    assert again.parameters(1) == drawn
    assert again.prepare(1).recipe().stages[0].optimizer.learning_rate == drawn[RATE]
    with (study.path / "journal.log").open("ab") as journal:
        journal.write(b'{"op_code": 4, "torn')  # by a full disk
    late = SweepStudy.open(tmp_path / "s")
    assert late.parameters(1) == drawn
    late.parameters(2)
    assert SweepStudy.open(tmp_path / "s").parameters(2) == late.parameters(2)


def test_pruning_is_decided_once_and_told_once(write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(pruner={"min_steps": 4, "reduction": 2}, overrides=[*SHORT, "evaluation.every=2"])
    study = create(path, tmp_path / "s")
    for number, value in ((0, 1.0), (1, 2.0), (2, 0.5)):
        run = study.prepare(number)
        evaluated(run, 2, 9.0)
        assert not study.should_prune(number, 2), "before min_steps"
        evaluated(run, 4, value)
        evaluated(run, 5, 0.0, split="test")  # not this sweep's
        for _ in range(2):  # a life that was lost asks again
            assert SweepStudy.open(study.path).should_prune(number, 4) == (value == 2.0)
    assert scores(study.run_path(2), "loss", "validate") == {2: 9.0, 4: 0.5}
    RunFolder(study.run_path(1)).record("pruned", step=4)
    RunFolder(study.run_path(2)).record("finished", step=14)
    standing = summary(study)
    assert [(trial["number"], trial["state"], trial["value"]) for trial in standing["trials"]] == [
        (2, "finished", 0.5), (0, "missing", 1.0), (1, "pruned", 2.0), (3, "missing", None)
    ]  # fmt: skip
    assert standing["best"]["number"] == 2
    assert summary(study) == standing, "told twice"
    with pytest.raises(UserError, match=r"metric 'token_f1': .* does not have it; it has loss"):
        scores(study.run_path(2), "token_f1", "validate")


def test_another_sweep_does_not_take_the_folder(write: Callable[..., Path], tmp_path: Path) -> None:
    create(write(), tmp_path / "runs" / "sweep-mine-1")
    create(write(concurrent=1), tmp_path / "runs" / "sweep-mine-1")
    sweep, base = sweeps.load(write())
    assert trial_array.newest(tmp_path / "runs", "mine", sweep, base) == tmp_path / "runs" / "sweep-mine-1"
    other, base = sweeps.load(write(metric="token_f1"))
    assert trial_array.newest(tmp_path / "runs", "mine", other, base) is None
    with pytest.raises(UserError, match="another sweep is there: its 'metric' is another"):
        SweepStudy.create(tmp_path / "runs" / "sweep-mine-1", other, base)
    more = create(write(method="random", trials=2), tmp_path / "more")
    drawn = more.parameters(1)
    assert create(write(method="random", trials=3), tmp_path / "more").sweep.count == 3
    assert create(write(method="random", trials=2), tmp_path / "more").sweep.count == 3
    assert SweepStudy.open(tmp_path / "more").parameters(1) == drawn


# How they run


def test_two_ranks_prune_together_and_save_before_it(
    launch: Launch,
    launch_json: Launch,
    write: Callable[..., Path],
    local_profile: Callable[[int], Path],
    tmp_path: Path,
) -> None:
    path = write(
        space={RATE: [1e-3, 1e-7]},
        pruner={"min_steps": 4, "reduction": 2},
        overrides=[*SHORT, "evaluation.every=4", "checkpoint.every=100"],
    )
    folder = tmp_path / "s"
    result = launch_json("sweep", path, "--sweep", folder, "--on", local_profile(2))
    assert [trial["state"] for trial in result["trials"]] == ["finished", "pruned"]
    good, bad = (Path(trial["run"]) for trial in result["trials"])
    (end,) = events(bad, "pruned")
    assert end["step"] == 4
    assert (bad / "checkpoints" / "step-000004" / "COMMITTED").exists()
    assert not events(bad, "finished", "crashed", "failed", "interrupted")
    assert {event["split"] for run in (good, bad) for event in events(run, "evaluated")} == {"validate"}
    assert result["best"]["run"] == str(good)
    assert result["best"]["parameters"] == {RATE: 1e-3}
    assert Path(result["best_recipe"]).read_bytes() == (good / "recipe.yaml").read_bytes()
    names = {name for file in good.glob("evaluation/*/scores.json") for name in json.loads(file.read_text())["scores"]}
    assert names <= set(score_names()), "a score that no sweep could be told to use"
    assert hyperparameters(good) == {RATE: 1e-3}
    assert "ended the run early" in launch("resume", bad, status=2).stderr
    assert SweepTrial.of(str(good)) is not None
    assert SweepTrial.of(str(tmp_path)) is None
    assert trial_array.due(SweepStudy.open(folder)) == [], "what was done would be done again"


def hyperparameters(run: Path) -> dict[str, Any]:
    """What TensorBoard's HParams shows of a run; its metric must be a curve of it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import metadata

    accumulator = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    content = accumulator.PluginTagToContent("hparams")
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    assert [info.name.tag for info in experiment.metric_infos] == ["evaluation/loss"]
    assert "evaluation/loss" in accumulator.Tags()["scalars"]
    session = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    return {name: value.number_value for name, value in session.hparams.items()}


@pytest.mark.box
def test_what_waits_in_the_queue_is_left_there_until_it_is_stopped(
    slurm: Callable[..., str], box_profile: Path, write: Callable[..., Path], tmp_path: Path
) -> None:
    box_profile.write_text(box_profile.read_text() + "sbatch: {hold: true}\n")
    profile, study = profiles.load(str(box_profile)), create(write(concurrent=3), tmp_path / "a sweep's folder")
    for keys, said in (({"partition": "urgnt"}, "did you mean 'urgent'"), ({"nodes": 3}, "'preemptible' has 2")):
        with pytest.raises(UserError, match=said):
            trial_array.submit(study, profile.model_copy(update=keys))
    cluster = Cluster.ask(profile.environment)
    assert precheck.array_problems(cluster, 1001) == []
    assert precheck.array_problems(cluster, 1002) == ["a job array of 1002: this site takes up to 1001 (MaxArraySize)"]
    assert not submitted_jobs(study)
    array_id = trial_array.submit(study, profile)
    assert "ArrayTaskId=0-3%3" in slurm("scontrol", "show", "job", str(array_id))
    assert live_states(study) == dict.fromkeys(range(4), "PENDING")
    assert [trial["state"] for trial in summary(study)["trials"]] == ["pending"] * 4
    assert trial_array.submit(study, profile) is None
    slurm("scancel", f"{array_id}_2")
    assert trial_array.due(study) == [2]
    again = trial_array.submit(study, profile)
    assert submitted_jobs(study)["0002"]["id"] == again, "one call is a plain job, not an array"
    assert submitted_jobs(study)["0003"]["id"] == f"{array_id}_3"
    assert trial_array.due(study) == []
    assert sorted(trial_array.stop(study)) == sorted([*(f"{array_id}_{n}" for n in (0, 1, 3)), str(again)])
    wait_for(lambda: not live_states(study), 30)
    assert [trial["state"] for trial in summary(study)["trials"]] == ["missing"] * 4
    assert "ended before it began" in summary(study)["trials"][0]["why"]
    assert trial_array.due(study) == [0, 1, 2, 3]


@pytest.mark.box
def test_an_array_whose_elements_are_killed_and_preempted(
    launch: Launch, launch_json: Launch, slurm: Callable[..., str], box_profile: Path, write: Callable[..., Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    from bench.chaos import rank_pid

    box_profile.write_text(box_profile.read_text().replace("nodes: 2", "nodes: 1\nretries: 0"))
    long = ["stages.scratch.steps=60", "stages.adapt.epochs=null", "stages.adapt.steps=10", "stages.refine.steps=4"]
    rates = {RATE: [1e-3, 3e-4, 1e-4]}
    path, folder = write(space=rates, overrides=[*long, "checkpoint.every=5"], concurrent=2), tmp_path / "s"
    command = ("sweep", path, "--sweep", folder, "--on", box_profile)
    result = launch_json(*command)
    assert {trial["state"] for trial in result["trials"]} <= {"pending", "running", "missing"}
    runs = [folder / "trials" / f"{n:04d}" for n in range(3)]

    def job(run: Path) -> str:
        return str(events(run, "started")[-1]["job"])

    # One element loses its rank and may not be retried.
    wait_for(lambda: len(events(runs[0], "saved")) >= 2)
    os.kill(rank_pid(job(runs[0]), 0), signal.SIGKILL)
    wait_for(lambda: bool(events(runs[0], "rank_lost")), 60)
    # The other is preempted and comes back to its own trial.
    wait_for(lambda: len(events(runs[1], "saved")) >= 2)
    frozen = (runs[1] / "recipe.yaml").read_bytes()
    node = re.search(r"\bNodeList=(\S+)", slurm("scontrol", "show", "job", job(runs[1])))
    assert node
    slurm(
        "sbatch",
        "--partition=urgent",
        f"--nodelist={node[1]}",
        "--exclusive",
        "--output=/dev/null",
        "--wrap",
        "sleep 1",
    )
    wait_for(lambda: bool(events(runs[1], "requeued")), 60)

    def states() -> dict[int, str]:
        return {trial["number"]: trial["state"] for trial in launch_json("status", folder)["trials"]}

    wait_for(lambda: states()[0] == "failed", 60)  # SLURM takes its time to end a job
    # Said again at this moment, the command submits the failed one and touches nothing that waits or runs.
    first = {run.name: job["id"] for run, job in ((run, RunFolder(run).job()) for run in runs if run.exists()) if job}
    launch(*command)
    given = json.loads((folder / "jobs.json").read_text())
    assert given["0000"]["id"] != first["0000"]
    assert given["0001"]["id"] == first["0001"]
    wait_for(lambda: all(events(run, "finished") for run in runs if run.exists()) and all(map(Path.exists, runs)), 200)
    assert (runs[1] / "recipe.yaml").read_bytes() == frozen
    for run, lives in zip(runs, (2, 2, 1), strict=True):
        assert len(events(run, "started")) == lives, run
        assert len(events(run, "finished")) == 1
    assert events(runs[0], "resumed")
    stopped_at = events(runs[1], "interrupted")[0]["step"]
    assert [event["step"] for event in events(runs[1], "resumed")] == [stopped_at]
    assert most_at_a_time(runs) == 2
    wait_for(lambda: not slurm("squeue", "--noheader").strip(), 60)
    assert "nothing to submit" in launch(*command).stdout
    standing = launch_json("status", folder)
    assert [trial["state"] for trial in standing["trials"]] == ["finished"] * 3
    assert standing["best"] == standing["trials"][0]
    for log in (runs[2] / "logs").glob("*_log.*"):
        assert log.resolve().exists()
    assert load_recipe(Path(standing["best_recipe"])) == RunFolder(standing["best"]["run"]).recipe()


def most_at_a_time(runs: list[Path]) -> int:
    """Trials that ran at once, by their first life and last event."""
    changes = []
    for run in runs:
        for start, end in pairwise([*events(run, "started"), None]):
            later = [
                event for event in events(run, "interrupted", "rank_lost", "finished") if event["time"] > start["time"]
            ]
            changes += [(start["time"], 1), (later[0]["time"], -1)]
            assert end is None or end["time"] > later[0]["time"], f"two lives of {run} at once"
    running = most = 0
    for _, change in sorted(changes):
        running += change
        most = max(most, running)
    return most

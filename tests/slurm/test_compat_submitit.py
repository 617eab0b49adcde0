"""What slurm/compat_submitit.py takes from submitit is still there and does what radhpc relies on."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import submitit
from submitit.core import utils

from slurm import compat_submitit


def test_the_batch_script_is_the_one_that_submitit_submits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an sbatch that keeps what it is given."""
    for name, answer in (("sbatch", f"cat $1 > {tmp_path}/given; echo Submitted batch job 7"), ("srun", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{answer}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    parameters = {"time": 5, "nodes": 2, "ntasks_per_node": 1, "setup": ["# first"], "teardown": ["# last"]}
    executor = submitit.SlurmExecutor(tmp_path / "logs", python="python")
    executor.update_parameters(**parameters)
    executor.submit(print)
    lines = (tmp_path / "given").read_text().splitlines()
    command = next(line.partition(" python ")[2] for line in lines if line.startswith("srun"))
    script = compat_submitit.batch_script(f"python {command}", tmp_path / "logs", parameters)
    assert script.splitlines() == lines


def test_an_array_has_its_elements_in_the_script(tmp_path: Path) -> None:
    script = compat_submitit.batch_script("true", tmp_path, {"array_parallelism": 2}, elements=3)
    assert "#SBATCH --array=0-2%2\n" in script


def test_a_rank_knows_that_it_is_in_a_job(tmp_path: Path) -> None:
    assert not compat_submitit.in_job()
    executor = submitit.LocalExecutor(tmp_path, python=sys.executable)
    executor.update_parameters(timeout_min=1)
    assert executor.submit(compat_submitit.in_job).result() is True
    assert "export SUBMITIT_EXECUTOR=slurm\n" in compat_submitit.batch_script("true", tmp_path, {})


@pytest.mark.parametrize("job", ["12", "12_3"])
def test_logs_have_the_names_that_submitit_gives_them(job: str, tmp_path: Path) -> None:
    paths = utils.JobPaths(tmp_path, job, 4)
    assert [compat_submitit.log_name(job, 4, stream) for stream in ("out", "err")] == [
        paths.stdout.name,
        paths.stderr.name,
    ]
    assert compat_submitit.parse_log_name(paths.stderr.name) == (job, 4, "err")
    assert compat_submitit.parse_log_name(paths.result_pickle.name) is None


def test_half_written_results_are_removed(tmp_path: Path) -> None:
    def left(job: str) -> Path:
        """What a rank leaves that is killed while it writes its result."""
        code = "import os, sys; from submitit.core import utils\nwith utils.temporary_save_path(sys.argv[1]) as path:\n"
        code += "    path.write_bytes(b'half'); os._exit(9)"
        result = utils.JobPaths(tmp_path, job, 0).result_pickle
        assert subprocess.run([sys.executable, "-c", code, result], check=False).returncode == 9
        return result

    first, second = left("12"), left("13")
    for result in (first, second):
        with pytest.raises(AssertionError, match="already exists"), utils.temporary_save_path(result):
            pass
    compat_submitit.remove_partial_results(tmp_path, "13")
    utils.cloudpickle_dump("whole", second)
    assert pickle.loads(second.read_bytes()) == "whole"
    compat_submitit.remove_partial_results(tmp_path)
    utils.cloudpickle_dump("whole", first)

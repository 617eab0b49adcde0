"""Small files on a disk that fills up."""

import os
import resource
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

WRITER = """
import resource, signal, sys
from radhpc.run_dir import RunDir
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = RunDir(sys.argv[1])
run.record("started", life=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (150, resource.RLIM_INFINITY))
try:
    run.record("interrupted", cause="x" * 200)
except OSError as error:
    print(error.errno)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
run.record("finished")
print([event["event"] for event in run.events()])
"""


def test_an_event_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """A limit on the size of files cuts a write as a full disk does."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    done = subprocess.run(
        [sys.executable, "-c", WRITER, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    number, events = done.stdout.splitlines()
    assert number == "28"
    assert events == "['started', 'finished']"

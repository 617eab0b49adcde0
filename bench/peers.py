"""The environment of the other projects' readers, and calls of bench/readers.py in it.

    python -m bench.peers                          # makes .venv-peers, from bench/requirements-peers.txt
    call("litdata", {"do": "raw", "where": folder}, seconds=60).answer["samples"]

They need versions that ours cannot have, so they live beside the project in an environment of their own, and every call
is a process of its own. The variable RADHPC_PEERS_PYTHON names the Python of an environment that is there already.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from radhpc.core.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
READERS = ROOT / "bench" / "readers.py"
REQUIREMENTS = ROOT / "bench" / "requirements-peers.txt"
FOLDER = ROOT / ".venv-peers"
VARIABLE = "RADHPC_PEERS_PYTHON"
PEERS = ("webdataset", "litdata", "mds", "energon", "grain")


@dataclass(frozen=True)
class Called:
    """What one call left: the answer, or none where the process failed or was ended, and what it said."""

    answer: dict[str, Any] | None
    said: str  # on standard error
    hung: bool = False


def python() -> Path:
    """The Python of the peers' environment, which is made when there is none or when it is outdated."""
    if named := os.environ.get(VARIABLE):
        if not os.access(named, os.X_OK):
            raise UserError(f"{VARIABLE}: {named}: allowed is the Python of an environment that can be run")
        return Path(named)
    ready, wanted = FOLDER / "ready", REQUIREMENTS.read_text()
    if not ready.exists() or ready.read_text() != wanted:
        print(f"making {FOLDER.name} for the other projects' readers", file=sys.stderr, flush=True)
        venv.create(FOLDER, clear=True, with_pip=True)
        pip = [str(FOLDER / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        # torch with what it needs, which differs from build to build; then the rest as it is listed.
        for what in (["-c", str(REQUIREMENTS), "torch"], ["--no-deps", "-r", str(REQUIREMENTS)]):
            subprocess.run(pip + what, check=True, stdout=sys.stderr)
        ready.write_text(wanted)
    return FOLDER / "bin" / "python"


def call(peer: str, request: dict[str, Any], seconds: float, interpreter: Path | None = None) -> Called:
    """Have a peer do something (bench/readers.py says what) in a process of its own, which is ended after `seconds`."""
    with tempfile.TemporaryDirectory(prefix="radhpc-peer-") as folder:
        answer = Path(folder) / "answer.json"
        said = Path(folder) / "said"
        command = [interpreter or python(), READERS, peer, json.dumps(request), answer]
        with said.open("wb") as file:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.PIPE,  # it ends when this closes, as when we are killed
                stdout=subprocess.DEVNULL,
                stderr=file,
                start_new_session=True,
                env=os.environ | {"TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            )
        try:
            process.wait(seconds)
            hung = False
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it and the workers that it left
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        found = json.loads(answer.read_bytes()) if answer.exists() else None
        return Called(found, said.read_text(errors="replace"), hung)


if __name__ == "__main__":
    try:
        print(python())
    except UserError as mistake:
        print(mistake, file=sys.stderr)
        sys.exit(2)

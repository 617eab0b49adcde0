"""Freeze the code that a run is submitted with into its folder: its jobs run it, whatever the checkout becomes.

    RUN/code/radhpc/, slurm/, shards/, verbs/, ...   copies, under a megabyte
    RUN/code/environment.json                        hash of the code, commit, Python, versions of the libraries
    RUN/code-1/                                      what `resume --current-code` replaced

A copy and not a reference to a commit: it is there when the repository is not, and holds what was never committed.
Jobs find it by PYTHONPATH. PYTHONSAFEPATH goes with it, because `python -m` looks into the working directory
before PYTHONPATH, and that is the checkout where a job was submitted from there.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

from radhpc.core import environment as fingerprint, resources
from radhpc.core.errors import UserError
from radhpc.core.files import read_json, sync, write_atomically
from radhpc.core.run_folder import now

ENVIRONMENT = "environment.json"


def freeze(code: Path, same_python: bool = True) -> dict[str, Any]:
    """Copy this process's code into the folder `code`, unless one is there. Returns its environment.json.

    `same_python`: whether jobs start this very Python, so that its versions are theirs; if not, as with a container,
    the first life fills them in. Raises UserError where the folder cannot be written.
    """
    if not code.exists():
        _copy(code, same_python)
    return environment(code)


def replace(code: Path, same_python: bool = True) -> tuple[str, str, str]:
    """Freeze anew and keep the old code beside it. Returns the hashes of both and the old one's new name."""
    was = environment(code)["code"]
    kept = next(path for path in (code.with_name(f"{code.name}-{n}") for n in count(1)) if not path.exists())
    fresh = code.with_name(f".{code.name}.fresh")
    shutil.rmtree(fresh, ignore_errors=True)
    _copy(fresh, same_python)
    code.rename(kept)
    fresh.rename(code)
    sync(code.parent)
    return was, environment(code)["code"], kept.name


def environment(code: Path) -> dict[str, Any]:
    """Return the environment.json of frozen code. Raises UserError where it is missing."""
    frozen: dict[str, Any] | None = read_json(code / ENVIRONMENT)
    if frozen is None:
        raise UserError(f"{code}: no {ENVIRONMENT} there; 'radhpc resume --current-code' freezes the code anew")
    return frozen


def current() -> str:
    """Return the hash of this process's code."""
    return fingerprint.code_hash(fingerprint.root())


def variables(code: Path) -> dict[str, str]:
    """Return variables that make a Python import the frozen code first, and nothing from its working directory."""
    behind = os.environ.get("PYTHONPATH")
    return {"PYTHONSAFEPATH": "1", "PYTHONPATH": f"{code}:{behind}" if behind else str(code)}


def exports(code: Path) -> str:
    """Return the same as a line of a batch script; what loaded modules have put into PYTHONPATH stays behind it."""
    return f"export PYTHONSAFEPATH=1 PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}"


def check_profile(code: Path, profile: Path) -> None:
    """Raise UserError unless the frozen code can read a profile that a newer radhpc has written."""
    if environment(code)["code"] == current():
        return
    script = resources.folder("slurm") / "read_profile.py"
    command = [sys.executable, str(script), str(profile)]
    done = subprocess.run(
        command, env={**os.environ, **variables(code)}, capture_output=True, text=True, check=False, timeout=60
    )
    if done.returncode:
        message = (done.stderr.strip().splitlines() or ["it says nothing"])[-1].removeprefix(
            "radhpc.core.errors.UserError: "
        )
        raise UserError(f"{message} (as the run's frozen code reads it); 'radhpc resume --current-code' takes today's")


def _copy(code: Path, same_python: bool) -> None:
    source = fingerprint.root()
    temporary = code.with_name(f".{code.name}.{os.getpid()}")
    try:
        temporary.mkdir(mode=0o700)
        for path in fingerprint.sources(source):
            target = temporary / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        about = {"time": now(), "code": fingerprint.code_hash(temporary), "from": str(source), **_commit(source)}
        about |= fingerprint.versions() if same_python else {}
        write_atomically(temporary / ENVIRONMENT, json.dumps(about, indent=1).encode(), 0o600)
        temporary.rename(code)
        sync(code.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{code}: the code cannot be kept there: {error.strerror}") from error


def _commit(source: Path) -> dict[str, Any]:
    """Return the commit of a checkout and whether files differ from it; None if the code is no checkout of its own."""
    top = _git(source, "rev-parse", "--show-toplevel")
    if top is None or Path(top) != source:
        return {"commit": None, "dirty": None}
    names = [name for name in (*fingerprint.PACKAGES, "launch.py") if (source / name).exists()]
    changed = _git(source, "status", "--porcelain", "--", *names)
    return {"commit": _git(source, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _git(source: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(source), *arguments], capture_output=True, text=True, check=False, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

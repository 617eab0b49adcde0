"""Import every module of the product first, each in a Python interpreter of its own.

    python -m bench.imports [--workers 2] [MODULE ...]

A module that only works after another one has been imported is broken for whoever imports it first. Prints one line
per module that fails and a summary; exit status 1 where any fails. Takes minutes: about two seconds a module that needs
PyTorch. tests/test_imports.py runs the short form, with two modules of each room that needs PyTorch, in children that
are forked from a bare interpreter or from one that has imported only numpy and torch.
"""

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("radhpc", "shards", "slurm")
# Programs rather than modules: what they do, they do at import. The template runs next to an export, without radhpc.
PROGRAMS = {"slurm.read_profile", "radhpc.serving.templates.without_radhpc"}


def modules(root: Path = ROOT) -> list[str]:
    """Return the full names of all modules and packages of the product, in alphabetical order."""
    names = []
    for package in PACKAGES:
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return sorted(name for name in names if name not in PROGRAMS and not name.endswith(".__main__"))


def import_first(module: str) -> str:
    """Import a module in a new interpreter. Return its traceback, or nothing where it succeeds."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.import_module", module],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    return "" if done.returncode == 0 else done.stderr or f"exit status {done.returncode}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Import every module first, each in an interpreter of its own.")
    parser.add_argument("module", nargs="*", help="modules; without any, all of the product")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    names = arguments.module or modules()
    started = time.monotonic()
    failures = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for name, traceback in zip(names, pool.map(import_first, names), strict=True):
            if traceback:
                failures += 1
                print(f"{name}: {traceback.strip().splitlines()[-1]}\n{traceback}", flush=True)
    print(f"{len(names)} modules, {failures} failed, {time.monotonic() - started:.0f} seconds")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()

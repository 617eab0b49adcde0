"""The layout holds: imports run one way, and the login node needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

# Inside radhpc a file imports only from its own floor or from lower ones.
FLOORS = (
    ("errors", "files", "sample", "manifest", "recipe", "run_dir", "fingerprint", "weights",
     "lean"),
    ("dist", "heap", "heartbeat", "log", "stop", "remote", "store", "board", "ledger", "cache", "probe", "grace",
     "storage", "background"),
    ("order", "transforms", "radiograph", "processors", "models", "tokenizer", "source", "fetch", "tasks", "collate",
     "stream", "host", "attention", "blocks", "token_loss", "operations", "additions", "objective", "sam", "quantise",
     "rows",
     "placing", "adapters", "optimizers", "engine", "zero", "allocations"),
    ("checkpoint", "metrics", "generate", "generated", "answer", "index", "reader", "neighbours", "scoring",
     "evaluate", "evaluation_job", "evaluation_page", "demo", "plain", "model_card", "export", "audit", "parts", "loop",
     "straggler", "profiling", "hooks", "saving", "standins", "plan", "lineage", "seam", "exhausted", "compiling"),
    ("worker",),
)  # fmt: skip
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
TORCH_FREE = {
    *FLOORS[0],
    "heartbeat",
    "log",
    "stop",
    "remote",
    "store",
    "ledger",
    "cache",
    "order",
    "transforms",
    "processors",
    "source",
    "tasks",
    "metrics",
    "scoring",
    "grace",
    "storage",
    "checkpoint",
}


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Full names of the modules that a file imports; `from radhpc import x` counts as radhpc.x."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def noun(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "radhpc" and len(parts) > 1 and parts[1] in FLOOR else None


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def test_every_file_has_a_floor() -> None:
    nouns = {path.relative_to(ROOT / "radhpc").parts[0].removesuffix(".py") for path in files("radhpc")} - {"__init__"}
    assert nouns == set(FLOOR)


@pytest.mark.parametrize("path", files("radhpc"), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_arrow_runs_up(path: Path) -> None:
    mine = path.relative_to(ROOT / "radhpc").parts[0].removesuffix(".py")
    for module in imports(path):
        assert module.split(".")[0] not in ("slurm", "shards", "launch", "verbs"), module
        other = noun(module)
        if other is not None and mine != "__init__":
            assert FLOOR[other] <= FLOOR[mine], f"{mine} (floor {FLOOR[mine]}) imports {other} (floor {FLOOR[other]})"


def test_no_cycle_inside_radhpc() -> None:
    graph = {
        name: {n for p in files("radhpc") if p.relative_to(ROOT / "radhpc").parts[0].removesuffix(".py") == name
               for n in map(noun, imports(p)) if n and n != name}
        for name in FLOOR
    }  # fmt: skip
    while graph:
        leaves = [name for name, others in graph.items() if not others & graph.keys()]
        assert leaves, f"a cycle among {sorted(graph)}"
        for name in leaves:
            del graph[name]


@pytest.mark.parametrize("path", files("shards"), ids=lambda path: str(path.relative_to(ROOT)))
def test_shards_know_the_torch_free_contract_alone(path: Path) -> None:
    for module in imports(path):
        assert module.split(".")[0] not in ("slurm", "torch", "launch", "verbs"), module
        assert noun(module) in (None, "errors", "files", "sample", "manifest", "remote", "store", "transforms"), module


@pytest.mark.parametrize("path", files("slurm"), ids=lambda path: str(path.relative_to(ROOT)))
def test_slurm_knows_no_tensors(path: Path) -> None:
    allowed = {None, "errors", "files", "recipe", "run_dir", "log", "fingerprint", "metrics"}
    for module in imports(path, top_level=True):
        assert module.split(".")[0] not in ("shards", "torch", "launch", "verbs"), module
        assert noun(module) in allowed, module
    if path.name != "job.py":  # the one local import is in the function that runs in the job
        assert {noun(module) for module in imports(path)} <= allowed


TORCH = "culprits = {'torch', 'transformers'} & set(sys.modules)\nassert not culprits, (name, culprits)\n"


def test_the_help_needs_no_torch() -> None:
    code = (
        "import runpy, sys\nname = sys.argv[0] = 'launch.py'\ntry:\n    runpy.run_path(name, run_name='__main__')\n"
        "except SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + TORCH, "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout


def test_the_login_node_needs_no_torch() -> None:
    """All of slurm, and what of radhpc is said to be torch-free; the first that loads it is named."""
    slurm = [f"slurm.{path.stem}" for path in files("slurm")]
    names = [*slurm, *(f"radhpc.{name}" for name in sorted(TORCH_FREE - {"metrics"}))]
    code = f"import importlib, sys\nfor name in {names}:\n    importlib.import_module(name)\n    "
    code += TORCH.replace("\n", "\n    ")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

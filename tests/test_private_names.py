"""Private names of other libraries are used in one compat module per library, and nowhere else.

Seen are: an import whose path has a component that begins with one underscore; an attribute of that kind behind a name
that was imported from a third party (`torch._foreach_norm`); and, behind anything else, one that no class or module of
ours defines (`model._parameters`). getattr() and setattr() with such a name count as attributes.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PACKAGES = ("radhpc", "slurm", "shards")
DOCUMENTED = {"_replace", "_asdict", "_fields", "_make", "_exit"}  # of the standard library: namedtuple, os


def files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in DOCUMENTED


def is_third_party(module: str) -> bool:
    top = module.partition(".")[0]
    return top not in PACKAGES and top not in sys.stdlib_module_names


@cache
def own_names() -> frozenset[str]:
    """Every private name that this project defines: functions, classes, and what it assigns on self, cls or a class."""
    names: set[str] = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and root(node) in ("self", "cls"):
                names.add(node.attr)
    return frozenset(names)


def root(node: ast.expr) -> str | None:
    """The name at the beginning of a chain of attributes."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def private_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each use of a private name of another library."""
    tree, foreign = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if is_third_party(alias.name):
                    foreign.add(alias.asname or alias.name.partition(".")[0])
                    if any(map(is_private, alias.name.split("."))):
                        yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level and is_third_party(node.module):
            for alias in node.names:
                foreign.add(alias.asname or alias.name)
                if any(map(is_private, f"{node.module}.{alias.name}".split("."))):
                    yield node.lineno, f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if root(node) in foreign or node.attr not in own_names():
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "setattr", "hasattr", "delattr") and isinstance(name, ast.Constant):
                foreign_name = root(node.args[0]) in foreign or name.value not in own_names()
                if is_private(str(name.value)) and foreign_name:
                    yield node.lineno, ast.unparse(node)


def test_private_names_stay_in_compat_modules() -> None:
    uses = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in files()
        if not path.name.startswith("compat_")
        for line, name in private_names(path.read_text())
    ]
    assert not uses, "move these to the compat module of their library:\n" + "\n".join(uses)


def test_a_compat_module_is_for_one_library_and_has_a_test() -> None:
    modules = [path for path in files() if path.name.startswith("compat_")]
    assert len({path.name for path in modules}) == len(modules)
    tests = {path.name for path in (ROOT / "tests").rglob("test_compat_*.py")}
    assert {f"test_{path.name}" for path in modules} <= tests


@pytest.mark.parametrize(
    "source",
    [
        "from torch._subclasses.fake_tensor import FakeTensor",
        "from torch.fx.experimental import _config",
        "import torch._dynamo",
        "import torch\ntorch._foreach_norm([])",
        "import torch\ntorch.nn._reduction.x",
        "from torch import nn\ndef f(x: nn.Module):\n    return x._parameters",
        "def f(x):\n    return getattr(x, '_is_hf_initialized')",
        "def f(x):\n    x._attn_implementation = 'eager'",
    ],
)
def test_a_private_name_is_seen(source: str) -> None:
    assert list(private_names(source))


@pytest.mark.parametrize(
    "source",
    [
        "from radhpc.engine import _own",
        "import os\nos._exit(1)",
        "from collections import namedtuple\nPair = namedtuple('Pair', 'a b')\nPair(1, 2)._replace(a=3)",
        "class A:\n    def f(self):\n        self.__dict__",
        "import torch\ntorch.nn.Module.__init__",
    ],
)
def test_what_is_no_private_name_of_another_library(source: str) -> None:
    assert not list(private_names(source))

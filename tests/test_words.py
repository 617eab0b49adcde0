"""The words of the code: docstrings are sentences, and variables have names that say what they hold."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

FRAGMENT = re.compile(r"^(What|Of|As|Where|Whether|How|Whose|Who|Which|When|That)\b")
VAGUE = {"found", "told", "wanted", "mine", "what", "said", "there", "given", "nothing"}
PACKAGES = ("radhpc", "shards", "slurm")


def trees() -> Iterator[tuple[Path, ast.Module]]:
    for path in [ROOT / "launch.py", *sorted(path for name in PACKAGES for path in (ROOT / name).rglob("*.py"))]:
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def test_docstrings_are_sentences() -> None:
    """PEP 257: a sentence in the imperative or indicative, not a fragment that begins with a pronoun."""
    fragments = [
        f"{path}: {getattr(node, 'name', 'module')}: {text.splitlines()[0]}"
        for path, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and FRAGMENT.match(text := ast.get_docstring(node) or "")
    ]
    assert fragments == []


def test_variables_say_what_they_hold() -> None:
    """Fields of classes are left out: some are keys of files."""
    vague = []
    for path, tree in trees():
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
        fields = {id(line.target) for body in bodies for line in body if isinstance(line, ast.AnnAssign)}
        for node in ast.walk(tree):
            if isinstance(node, ast.arg) and node.arg in VAGUE:
                vague.append(f"{path}:{node.lineno}: argument '{node.arg}'")
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id in VAGUE:
                vague += [] if id(node) in fields else [f"{path}:{node.lineno}: variable '{node.id}'"]
    assert vague == []

"""The help of every verb: at 80 columns, with examples that can be pasted."""

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from radhpc.cli.main import app

COMMANDS = typer.main.get_command(app)
VERBS = [*COMMANDS.commands, "recipes copy"]  # type: ignore[attr-defined]


def help_of(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0, result.output
    return result.output


def test_verbs_stand_in_the_panels_of_what_people_do() -> None:
    text = help_of()
    panels = re.findall(r"╭─ (.+?) ─", text)
    assert set(panels) == {"Options", "Data", "Training", "Monitoring", "Trained models", "Before submitting"}
    for verb in COMMANDS.commands:  # type: ignore[attr-defined]
        assert f"│ {verb} " in text


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_and_its_examples_run_as_pasted(verb: str) -> None:
    text = help_of(*verb.split())
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text
    if verb == "recipes":
        return
    assert re.search(r"^ Examples?:$", text, re.MULTILINE)
    pasted = text[re.search(r"^ Examples?:$", text, re.MULTILINE).end() :]  # type: ignore[union-attr]
    commands = [shlex.split(command) for command in pasted.replace("\\\n", " ").splitlines() if command.strip()]
    assert commands
    for words in commands:
        assert words[: 1 + len(verb.split())] == ["radhpc", *verb.split()]
        for option in (word for word in words if word.startswith("--")):
            assert option in text, option


@pytest.mark.parametrize("verb", VERBS)
def test_no_sentence_is_broken_in_its_middle(verb: str) -> None:
    """Lines of a docstring are joined: a paragraph's lines but the last are full."""
    paragraphs = help_of(*verb.split()).partition("╭")[0].split("Usage:")[1].split("\n \n")
    for paragraph in paragraphs[1:]:
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        for line, following in zip(lines, lines[1:], strict=False):
            assert len(line) + 1 + len(following.split()[0]) > 76, line


def test_the_version_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.fullmatch(r"radhpc[ ,].+\n", result.output)

"""The pages tell the truth: every command in them exists or runs, links lead somewhere, generated pages are fresh.

Commands are collected from README.md, docs/, the opening comments of recipes and profiles, and the examples of the
help. Those of STORY really run, in a temporary folder; all others are parsed as the command line would parse them.
"""

import ast
import importlib.util
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from radhpc.cli import main as _main  # noqa: F401  (registers the verbs)
from radhpc.cli.common import app
from radhpc.core import recipe as recipes, resources
from radhpc.core.recipe.reference import keys
from shards.datasets import reader, registry
from slurm import profile as profiles
from slurm.sweep import definition as sweeps
from tests.conftest import ROOT

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "measurements")]
HABITS = [path for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG") if (path := ROOT / f"{name}.md").exists()]
SETTINGS = [*sorted((ROOT / "recipes").rglob("*.yaml")), *sorted((ROOT / "slurm" / "profiles").glob("*.yaml"))]
# Files and profiles of the reader's own, which the pages speak of.
OWN_FILES = {"mine.yaml", "my-first.yaml", "SWEEP/best.yaml", "RECIPE", "NAME", "~/a100.yaml", "FILE", "PROFILE"}


class Command(NamedTuple):
    """One command of a page: where it stands, and its words."""

    place: str
    line: str


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def fences(path: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of a page in one of these languages."""
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S):
        if language in languages:
            yield block


def split_commands(text: str) -> Iterator[str]:
    """Single commands of a shell text, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        plain = re.sub(r"(^|\s)#.*$", "", line).strip()
        yield from (part.strip() for part in plain.split("&&") if part.strip())


def inline_code(path: Path) -> Iterator[str]:
    """Commands inside sentences and tables, such as `radhpc status RUN`."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.match(r"(radhpc|make|python -m) [a-z]", code) and "..." not in code:
            yield code.replace("\\|", "|")


def verbs() -> Iterator[tuple[str, Any]]:
    """All verbs by their words, those of groups included: ("recipes copy", its command)."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield name, command
        for inner, member in getattr(command, "commands", {}).items():
            yield f"{name} {inner}", member


def help_examples() -> Iterator[Command]:
    for name, _ in verbs():
        shown = CliRunner().invoke(app, [*name.split(), "--help"]).output
        for line in split_commands("\n".join(re.split(r"^ Examples?:\s*$", shown, flags=re.M)[1:])):
            yield Command(f"radhpc {name} --help", line)


@cache
def commands() -> list[Command]:
    found = [Command(name_of(page), line) for page in PAGES + HABITS for text in fences(page, "sh", "bash")
             for line in split_commands(text)]  # fmt: skip
    found += [Command(name_of(page), line) for page in PAGES + HABITS for line in inline_code(page)]
    for path in SETTINGS:
        comment = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
        text = "\n".join(re.findall(r"^#   ((?:radhpc|python|    ).*)$", comment[0] if comment else "", re.M))
        found += [Command(name_of(path), line) for line in split_commands(text)]
    return found + list(help_examples())


def check_line(line: str) -> None:
    """Assert that a command is one that can be typed. Raises whatever is wrong with it."""
    words = shlex.split(line)
    if words[0] == "radhpc":
        check_verb(words[1:])
    elif words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
        assert {word for word in words[1:] if "=" not in word} <= targets, words[1:]
        variables = {word.partition("=")[0] for word in words[1:] if "=" in word}
        assert variables <= set(re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text(), re.M)), variables
    elif words[:2] == ["python", "-m"]:
        check_module(words[2], [word for word in words[3:] if word.startswith("--")])
    elif words[0] == "cp":
        assert (ROOT / words[1]).exists(), words[1]
    elif words[:2] == ["pip", "install"]:
        extras = set(re.findall(r"\[([a-z]+)\]", line))
        declared = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
        assert extras <= set(re.findall(r"^([a-z]+) =$", declared, re.M)), extras
    elif words[0] == "python":
        assert (ROOT / words[1]).exists(), words[1]
    elif words[0] == "apptainer":
        assert (ROOT / words[-1]).exists(), words[-1]
    else:
        assert line == "source .venv/bin/activate", "a kind of command that this test does not know"


def check_module(name: str, options: list[str]) -> None:
    if name == "bench.NAME":
        return
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    text = Path(spec.origin).read_text(encoding="utf-8") + (ROOT / "bench" / "report.py").read_text(encoding="utf-8")
    for option in (option.partition("=")[0] for option in options):
        as_argument = rf"^    {option[2:].replace('-', '_')}: Annotated"  # how Typer names it
        assert f'"{option}"' in text or re.search(as_argument, text, re.M), f"{name} has no {option}"


def check_verb(words: list[str]) -> None:
    """Parse the words as the command line does, then look up what they name."""
    known = dict(verbs())
    if words[0].startswith("-"):
        assert words == ["--help"]
        return
    if words[0] == "VERB":
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in known else words[0]
    assert name in known, f"radhpc has no verb {name}"
    command, rest = known[name], words[len(name.split()) :]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        assert not word.startswith("--") or word.partition("=")[0] in {*options, "--help"}, f"{name} has no {word}"
    if "--help" in rest:
        return
    with command.make_context(name, list(rest), resilient_parsing=not rest) as context:
        values = context.params
    check_values(name, values)


def check_values(verb: str, values: dict[str, Any]) -> None:
    """Recipes, profiles, datasets and keys that a command names exist."""
    on = values.get("on")
    if on and on not in OWN_FILES:
        profiles.load(on)
    recipe, changes = values.get("recipe"), list(values.get("overrides") or [])
    if verb == "quickstart":
        recipe, changes = "quickstart", ["shards=[runs/phantom]", *changes]
    if verb == "sweep":
        sweep = values["sweep"]
        if str(sweep) not in OWN_FILES:
            resources.find_recipe(sweep, "sweeps")
    elif verb == "evaluate":
        allowed = {row["key"] for row in keys()}
        assert all(f"evaluation.{change.partition('=')[0]}" in allowed for change in changes), changes
    elif verb == "build" and values.get("dataset"):
        if values["dataset"] == "myarchive":  # the example of a plugin
            return
        assert values["dataset"] in registry.names(), values["dataset"]
        pairs = dict(option.split("=", 1) for option in values.get("options") or [])
        reader.parse_options(values["dataset"], registry.reader(values["dataset"]).OPTIONS, pairs)
    elif recipe is not None and str(recipe) not in OWN_FILES:
        recipes.load(recipe, changes)
    if verb == "recipes copy" and values["name"] not in OWN_FILES:
        assert values["name"] in resources.recipe_names(), values["name"]
    if verb == "schema" and values.get("key") not in (None, "KEY", "SECTION"):
        assert values["key"] in {row["key"] for row in keys()}, values["key"]


def test_every_command_of_the_pages_can_be_typed() -> None:
    assert len(commands()) > 200
    assert len(list(help_examples())) > 20
    faults = []
    for command in commands():
        try:
            check_line(command.line)
        except (Exception, SystemExit) as error:
            faults.append(f"{command.place}: {command.line}\n    {type(error).__name__}: {error}")
    assert not faults, "\n".join(faults)


# Lines of the pages that run here, in this order: what is replaced in them, what is added, and the exit status.
SMALL = ["studies=30", "size=64", "--longest-side", "64"]
BRIEF = ["shards=[runs/phantom]", "stages.align.epochs=1", "stages.reports.epochs=1", "evaluation.samples=2"]
OWN = ["stages.scratch.epochs=1", "stages.adapt.epochs=1", "evaluation.samples=2", "evaluation.max_new_tokens=4"]
STORY: list[tuple[str, dict[str, str], list[str], int]] = [
    ("radhpc --help", {}, [], 0),
    ("radhpc recipes", {}, [], 0),
    ("radhpc recipes copy image_text mine.yaml", {}, [], 0),
    ("radhpc schema stages.optimizer", {}, [], 0),
    ("radhpc build padchest", {}, [], 2),
    ("radhpc build phantom --out runs/phantom", {}, SMALL, 0),
    ("radhpc verify /data/shards/padchest", {"/data/shards/padchest": "runs/phantom"}, [], 0),
    ("radhpc weights gla", {}, [], 1),
    ("radhpc plan image_text --on ~/a100.yaml", {"--on ~/a100.yaml": "--on inline"}, [], 0),
    ("radhpc train tiny/gla --on local --watch", {"--on local --watch": "--run runs/gla"}, BRIEF, 0),
    ("radhpc status", {}, [], 0),
    ("radhpc status RUN --audit", {"RUN": "runs/gla"}, [], 0),
    ("radhpc stop RUN", {"RUN": "runs/gla"}, [], 2),
    ("radhpc resume RUN", {"RUN": "runs/gla"}, [], 2),
    ("radhpc build image_text --raw /data/cxr_notes --out runs/image-text-shards", {"/data/": ""}, [], 0),
    ("python -m radhpc.data.stream image_text --show 3", {}, [], 0),
    ("radhpc train image_text --on local --watch", {"image_text": "image_text --run runs/own"}, OWN, 0),
    ("radhpc generate RUN --image /data/cxr_notes/images/0039.jpg", {"RUN": "runs/own", "/data/": ""}, [], 0),
    ("radhpc index RUN", {"RUN": "runs/own"}, [], 0),
    ("radhpc recipes copy quickstart", {}, [], 0),
    ("radhpc train mine.yaml stages.adapt.epochs=1 seed=2", {"mine": "absent"}, [], 2),
]
# Why the other lines do not run here. Only their words are checked. Of the lines on pages written by hand,
# at most MOST_NOT_RUN may be so: the number may only shrink.
NOT_RUN = {
    r" --on (?!local|inline)|^radhpc (doctor|profile)|slurm\.box": "needs a SLURM: tests marked box run these verbs",
    r"^radhpc build": "needs an archive behind a licence: each reader has tests on drawn ones in tests/shards/datasets",
    r"^radhpc (verify|plan|weights|schema|status|stop|resume|generate|export|logs|recipes)": "runs with other words in "
    "the story, or in tests/radhpc/cli and tests/slurm",
    r"^radhpc (board|demo)": "serves until Ctrl-C: tests/radhpc/serving opens the pages in a browser",
    r"^radhpc (quickstart|train|sweep|index|evaluate)": "trains for minutes, or runs shorter in the story and in "
    "tests/test_quickstart.py, test_families.py and tests/slurm/sweep",
    r"^python -m bench": "measures for minutes on an idle machine: tests/bench has short forms",
}
MOST_NOT_RUN = 73


@pytest.mark.parametrize("line", [line for line, *_ in STORY])
def test_the_story_is_told_in_the_pages(line: str) -> None:
    assert line in {command.line for command in commands()}


def test_what_does_not_run_has_a_reason() -> None:
    story = {line for line, *_ in STORY}
    others = {c.line for c in commands() if c.line.startswith(("radhpc ", "python ")) and c.line not in story}
    reasons = {line: [pattern for pattern in NOT_RUN if re.search(pattern, line)] for line in others}
    assert not [line for line, patterns in reasons.items() if not patterns]
    assert {pattern for patterns in reasons.values() for pattern in patterns} == set(NOT_RUN), "a reason without a line"
    by_hand = [name_of(page) for page in PAGES if not page.read_text(encoding="utf-8").startswith("<!-- Generated")]
    written = others & {command.line for command in commands() if command.place in by_hand}
    assert len(written) <= MOST_NOT_RUN, "run a new line in STORY, or remove it from the pages"


def write_own_images(folder: Path) -> None:
    """The folder of README's "Your own images": a table of images, reports and patients."""
    (folder / "images").mkdir(parents=True)
    rows = ["image,text,patient"]
    for number in range(40):
        gray = np.random.default_rng(number).integers(0, 256, (150, 130), dtype=np.uint8)
        Image.fromarray(gray).save(folder / "images" / f"{number:04}.jpg")
        side = ("left", "right")[number % 2]
        rows.append(f"images/{number:04}.jpg,Findings: effusion on the {side}. Impression: {side} effusion.,{number}")
    (folder / "table.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.timeout(1200)  # minutes where the cores are shared
def test_the_story_runs(tmp_path: Path) -> None:
    write_own_images(tmp_path / "cxr_notes")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # for python -m in another folder than the checkout
    for line, replaced, added, expected in STORY:
        for old, new in replaced.items():
            line = line.replace(old, new)
        program, *words = shlex.split(line)
        start = [sys.executable, *([str(ROOT / "launch.py")] if program == "radhpc" else [])]
        done = subprocess.run(
            [*start, *words, *added], cwd=tmp_path, env=environment,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == expected, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr, f"{line}\n{done.stderr}"
    assert all((tmp_path / name).is_file() for name in ("mine.yaml", "quickstart.yaml"))
    assert list((tmp_path / "runs" / "own" / "evaluation").glob("step-*/report.html"))


def test_examples_in_yaml_are_valid(tmp_path: Path) -> None:
    """A recipe, a profile and a sweep that a page shows can be used as they stand."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "quickstart.yaml").write_bytes((ROOT / "recipes" / "quickstart.yaml").read_bytes())
    path = tmp_path / "sweeps" / "example.yaml"
    seen = set()
    for page in PAGES:
        for block in fences(page, "yaml"):
            path.write_text(block)
            data = yaml.safe_load(block)
            if "space" in data:
                sweeps.load(path)
            elif "stages" in data:
                recipes.load(path)
            elif "cluster" in data:
                profiles.load(str(path))
            else:
                assert set(data) <= {*profiles.Profile.model_fields, *(row["key"] for row in keys())}, page
                continue
            seen.add(next(key for key in ("space", "stages", "cluster") if key in data))
    assert seen == {"space", "stages", "cluster"}


def test_the_example_of_a_reader_reads(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a.txt").write_text("No effusion.")
    blocks = list(fences(DOCS / "plugins.md", "python"))
    assert len(blocks) == 2
    for block in blocks:
        names: dict[str, Any] = {"__name__": "example"}
        exec(compile(block, "plugins.md", "exec"), names)
        if "read" in names:
            studies = list(names["read"](tmp_path, names["OPTIONS"]()))
            assert studies[0].report.findings == "No effusion."


def slug(heading: str) -> str:
    return re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def anchors(path: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", text, re.M)}


def test_links_lead_somewhere() -> None:
    for page in PAGES + HABITS:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            other = (page.parent / name).resolve() if name else page
            assert other.exists(), f"{name_of(page)}: {target}"
            if anchor:
                assert anchor in anchors(other), f"{name_of(page)}: {target}"


def test_every_page_stands_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"[\w/-]+\.md", text.partition("nav:")[2])
    assert sorted(listed) == sorted(
        str(page.relative_to(DOCS)) for page in PAGES[1:] if "measurements" not in page.parts
    )
    assert "font: false" in text  # nothing is fetched from outside
    assert "http" not in text.partition("nav:")[2]


def test_pages_are_short() -> None:
    assert len(README.read_text().splitlines()) <= 130
    for block in fences(README, "sh", "text"):  # what a terminal of 80 columns shows without breaking it
        assert max(map(len, block.splitlines())) <= 80, block
    for page in PAGES:
        assert len(page.read_text().splitlines()) <= 250, page


def test_generated_pages_are_fresh() -> None:
    late = generator().outdated()
    assert not late, f"python docs/generate.py writes {', '.join(late)}"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_of_a_recipe_has_its_row() -> None:
    text = (DOCS / "reference.md").read_text()
    repeated = tuple(f"{name}." for name in generator().REPEATED)
    for row in keys():
        assert f"| `{row['key']}` |" in text or row["key"].startswith(repeated), row["key"]


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("no git here")
    return [ROOT / name for name in done.stdout.splitlines() if (ROOT / name).is_file()]


def test_nobody_is_told_to_install_from_an_index() -> None:
    """The name is on no index, so whoever registered it there could run code here."""
    told = re.compile(r"pip3? install (?!.*(--no-index|--find-links|-e )).*\bradhpc\b|['\"]radhpc\[[a-z,]+\]")
    for path in tracked("*.py", "*.md", "*.yaml", "*.yml", "*.cfg", "*.toml", "*.def", "Makefile"):
        if path.name not in (Path(__file__).name, "test_wheel.py"):  # they look for it
            fault = told.search(path.read_text(encoding="utf-8"))
            assert not fault, f"{name_of(path)}: {fault and fault[0]}"


@pytest.mark.parametrize("path", [*PAGES, *SETTINGS], ids=name_of)
def test_the_installed_command_is_what_is_shown(path: Path) -> None:
    assert not re.search(r"python3? launch\.py", path.read_text(encoding="utf-8"))


def test_paths_and_modules_in_the_pages_exist() -> None:
    groups = {"radhpc.families", "radhpc.datasets"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for path in re.findall(r"(?<![\w/.])(?:radhpc|slurm|shards|bench|tests|recipes|containers)/[\w/]+\.\w+", text):
            assert (ROOT / path).exists(), f"{name_of(page)}: {path}"
        for module in re.findall(r"(?<![\w/.-])(?:radhpc|slurm|shards|bench)\.[a-z_.]+[a-z_](?![\w(/])", text):
            if module.endswith((".sif", ".sqsh", ".md", ".py", ".def", ".yaml", ".yml")) or module in groups:
                continue
            names = module.split(".")
            assert any((ROOT / Path(*names[:n])).with_suffix(".py").exists() or (ROOT / Path(*names)).is_dir()
                       for n in (len(names), len(names) - 1)), f"{name_of(page)}: {module}"  # fmt: skip


def test_the_readme_shows_the_tree_as_it_is() -> None:
    text = README.read_text()
    for folder in ("recipes", "shards", "slurm", "radhpc", "bench", "tests", "docs", "containers"):
        assert re.search(rf"^{folder}/ ", text, re.M), folder
    rooms = {path.name for path in (ROOT / "radhpc").iterdir() if (path / "__init__.py").exists()}
    assert rooms == set(re.findall(r"(?<![\w/])([a-z]+)/", text.partition("radhpc/ ")[2].partition("bench/")[0]))
    for room in rooms:
        assert f"`{room}`" in (DOCS / "architecture.md").read_text(), room


def literals() -> str:
    """All text of the product's strings, with ... where a value is put in."""
    parts = []
    product = [path for package in ("radhpc", "slurm", "shards") for path in (ROOT / package).rglob("*.py")]
    for path in [ROOT / "launch.py", *product]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts.append(node.value)
    return "\n".join(parts)


def test_the_messages_of_the_troubleshooting_page_are_ours() -> None:
    text, makefile = literals(), (ROOT / "Makefile").read_text()
    rows = re.findall(r"^\| (.*?) \|", (DOCS / "troubleshooting.md").read_text(), re.M)
    quickstart = re.findall(r"^(Done in .*|See it: .*)$", README.read_text(), re.M)
    assert len(quickstart) == 2
    for row in [*rows, *(f"`{re.sub(r'runs/[^ ]+', '...', line)}`" for line in quickstart)]:
        for message in re.findall(r"`([^`]+)`", row):
            for piece in re.split(r"'?\.\.\.'?|\(", message):
                words = piece.strip(" ':;,?.")
                assert len(words) < 8 or words in text or words in makefile, f"{message}: {words}"


def test_every_verb_has_help_that_is_whole() -> None:
    for name, command in verbs():
        assert inspect.cleandoc(command.help or ""), name

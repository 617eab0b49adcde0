"""List and copy the recipes that come with radhpc, and explain every key: recipes, recipes copy, schema.

The names of the recipes and the reference of the keys enter; tables for people and JSON for programs leave.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from radhpc.cli.common import TRAINING, Json, app, emit, say, verb, with_examples
from radhpc.core import resources
from radhpc.core.errors import UserError, nearest

SWEEPS = "sweeps/"  # the folder of recipes/ whose files are sweeps over the others

commands = typer.Typer(invoke_without_command=True)
app.add_typer(commands, name="recipes", rich_help_panel=TRAINING)


@commands.callback()
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """List the recipes that come with radhpc; with `copy`, make one your own."""
    if context.invoked_subcommand is not None:
        return
    rows = [
        {
            "name": name,
            "kind": "sweep" if name.startswith(SWEEPS) else "recipe",
            "what": summary(resources.recipes() / f"{name}.yaml"),
        }
        for name in resources.recipe_names()
    ]
    for kind, use in (("recipe", "radhpc train NAME"), ("sweep", "radhpc sweep NAME")):
        table = Table(kind, f"for `{use}`", box=SIMPLE_HEAD, pad_edge=False)
        table.columns[0].no_wrap = True
        for row in rows:
            if row["kind"] == kind:
                table.add_row(Text(row["name"]), Text(row["what"]))
        say(table, as_json)
    say("radhpc recipes copy NAME makes a copy to edit; radhpc schema explains every key.", as_json)
    emit({"recipes": rows}, as_json)


@commands.command(cls=with_examples("radhpc recipes copy quickstart", "radhpc recipes copy gla my-gla.yaml"))
def copy(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name that 'radhpc recipes' lists.")],
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="The new file, or a folder for it; default: NAME.yaml here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Copy a recipe or a sweep to a file of your own. A file that exists is never replaced."""
    names = resources.recipe_names()
    chosen = name.removeprefix("recipes/").removesuffix(".yaml")
    chosen = chosen if chosen in names else f"{SWEEPS}{chosen}"
    if chosen not in names:
        raise UserError(f"{name}: no such recipe{nearest(name, names)}; 'radhpc recipes' lists them")
    file_name = f"{chosen.rpartition('/')[2]}.yaml"
    target = out or Path(file_name)
    target = target / file_name if target.is_dir() else target
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(_own_copy(chosen, target))
    except FileExistsError as error:
        raise UserError(f"{target}: exists; name another file") from error
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from error
    use = "sweep" if chosen.startswith(SWEEPS) else "train"
    say(f"{target}: edit it, then 'radhpc {use} {target}'", as_json)
    emit({"recipe": str(target.absolute())}, as_json)


@verb(TRAINING, "radhpc schema", "radhpc schema stages.optimizer")
def schema(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Only this key and those below it, such as evaluation.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Explain every key of a recipe: its type, its default and its meaning."""
    from radhpc.core.recipe.reference import keys

    rows = keys()
    if key is not None:
        chosen = [row for row in rows if row["key"] == key or row["key"].startswith(f"{key}.")]
        if not chosen:
            raise UserError(f"{key}: no key of a recipe{nearest(key, [row['key'] for row in rows])}")
        rows = chosen
    say(_explained(rows), as_json)
    emit({"keys": rows}, as_json)


def summary(path: Path) -> str:
    """Return the first sentence of a recipe's opening comment."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# "):
            break
        words += line[1:].split()
    return re.split(r"(?<=[^.][.?!])\s", " ".join(words), maxsplit=1)[0]


def _own_copy(name: str, target: Path) -> str:
    """Return a recipe's text for another place: its commands name the copy, and a sweep names its recipe."""
    text = (resources.recipes() / f"{name}.yaml").read_text(encoding="utf-8")
    text = text.replace(f"recipes/{name}.yaml", str(target))
    return re.sub(r"^recipe: \.\./(\S+)\.yaml", r"recipe: \1", text, flags=re.MULTILINE)


def _explained(rows: list[dict[str, Any]]) -> Iterator[Padding | Text]:
    """Return two lines for each key, which wrap; an empty line stands before each section."""
    for row in rows:
        section = "section" in row["type"]
        default = {"required": ", required", "as below": ""}.get(row["default"], f", default {row['default']}")
        if section:
            yield Text()
        head = Text.assemble((row["key"], "bold underline" if section else "bold"), f"  {row['type']}{default}")
        yield Padding(head, 0, expand=False)  # wraps, which a text alone does not
        yield Padding(Text(row["meaning"]), (0, 0, 0, 4))

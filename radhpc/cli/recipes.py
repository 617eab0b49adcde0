"""What can be trained, and what a recipe may say: recipes, schema."""

from pathlib import Path
from typing import Annotated, Any

import typer

from radhpc.cli.common import Json, app, emit, say
from radhpc.core import resources
from radhpc.core.errors import UserError, nearest

commands = typer.Typer(invoke_without_command=True, help="The recipes that come with radhpc, and copies to edit.")
app.add_typer(commands, name="recipes", rich_help_panel="Training")


@commands.callback(epilog="Example: radhpc recipes")
def recipes(context: typer.Context, as_json: Json = False) -> None:
    """The recipes that come with radhpc: `radhpc train NAME` trains one, `radhpc recipes copy NAME` copies it."""
    if context.invoked_subcommand is not None:
        return
    rows = [{"name": name, "what": _summary(resources.recipes() / f"{name}.yaml")} for name in resources.recipe_names()]
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        say(f"{row['name']:{width}}  {row['what']}", as_json)
    emit({"recipes": rows}, as_json)


@commands.command(epilog="Example: radhpc recipes copy quickstart my.yaml")
def copy(
    name: Annotated[str, typer.Argument(help="As 'radhpc recipes' lists it.")],
    out: Annotated[Path | None, typer.Argument(help="The new file; default: NAME.yaml in this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Copy a recipe to a file of your own."""
    names = resources.recipe_names()
    if name not in names:
        raise UserError(f"{name}: no such recipe{nearest(name, names)}; 'radhpc recipes' lists them")
    target = out or Path(f"{name.rpartition('/')[2]}.yaml")
    if target.is_dir():
        target = target / f"{name.rpartition('/')[2]}.yaml"
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write((resources.recipes() / f"{name}.yaml").read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UserError(f"{target}: exists; name another file") from error
    except OSError as error:
        raise UserError(f"{target}: {error.strerror}") from error
    say(f"{target}: edit it, then 'radhpc train {target}'", as_json)
    emit({"recipe": str(target.absolute())}, as_json)


@app.command(rich_help_panel="Training", epilog="Examples: radhpc schema   radhpc schema stages.optimizer")
def schema(
    key: Annotated[str | None, typer.Argument(help="Only this key and those below it, such as evaluation.")] = None,
    as_json: Json = False,
) -> None:
    """Every key of a recipe: its type, its default and what it means."""
    from radhpc.core.recipe.reference import keys

    rows: list[dict[str, Any]] = keys()
    if key is not None:
        chosen = [row for row in rows if row["key"] == key or row["key"].startswith(f"{key}.")]
        if not chosen:
            raise UserError(f"{key}: no key of a recipe{nearest(key, [row['key'] for row in rows])}")
        rows = chosen
    for row in rows:
        say(f"[bold]{row['key']}[/]  {row['type']}, default {row['default']}\n    {row['meaning']}", as_json)
    emit({"keys": rows}, as_json)


def _summary(path: Path) -> str:
    """The first line of a recipe's opening comment."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""

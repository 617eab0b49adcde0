"""What all verbs have in common: the app they belong to, arguments of one name, words for people and for programs.

@app.command()
def verb(run: RunPath, as_json: Json = False) -> None:
    say("for people", as_json)
    emit({"for": "programs"}, as_json)
"""

import getpass
import json
import socket
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from radhpc.core.errors import UserError
from radhpc.core.log import console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train radiology vision-language models on SLURM clusters: from raw archives to reports, through every "
    "preemption. First steps: [bold]quickstart[/] does it all on this machine in minutes; then [bold]build[/] your "
    "data and [bold]train[/] a recipe. Research use only, not for clinical use.",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for programs.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that 'radhpc recipes' lists.")
]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as seed=1.")]
On = Annotated[
    str, typer.Option("--on", metavar="PROFILE", help="inline, local, box, a name in slurm/profiles/, or a file.")
]


def new_run(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def from_elsewhere(port: int) -> str:
    """How a browser on another machine reaches a port on this one's loopback."""
    return f"from elsewhere: ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    if value not in allowed:
        raise UserError(f"{option} {value}: allowed are {', '.join(allowed)}")
    return value


def pairs(options: Iterable[str] | None) -> dict[str, str]:
    pairs = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"option '{option}': allowed is key=value")
        pairs[key] = value
    return pairs


def say(what: RenderableType | Iterator[Any], as_json: bool) -> None:
    """Text for people: on standard output, or on standard error where that belongs to the JSON."""
    out = console if as_json else Console(highlight=False)
    for part in what if isinstance(what, Iterator) else (what,):
        out.print(part, soft_wrap=isinstance(part, str))


def emit(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result), flush=True)

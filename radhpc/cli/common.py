"""Hold what all verbs share: the app, the decorator that registers a verb, common arguments, and output in two forms.

@verb(MONITORING, "radhpc count RUN", "radhpc count RUN --json")     # the panel of the help, and examples
def count(run: RunPath, as_json: Json = False) -> None:
    say("3 runs", as_json)                  # for people
    emit({"runs": 3}, as_json)              # for programs, with --json
"""

import contextlib
import functools
import getpass
import inspect
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console, RenderableType
from rich.text import Text
from typer.core import TyperCommand

from radhpc.core.errors import UserError
from radhpc.core.log import console
from radhpc.core.ownership.folder_lock import beside, hold

TRAINING, DATA, MONITORING = "Training", "Data", "Monitoring"
MODELS, PREFLIGHT = "Trained models", "Before submitting"

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)

Verb = TypeVar("Verb", bound=Callable[..., None])

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line, for programs.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")]
RecipePath = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A YAML file, or a name that 'radhpc recipes' lists.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Changes to the recipe, such as seed=1.")
]
On = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="PROFILE",
        help="Where to run: inline (in this process), local (ranks on this machine), a profile in slurm/profiles/, or "
        "a YAML file.",
    ),
]


until_the_end = contextlib.ExitStack()  # of what the command holds


def _print_version(requested: bool) -> None:
    if not requested:
        return
    try:
        print(f"radhpc {version('radhpc')}")
    except PackageNotFoundError:
        print("radhpc, not installed: it runs from a checkout")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train radiology vision-language models on SLURM clusters: from raw archives to reports, through every preemption.

    First steps: [bold]quickstart[/] does it all on this machine in minutes; then [bold]build[/] your data and
    [bold]train[/] a recipe. Research use only, not for clinical use.
    """


def verb(panel: str, *examples: str) -> Callable[[Verb], Verb]:
    """Register a function as a verb, in a panel of the help and with examples below its own help.

    The docstring is the help. A backslash and a newline continue an example on the next line.
    """

    def register(function: Verb) -> Verb:
        text = help_text(function.__doc__ or "")

        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with until_the_end:
                return function(*arguments, **options)

        app.command(help=text, cls=with_examples(*examples), rich_help_panel=panel)(run)
        return function

    return register


def help_text(docstring: str) -> str:
    """Join the lines of each paragraph: Typer keeps their ends, in the middle of sentences."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(docstring).split("\n\n"))


def with_examples(*examples: str) -> type[TyperCommand]:
    """Return a class of commands whose help ends with these lines as they are: Typer would wrap or join an epilog's,
    and an example could not be pasted.
    """

    class Command(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            super().format_help(ctx, formatter)
            lines = [line for example in examples for line in example.splitlines()]
            typer.echo(
                "\n".join(
                    [" Examples:" if len(examples) > 1 else " Example:", "", *(f"  {line}" for line in lines), ""]
                )
            )

    return Command


def new_run(name: str) -> Path:
    """Return a fresh run folder's path in runs/, named after the recipe and the time."""
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def keep_to_this_command(path: Path, verb: str) -> None:
    """Keep other commands from a folder or file, there or not, until this one ends. Raises UserError."""
    until_the_end.enter_context(hold(beside(path), verb))


def from_elsewhere(port: int) -> str:
    """Return the command by which a browser on another machine reaches a port on this machine's loopback."""
    return f"from elsewhere: ssh -N -L {port}:127.0.0.1:{port} {getpass.getuser()}@{socket.gethostname()}"


def one_of(option: str, value: str, allowed: tuple[str, ...]) -> Any:
    """Return the value of an option. Raises UserError for one that is not allowed."""
    if value not in allowed:
        raise UserError(f"{option} {value}: allowed are {', '.join(allowed)}")
    return value


def pairs(options: Iterable[str] | None) -> dict[str, str]:
    """Split KEY=VALUE arguments. Raises UserError for one without an equals sign."""
    pairs = {}
    for option in options or []:
        key, equals, value = option.partition("=")
        if not equals:
            raise UserError(f"option '{option}': allowed is key=value")
        pairs[key] = value
    return pairs


def say(message: RenderableType | Iterator[Any], as_json: bool) -> None:
    """Print for people: on standard output, or on standard error where standard output belongs to the JSON."""
    out = console if as_json else Console(highlight=False)
    for part in message if isinstance(message, Iterator) else (message,):
        out.print(part, soft_wrap=isinstance(part, str | Text))


def emit(result: dict[str, Any], as_json: bool) -> None:
    """Print for programs: one line of JSON, where that was asked for."""
    if as_json:
        print(json.dumps(result), flush=True)

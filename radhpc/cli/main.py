"""Run the command `radhpc`: from raw archives to shards, from a recipe to a job, and everything that follows.

PyTorch is imported only where a model is.
"""

import sys

from rich.text import Text

from radhpc.cli.common import app
from radhpc.core.errors import UserError
from radhpc.core.log import console, start_logging
from radhpc.core.untrusted import printable

# Each registers its verbs with the app, in the order in which the help shows them.
from radhpc.cli import training, data, monitor, models, preflight, recipes  # noqa: F401  # isort: skip


def main() -> None:
    """Exit status 0 done, 1 failed, 2 the user's mistake: one line and no traceback."""
    start_logging()
    try:
        app(prog_name="radhpc")
    except UserError as error:
        message = str(error)  # names of files and words of others are in it: no markup, and nothing a terminal obeys
        console.print(Text.assemble(("error", "red"), f" {printable(message, len(message))}"), soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

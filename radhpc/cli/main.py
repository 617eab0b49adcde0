"""Run the command `radhpc`: from raw archives to shards, from a recipe to a job, and everything that follows.

PyTorch is imported only where a model is.
"""

import sys

from radhpc.cli.common import app
from radhpc.core.errors import UserError
from radhpc.core.log import console, start_logging

# Each registers its verbs with the app, in the order in which the help shows them.
from radhpc.cli import training, data, monitor, models, preflight, recipes  # noqa: F401  # isort: skip


def main() -> None:
    """Exit status 0 done, 1 failed, 2 the user's mistake: one line and no traceback."""
    start_logging()
    try:
        app(prog_name="radhpc")
    except UserError as error:
        console.print(f"[red]error[/] {error}", soft_wrap=True, highlight=False, markup=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

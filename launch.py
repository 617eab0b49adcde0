"""radhpc's command line: raw archives to shards, a recipe to a job, and everything that follows.

`python launch.py --help`, also installed as `radhpc`. The verbs are in verbs/, each a few calls into the packages
`shards` (data preparation), `slurm` (where jobs run) and `radhpc` (what runs inside them). PyTorch is imported only
where a model is.
"""

import sys

from radhpc.errors import UserError
from radhpc.log import console, start as start_log
from verbs.face import app

# Each registers its verbs with the app, in the order in which the help shows them.
from verbs import training, data, watching, models, beforehand  # noqa: F401  # isort: skip


def main() -> None:
    """Exit status 0 done, 1 failed, 2 the user's mistake: one line and no traceback."""
    start_log()
    try:
        app()
    except UserError as error:
        console.print(f"[red]error[/] {error}", soft_wrap=True, highlight=False, markup=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

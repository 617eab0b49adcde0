"""One rank that interrupts each run in the second step of its second stage, and then runs it to its end.

python -m tests.radhpc.models.interrupted_runs RUN ...      # for every rank, with torchrun's variables
"""

import os
import sys
from typing import Any

from radhpc import worker
from radhpc.distributed.stop import Interrupted
from radhpc.training import loop

INTERRUPTED_STEP = 4  # the second step of the second stage
agree = loop._agree


def live(run: str) -> str:
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)  # a life's store may outlive it
    return worker.run(run).state


def main() -> None:
    for run in sys.argv[1:]:
        steps = []

        def interrupt(step: Any, *others: Any, steps: list[int] = steps) -> Any:
            steps.append(step.number)
            if len(steps) == INTERRUPTED_STEP:
                raise Interrupted("SIGTERM")
            return agree(step, *others)

        loop._agree = interrupt
        assert live(run) == "interrupted"
        loop._agree = agree
        assert live(run) == "finished"


if __name__ == "__main__":
    main()

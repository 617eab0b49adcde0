"""Run one rank of a run whose checkpoints lie on a slow disk.

python -m tests.radhpc.training.slow_rank RUN SECONDS      # SECONDS that the tensors of each checkpoint take
"""

import sys
import time
from collections.abc import Iterable, Iterator

from radhpc import worker
from radhpc.core.errors import UserError
from radhpc.engine import checkpoint
from radhpc.storage.checkpoint_storage import Buffer, FolderStorage
from tests.waiting import wait_for


class SlowFolder(FolderStorage):
    """A real folder on a disk that needs `seconds` for the tensors of each checkpoint."""

    seconds = 1.0
    spans: list[tuple[float, float]] = []

    def put(self, name: str, file: str, pieces: Iterable[Buffer]) -> None:
        if not file.endswith(".safetensors"):
            super().put(name, file, pieces)
            return
        started = time.monotonic()

        def slowly() -> Iterator[Buffer]:
            for n, piece in enumerate(pieces):
                until = started + min(1.0, n / 100) * self.seconds  # a state of a hundred pieces
                wait_for(lambda until=until: time.monotonic() >= until)  # type: ignore[misc]
                yield piece

        try:
            super().put(name, file, slowly())
        finally:
            self.spans.append((started, time.monotonic()))


def main() -> None:
    checkpoint.FolderStorage = SlowFolder  # type: ignore[misc]
    SlowFolder.seconds = float(sys.argv[2])
    try:
        worker.run(sys.argv[1])
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

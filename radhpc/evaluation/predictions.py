"""Keeps what an evaluation has generated so far: a preemption loses none of it.

    generated/identity                  weights, data and decoding settings; another identity is another evaluation
    generated/rank-00000.jsonl          one line per batch: its rows, the studies that are damaged, loss and tokens

Each rank appends a batch to its own file and flushes it to the disk; a line that was cut by a crash does not count, and
the batch is made again. The next life, on any number of ranks, reads all the files and goes on with what is left.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from radhpc.core.files import append_line, open_append, read_lines, write_atomically

Batch = dict[str, Any]


class PredictionLog:
    """The predictions of one evaluation, as one rank writes them."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.path = folder, folder / f"rank-{rank:05d}.jsonl"

    def begin(self, identity: str) -> list[Batch]:
        """Return the batches of earlier lives; those of another identity are deleted. Before any rank appends."""
        known = self.folder / "identity"
        if not known.exists() or known.read_text() != identity:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(mode=0o700, parents=True)
            write_atomically(known, identity.encode(), 0o600)
        return [batch for path in sorted(self.folder.glob("rank-*.jsonl")) for batch in read_lines(path)]

    def append(self, batch: Batch) -> None:
        """Append a batch: complete and flushed to the disk, or not at all. Raises OSError."""
        descriptor = open_append(self.path)
        try:
            append_line(descriptor, json.dumps(batch).encode() + b"\n")
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

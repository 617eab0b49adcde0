"""Measure the memory of one real training step over the plan's own batch, in a process of its own.

python -m tests.radhpc.planning.measure_step RECIPE '["overrides", ...]' STAGE      # prints gigabytes

The peak is the kernel's figure for the process, less the memory before the model. Large blocks go straight back to the
system (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_), so it is the memory that was alive.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from radhpc.core import recipe as recipes
from radhpc.data.collate import StudyEncoder
from radhpc.data.source import Source
from radhpc.distributed.ranks import Ranks
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters
from radhpc.planning import forecast
from radhpc.planning.memory_trace import MemoryTrace


def memory(key: str) -> int:
    """Return a figure of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def step(path: Path, number: int, overrides: Sequence[str]) -> int:
    """Make one step; return the resident bytes before the model was built."""
    recipe = recipes.load(path, overrides)
    stage = recipe.stages[number]
    source = Source(recipe.shards, "train")
    with tempfile.TemporaryDirectory() as folder:
        family, _ = forecast.build_family(recipe, source, Path(folder))
    encoder = StudyEncoder(family, recipe.text, recipe.images)
    rows, _, _ = forecast.largest_rows(recipe, source, encoder, stage.micro_batch or 2, is_placeholder=False)
    before = memory("VmRSS")
    model = family.build(0)
    if stage.lora is not None:
        adapters.attach(model, stage.lora, 0)
    adapters.choose_trained(model, stage)
    engine = Engine(model, recipe, stage.optimizer, family.blocks, Ranks())
    batch = encoder.batch(rows)
    forecast.trace_step(engine, [batch, batch], MemoryTrace())  # never entered: real tensors need no trace
    return before


def main() -> None:
    path, overrides, number = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    step(path, number, [])  # the libraries and their own memory are loaded now
    before = step(path, number, overrides)
    print(json.dumps((memory("VmHWM") - before) / 1e9))


if __name__ == "__main__":
    main()

"""Runs inside the job: recipe, stream, models, engine, loop, checkpoints, evaluation.

Imports neither slurm nor shards.
"""

import logging
import os

# Read by OpenMP when torch is loaded. Its threads spin while they wait for each other, which on a CPU that is shared
# with any other busy process makes a training step up to ten times slower; sleeping threads cost next to nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# On a CPU it says what would be faster with one more library.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# transformers loads DeepSpeed where it is installed, which writes what it guesses of the device to standard output.
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)

"""Forecast a run's memory, for a process that has no memory left to do it itself: see training/out_of_memory.py.

python -m radhpc.planning RUN WORLD_SIZE      # prints [["stage", gigabytes per GPU], ...]
"""

import json
import sys

from radhpc.core.run_folder import RunFolder
from radhpc.planning.forecast import forecast

stages = forecast(RunFolder.open(sys.argv[1]).recipe(), int(sys.argv[2]))
print(json.dumps([[stage.name, stage.gigabytes_per_gpu] for stage in stages]))

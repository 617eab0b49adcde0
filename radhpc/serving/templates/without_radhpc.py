"""Run a script as on a machine without radhpc: `python -I without_radhpc.py SCRIPT ARGUMENTS...`.

`python -I` hides a checkout; an installed radhpc is hidden by name.
"""

import runpy
import sys

for name in ("radhpc", "shards", "slurm"):
    sys.modules[name] = None  # type: ignore[assignment]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")

"""Read a profile with whichever slurm this process imports: a run's frozen code, which may be older than this file.

    PYTHONSAFEPATH=1 PYTHONPATH=RUN/code python slurm/read_profile.py PROFILE.yaml

It uses nothing but slurm.profile.load, which every frozen code has.
"""

import sys

from slurm.profile import load

load(sys.argv[1])

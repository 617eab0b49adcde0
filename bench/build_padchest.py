"""The build whose memory bench/build.py measures: `python -m bench.build_padchest RAW OUT`.

Its shards are so small that even the short table has work for two workers.
"""

import sys
from pathlib import Path

from shards.build import BuildSettings, build

if __name__ == "__main__":
    build("padchest", Path(sys.argv[1]), sys.argv[2], {}, BuildSettings(workers=2, shard_samples=100))

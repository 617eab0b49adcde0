"""The command `radhpc` in a checkout: `python3 launch.py VERB`, for Pythons that have its libraries."""

import sys

try:
    from radhpc.cli.main import main
except ModuleNotFoundError as error:
    if error.name and error.name.split(".")[0] in ("radhpc", "slurm", "shards"):
        raise
    print(
        f"radhpc: this Python ({sys.executable}) has no {error.name}; run 'make install' and "
        "'source .venv/bin/activate', then 'radhpc VERB'",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    main()

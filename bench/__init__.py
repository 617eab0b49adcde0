"""Measurements against peers and against the machine's own limits: `python -m bench.NAME [--json] [--quick]`."""

"""Name a process for good: numbers are used again, together with the kernel's start time they are not."""

from pathlib import Path


def started_at(pid: int) -> str | None:
    """Return the kernel's start time of a living process; None where there is none, or only what is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def process_start(pid: int) -> str:
    """Return the kernel's start time of a process that lives."""
    start = started_at(pid)
    assert start is not None, pid
    return start

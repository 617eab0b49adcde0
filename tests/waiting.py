"""Waiting in tests: for a condition and a limited time, never for a number of seconds alone."""

import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def wait_for(condition: Callable[[], Result], seconds: float = 120, explain: Callable[[], str] = str) -> Result:
    """Return the condition's first true value. Looking takes at most a fifth of the time: what is waited for wants the
    processor, too. `explain` says more where the time is over.
    """
    end = time.monotonic() + seconds
    while True:
        started = time.monotonic()
        if result := condition():
            return result
        looked = time.monotonic()
        assert looked < end, f"waited longer than {seconds:g} s {explain()}"
        time.sleep(max(0.02, 4 * (looked - started)))

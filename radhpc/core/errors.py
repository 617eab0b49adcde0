"""Define the error for a user's mistake: one line that names the key or the file, its value, and what is allowed."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A user's mistake: shown without a traceback, exit status 2. Our own mistakes are assertions instead."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the closest allowed word, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return f" (did you mean '{close[0]}'?)" if close else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none, for logs and one-line answers."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

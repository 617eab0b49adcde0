"""Libraries without what they would load besides, and what nobody here asks them for.

    with without("sklearn", "scipy", "scipy.stats"):
        from nltk.stem.porter import PorterStemmer       # 0.25 s of processor time instead of 1.7

A rank starts anew after every preemption, and loads its libraries from a file system that many others use.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Let these modules not be found while others are imported; those that are loaded already stay where they are."""
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]

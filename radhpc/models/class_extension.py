"""Give a module of a living model another class: behaviour is added, and its parameters stay where they are.

    class Recomputing:                               # stands before the module's own class in the order of bases
        def forward(self, *arguments, **options): ... super().forward(*arguments, **options)

    layer = extend(layer, Recomputing)               # the same object, typed as a Recomputing

A wrapper module around it would change the names of parameters, and hooks do not see how forward() is called.
"""

from functools import cache
from typing import Any, TypeVar

from torch import nn

Extension = TypeVar("Extension")


def extend(module: nn.Module, extension: type[Extension]) -> Extension:
    """Add the methods of `extension` to a module in place, unless it has them, and return it.

    A subclass of the module's own class becomes its class. Any other class is put before its own class, in a new class
    that keeps the own one's name; attributes of the extension need defaults, as no __init__ runs.
    """
    if not isinstance(module, extension):
        untyped: Any = module
        before: Any = extension
        own: Any = type(module)
        untyped.__class__ = before if issubclass(before, own) else _combined(before, own)
    assert isinstance(module, extension)
    return module


def own_class(module: nn.Module, extension: type) -> type:
    """Return the class that a module had before extend() put `extension` before it."""
    bases = type(module).__mro__
    return bases[bases.index(extension) + 1]


@cache
def _combined(extension: Any, own: Any) -> Any:
    return type(own.__name__, (extension, own), {"__module__": own.__module__})

"""Find model families and dataset readers of other packages, announced by entry points.

    [project.entry-points."radhpc.families"]
    mymodel = "my_package.registration:ENTRY"        # a radhpc.core.families.FamilyEntry
    [project.entry-points."radhpc.datasets"]
    myarchive = "my_package.myarchive"               # a module as shards.datasets.reader.Reader describes it

Only a plugin that is asked for by name is imported.
"""

from collections.abc import Collection
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from radhpc.core.errors import UserError, first_line

FAMILIES, DATASETS = "radhpc.families", "radhpc.datasets"


def installed(group: str, built_in: Collection[str]) -> dict[str, EntryPoint]:
    """Return the entry points of a group by name. Raises UserError if two packages announce the same name, or one of
    them a name that is built in.
    """
    result: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in built_in:
            raise UserError(
                f"{group}: '{entry.name}' ({entry.value}) is built in; the package that announces it must take another "
                f"name than {', '.join(sorted(built_in))}"
            )
        other = result.setdefault(entry.name, entry)
        if other.value != entry.value:
            raise UserError(f"{group}: '{entry.name}' is announced twice, by {other.value} and by {entry.value}")
    return result


def load(entry: EntryPoint) -> Any:
    """Import the object that an entry point names. Raises UserError if that fails."""
    try:
        return entry.load()
    except Exception as error:
        raise UserError(f"plugin '{entry.name}' ({entry.value}) cannot be imported: {first_line(error)}") from error


def versions() -> dict[str, str]:
    """Return name and version of every distribution that announces a family or a reader."""
    entries = [entry for group in (FAMILIES, DATASETS) for entry in entry_points(group=group)]
    return {entry.dist.name: entry.dist.version for entry in entries if entry.dist is not None}

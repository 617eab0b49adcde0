"""Finds groups that are in several official splits: images with questions in two of them, articles with figures in two.

    groups = SharedGroups([("image 1", "train"), ("image 1", "test"), ("image 2", "train")])
    len(groups), groups.keeper("image 1", "train"), groups.keeper("image 2", "train")       # 1, "test", "train"

Results compare with published ones only on the complete test set, and are honest only if nothing of it is trained on.
So the test split keeps the groups that it shares, and the other splits lose them.
"""

from collections.abc import Iterable

from radhpc.core.sample import Split
from shards.tabular import external_sort

KEEPERS: tuple[Split, ...] = ("test", "validate", "train")  # the first of these keeps a shared group


class SharedGroups:
    """The groups that have members in several splits; they are stored on the disk."""

    def __init__(self, members: Iterable[tuple[str, Split]]) -> None:
        self._keepers = external_sort.Lookup(
            (group, min(splits, key=KEEPERS.index))
            for group, splits in external_sort.grouped(members)
            if len(set(splits)) > 1
        )

    def __len__(self) -> int:
        return len(self._keepers)

    def keeper(self, group: str, split: Split) -> Split:
        """Return the split that keeps the group; `split` itself where the group has only one."""
        kept: Split = self._keepers.get(group, split)
        return kept

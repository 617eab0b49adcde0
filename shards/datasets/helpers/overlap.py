"""What stands in several official splits at once: images with questions in two of them, articles with figures in two.

    overlap = Overlap([("image 1", "train"), ("image 1", "test"), ("image 2", "train")])
    len(overlap), overlap.keeper("image 1", "train"), overlap.keeper("image 2", "train")       # 1, "test", "train"

Results that were published on a test set can be compared as long as it stays whole, and are honest as long as
nothing of it is trained on. So the test split keeps what it shares, and the others lose it.
"""

from collections.abc import Iterable

from radhpc.core.sample import Split
from shards.tabular import external_sort

KEEPERS: tuple[Split, ...] = ("test", "validate", "train")  # who keeps what is shared


class SharedGroups:
    """The groups that have members in several splits; they lie on the disk."""

    def __init__(self, members: Iterable[tuple[str, Split]]) -> None:
        self._keepers = external_sort.Lookup(
            (group, min(splits, key=KEEPERS.index))
            for group, splits in external_sort.grouped(members)
            if len(set(splits)) > 1
        )

    def __len__(self) -> int:
        return len(self._keepers)

    def keeper(self, group: str, split: Split) -> Split:
        """The one split that keeps the group; `split` where that is the only one."""
        kept: Split = self._keepers.get(group, split)
        return kept

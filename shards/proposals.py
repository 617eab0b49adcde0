"""Proposes names that stand alone in the texts of finished shards, for a person to look at.

    proposals = propose_names("/data/shards/own", load_finder(folder), lambda done, total: None)
    proposals.counts, proposals.samples, proposals.file      # {"Margaret": 3}, 2, a private file to edit

The file lists each name and how often it was found, where its owner alone reads it. Those that are names go back into
`build --remove-names`; nothing is removed or called a fault because of a proposal.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from radhpc.core.files import write_atomically
from radhpc.core.manifest import Manifest
from radhpc.core.sample import Sample
from radhpc.storage.store import Store
from shards.text.names import Finder
from shards.verify import Progress


@dataclass(frozen=True)
class Proposals:
    """Names that a model found in the texts of a dataset."""

    counts: dict[str, int]  # by name
    samples: int  # with any
    file: Path | None  # the list, the most frequent first; None for no name


def propose_names(url: str, find: Finder, progress: Progress = lambda done, total: None) -> Proposals:
    """Look for names in all texts of a dataset. Raises UserError where it cannot be opened."""
    store = Store(url)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    counts: Counter[str] = Counter()
    samples = 0
    for row in range(len(index)):
        member = next(member for member in index.members(row) if member.name.endswith(".json"))
        data = store.read_range(manifest.shards[member.shard].name, member.offset, member.length)
        sample = Sample.model_validate_json(data)
        texts = (*sample.report.model_dump().values(), sample.question, sample.answer)
        names = [name for text in texts if isinstance(text, str) for name in find(text)]
        counts.update(names)
        samples += bool(names)
        progress(row + 1, len(index))
    store.close()
    return Proposals(dict(counts), samples, _write(manifest, counts) if counts else None)


def _write(manifest: Manifest, counts: Counter[str]) -> Path:
    """List the names where the user alone reads them: they may be patients'."""
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "radhpc" / "names"
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = state / f"{manifest.dataset}-{manifest.build_hash[:12]}.tsv"
    lines = [f"{name}\t{count}\n" for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    write_atomically(path, "".join(lines).encode(), 0o600)
    return path

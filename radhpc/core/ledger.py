"""Keep the ledger: the samples trained on, step by step, by every rank in every life of a run.

A rank appends one line after each optimizer step. A step whose checkpoint was lost (a hard kill) is trained
again in a later life and then stands in both; the weights have seen what the *last* life that
trained the step recorded, and the earlier line is a replay. Example line:

    {"stage": 0, "step": 17, "keys": ["padchest-8d…", …], "bad": [["padchest-3f…", "train-000007.tar: …"]]}
"""

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from radhpc.core.files import append_line, open_append, read_lines


def _whole(line: dict[str, Any]) -> bool:
    kinds = {"stage": int, "step": int, "keys": list, "bad": list}
    return all(isinstance(line.get(key), kind) for key, kind in kinds.items())


class Ledger:
    """The open ledger file of one rank in one life."""

    def __init__(self, folder: Path, life: int, rank: int) -> None:
        path = folder / f"life-{life:04d}.rank-{rank:05d}.jsonl"
        self._descriptor = open_append(path)

    def append(self, stage: int, step: int, keys: list[str], bad: list[tuple[str, str]]) -> None:
        """Record one step: its global number (from 1), the keys trained on, (key, reason) of unreadable ones."""
        line = json.dumps({"stage": stage, "step": step, "keys": keys, "bad": bad}) + "\n"
        append_line(self._descriptor, line.encode())

    def close(self) -> None:
        os.close(self._descriptor)


def bytes_by_life(folder: Path) -> dict[str, int]:
    """Return how much each life has written so far, by its number: whoever writes more later is not over."""
    sizes: dict[str, int] = defaultdict(int)
    for path in folder.glob("life-*.rank-*.jsonl"):
        sizes[str(int(path.name[5:].partition(".")[0]))] += path.stat().st_size
    return dict(sizes)


@dataclass
class ConsumedSamples:
    """The samples that the weights have seen, and the steps that were trained in vain."""

    steps: dict[int, list[str]] = field(default_factory=dict)  # keys of each step, in sorted order
    stages: dict[int, int] = field(default_factory=dict)  # stage of each step
    bad: dict[int, list[str]] = field(default_factory=dict)
    replayed: dict[int, int] = field(default_factory=dict)  # how often a step was trained before it counted


def read_ledger(folder: Path, up_to: int | None = None) -> ConsumedSamples:
    """Read the files of all lives: for each step the last life that trained it counts. `up_to`: ignore later steps."""
    lives: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))  # step -> life -> lines
    for path in sorted(folder.glob("life-*.rank-*.jsonl")):
        match = re.fullmatch(r"life-(\d+)\.rank-\d+\.jsonl", path.name)
        assert match, path
        for line in read_lines(path, _whole):
            if up_to is None or line["step"] <= up_to:
                lives[line["step"]][int(match[1])].append(line)
    result = ConsumedSamples()
    for step in sorted(lives):
        last = lives[step][max(lives[step])]
        result.steps[step] = sorted(key for line in last for key in line["keys"])
        result.bad[step] = sorted(key for line in last for key, _ in line["bad"])
        result.stages[step] = last[0]["stage"]
        if len(lives[step]) > 1:
            result.replayed[step] = len(lives[step]) - 1
    return result

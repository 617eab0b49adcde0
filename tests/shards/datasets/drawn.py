"""Small archives for the tests of readers: images drawn from a seed, and a build of them read back."""

import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.sample import Sample
from shards.build import BuildResult, BuildSettings, build
from shards.datasets import reader as datasets, registry
from shards.datasets.reader import RawStudy


def draw(path: Path, seed: int = 0) -> None:
    """A small JPEG or PNG in colour, another one for each seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_json(path: Path, value: Any, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding=encoding)


def listed(dataset: str, raw: Path | None, **options: str) -> list[RawStudy]:
    reader = registry.reader(dataset)
    return list(reader.read(raw, datasets.parse_options(dataset, reader.OPTIONS, options)))


def refusal(dataset: str, raw: Path | None, **options: str) -> str:
    """The one line that a reader refuses an archive with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", datasets.DatasetWarning)
        with pytest.raises(UserError) as error:
            listed(dataset, raw, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def built(
    dataset: str, raw: Path, out: Path, max_skipped: int = 0, unscrubbed: bool = False, **options: str
) -> tuple[BuildResult, list[Sample]]:
    """Build, and return the samples that lie in the shards, by question or text."""
    settings = BuildSettings(workers=1, shard_samples=100, max_skipped=max_skipped, unscrubbed=unscrubbed)
    result = build(dataset, raw, str(out), options, settings)
    samples = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as shard:
            names = set(shard.getnames())
            for name in sorted(names):
                data = shard.extractfile(name) if name.endswith(".json") else None
                if data is not None:
                    samples.append(Sample.model_validate_json(data.read()))
                    assert f"{samples[-1].key}.0.jpg" in names
                    assert path.name.startswith(samples[-1].split)
    assert len(samples) == result.samples
    return result, sorted(
        samples, key=lambda sample: (sample.question or "", sample.answer or "", sample.report.text())
    )

"""A reader of another package is found by its entry point, and builds in worker processes like a built-in one."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.core.sample import Sample
from radhpc.storage.store import Store
from shards.datasets import registry
from shards.reports.tables import options_table
from tests.shards.helpers import ROOT

pytestmark = pytest.mark.timeout(120)
READER = '''"""tiny_archive: as many gradients as its file says."""

from dataclasses import dataclass

import numpy as np
from pydantic import Field

from radhpc.core.sample import Report
from shards.datasets.reader import RawStudy, ReaderOptions
from shards.images.raw_image import RawImage


class TinyOptions(ReaderOptions):
    first: int = Field(0, ge=0, description="number of the first study")


OPTIONS = TinyOptions
SYNTHETIC = False


@dataclass(frozen=True)
class Gradient:
    number: int

    def __call__(self):
        return RawImage((np.indices((40, 32)).sum(0) * (self.number + 1) % 4096).astype(np.uint16), bits=12)


def read(raw, options):
    for number in range(options.first, int((raw / "count.txt").read_text())):
        yield RawStudy(
            study=str(number), patient=str(number), views=((Gradient(number), "PA"),), name=f"study {number}",
            report=Report(findings=f"Gradient {number}."),
        )
'''


def install(site: Path, reader: str, name: str = "tiny_archive") -> Path:
    """Lay out an installed distribution with one module and its entry point, as pip does."""
    information = site / f"{name}-1.2.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    (information / "entry_points.txt").write_text(f"[radhpc.datasets]\n{name} = {name}\n")
    (site / f"{name}.py").write_text(reader)
    return site


def radhpc(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "launch.py", *map(str, arguments)],
        cwd=site.parent,
        env={**os.environ, "PYTHONPATH": str(site), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def site(tmp_path: Path) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/count.txt").write_text("14")
    return install(tmp_path / "site", READER)


def test_a_plugin_builds_and_is_repaired_in_worker_processes(site: Path, tmp_path: Path) -> None:
    raw, out = ("--raw", tmp_path / "raw"), tmp_path / "out"
    settings = ("--out", out, "--workers", 2, "--shard-samples", 3, "--duplicates", "report", "first=2", "--json")
    done = radhpc(site, "build", "tiny_archive", *raw, *settings)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["samples"] == 12
    store = Store(out)
    manifest = Manifest.load(store)
    assert (manifest.dataset, manifest.build["reader"], manifest.samples) == ("tiny_archive", "tiny_archive", 12)
    assert len(manifest.shards) > 3
    index = manifest.load_index(store)
    member = next(member for member in index.members(0) if member.name.endswith(".json"))
    data = store.read_range(manifest.shards[member.shard].name, member.offset, member.length)
    assert Sample.model_validate_json(data).images[0].source_bits == 12
    tars = sorted(out.glob("train-*.tar"))[:2]
    before = [tar.read_bytes() for tar in tars]
    for tar in tars:
        tar.write_bytes(tar.read_bytes()[:3000])
    done = radhpc(site, "verify", out, "--repair", *raw, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert [tar.read_bytes() for tar in tars] == before


def test_what_is_no_reader_is_refused_in_one_line(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(site, "OPTIONS = SYNTHETIC = None\n", "half_archive")
    install(site, "import nowhere_to_be_found\n", "lost_archive")
    done = radhpc(site, "build", "half_archive", "--raw", tmp_path / "raw", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "plugin 'half_archive' (half_archive) has no read, so it is not a" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    monkeypatch.syspath_prepend(site)
    with pytest.raises(UserError, match=r"plugin 'lost_archive' \(lost_archive\) cannot be imported: No module named"):
        registry.reader("lost_archive")
    with pytest.raises(UserError, match=r"'tiny_archiv' is unknown \(did you mean 'tiny_archive'\?\)"):
        registry.reader("tiny_archiv")


def test_the_name_of_a_built_in_reader_is_refused_in_one_line(site: Path, tmp_path: Path) -> None:
    """Where a dataset is asked for; what needs none goes on."""
    install(site, READER, "phantom")
    done = radhpc(site, "build", "phantom", "--out", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert "radhpc.datasets: 'phantom' (phantom) is built in; the package" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
    done = radhpc(site, "recipes")
    assert done.returncode == 0, done.stderr


def test_a_plugin_is_listed_with_its_options(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "tiny_archive", raising=False)
    assert "tiny_archive" in registry.names()
    console = Console(width=200, file=io.StringIO())
    console.print(options_table("tiny_archive"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, "tiny_archive")
    assert "as many gradients as its file says" in text
    assert "number of the first study" in text

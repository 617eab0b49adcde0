"""The measurements of streams run and print what programs rely on; the experiments of docs/stream.md hold."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from bench import corpus, guarantees, peers
from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.data.source import Source
from radhpc.storage.store import Store
from tests.conftest import ROOT


def run_quick(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", *arguments, "--quick", "--json"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)
    assert found.returncode == 0, found.stderr
    (line,) = found.stdout.splitlines()
    answer: dict[str, Any] = json.loads(line)
    assert set(answer) == {"ratios", "figures", "machine"}
    return answer


@pytest.mark.heavy
@pytest.mark.timeout(180)
def test_the_quick_measurement_prints_its_object() -> None:
    answer = run_quick("bench.stream")
    assert set(answer["ratios"]) == {
        "raw samples per second, radhpc / webdataset",
        "decoded samples per second, radhpc / decoder alone",
        "decoded samples per second, radhpc / webdataset",
    }
    assert all(value > 0 for value in answer["ratios"].values())
    assert answer["ratios"]["raw samples per second, radhpc / webdataset"] > 2  # on any machine, however busy
    assert answer["figures"]["samples per second, decoded by two workers, webdataset"] > 0


@pytest.mark.heavy
@pytest.mark.timeout(180)
def test_ours_keeps_its_promises_where_webdataset_is_silent() -> None:
    cells = run_quick("bench.guarantees")["figures"]
    ours, other = cells["radhpc"], cells["webdataset"]
    for place in ("between two samples", "inside a header", "inside an image"):
        assert ours[f"shard cut {place}"].startswith("refused before the first sample"), ours
    assert other["shard cut between two samples"] == "500 of 1000, silent"
    assert ours["one bit of a header changed"] == "1000 of 1000, nothing lost"
    assert other["one bit of a header changed"] == "100 of 1000, silent"
    assert ours["one bit of an image changed"].startswith("999 of 1000, says: bench-")
    assert other["one bit of an image changed"] == "1000 of 1000, 1 of them wrong, silent"
    assert all(ours[run] == "exact" for run in guarantees.RUNS), ours
    assert other["4 ranks, then 3"] == "0 missing, 360 repeated: no state, it starts anew"
    twins = "two datasets with shards of the same name, one cache folder"
    assert ours[twins] == "60 of 60 right"
    assert other[twins] == "0 of 60 right, 60 of the other dataset, silent"


def test_the_corpus_is_a_dataset_like_any_other(tmp_path: Path) -> None:
    folder = corpus.make(tmp_path / "tars", 50, 20, (64, 96))
    manifest = Manifest.load(Store(folder))
    manifest.check_sizes(Store(folder))
    assert [shard.samples for shard in manifest.shards] == [20, 20, 10]
    source = Source((str(folder),), "train")
    for number in (0, 19, 49):
        _, sample, (view,) = source.read(number)
        assert (view.width, view.height) == (sample.images[0].width, sample.images[0].height)
        assert view.mode == "L"
    with tarfile.open(folder / "train-000001.tar") as tar:
        assert len(tar.getnames()) == 40
    before = (folder / "train-000000.tar").stat().st_mtime_ns
    corpus.make(folder, 50, 20, (64, 96))
    assert (folder / "train-000000.tar").stat().st_mtime_ns == before, "made twice"


@pytest.mark.parametrize("kind", guarantees.DAMAGES.values())
def test_damage_hits_one_place_of_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(guarantees, "HALF", 5)
    monkeypatch.setattr(guarantees, "EARLY", 2)
    folder = corpus.make(tmp_path, 10, 10, (64, 96))
    path = folder / "train-000000.tar"
    whole = path.read_bytes()
    guarantees.damage(folder, kind)
    broken = path.read_bytes()
    if kind.endswith("bit"):
        assert len(broken) == len(whole)
        (at,) = [n for n, (a, b) in enumerate(zip(whole, broken, strict=True)) if a != b]
        assert (whole[at] ^ broken[at]).bit_count() == 1
    else:
        assert whole.startswith(broken)
        at = len(broken)
    with tarfile.open(folder / ("whole.tar" if path.write_bytes(whole) < 0 else path.name)) as tar:
        sample = 2 if kind.endswith("bit") else 5
        head, image = tar.getmembers()[2 * sample : 2 * sample + 2]
    inside = {
        "between": at == head.offset,
        "header": head.offset < at < head.offset_data,
        "image": image.offset_data < at < image.offset_data + image.size,
        "header bit": head.offset < at < head.offset_data,
        "image bit": image.offset_data < at < image.offset_data + image.size,
    }
    assert inside[kind]


def test_a_peer_that_hangs_or_dies_is_ended_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow.py"
    slow.write_text("import sys, time\nprint('started', file=sys.stderr, flush=True)\ntime.sleep(60)\n")
    monkeypatch.setattr(peers, "READERS", slow)
    called = peers.call("webdataset", {"do": "raw"}, 2, Path(sys.executable))
    assert called.hung
    assert called.answer is None
    assert "started" in called.said
    slow.write_text("raise SystemExit('no such folder')\n")
    called = peers.call("webdataset", {"do": "raw"}, 30, Path(sys.executable))
    assert (called.answer, called.hung) == (None, False)
    assert "no such folder" in called.said


def test_a_named_python_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(peers.VARIABLE, os.devnull)
    with pytest.raises(UserError, match=f"{peers.VARIABLE}: {os.devnull}: allowed is the Python"):
        peers.python()

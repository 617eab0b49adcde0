"""The same input gives the same bytes; what goes wrong is one line and no half dataset."""

import json
import os
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.core.sample import SPLITS, Sample
from radhpc.storage.store import Store
from shards.build import BuildSettings, build
from tests.shards.helpers import PHANTOM, ROOT, SMALL, contents, notes, records

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return notes(tmp_path / "raw", 20)


def write_table(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "data.json").write_text(json.dumps(rows))


def read_table(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads((folder / "data.json").read_text()))


def test_shards_index_and_samples_agree_and_webdataset_reads_them(tmp_path: Path) -> None:
    ticks: list[tuple[int, int]] = []
    out = tmp_path / "out"
    result = build("phantom", None, str(out), PHANTOM, SMALL, lambda done, total: ticks.append((done, total)))
    assert (result.samples, result.skipped, result.warnings, result.reused) == (60, [], [], False)
    assert ticks[0] == (0, 60)
    assert ticks[-1] == (60, 60)
    store = Store(out)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    assert manifest.hash == result.manifest_hash
    assert (manifest.samples, sum(manifest.splits.values()), len(index)) == (60, 60, 60)
    beside = ["manifest.json", "index.npz", "fingerprints.npy", "card.md", "contact_sheet.png"]
    assert sorted(contents(out)) == sorted([*beside, *(shard.name for shard in manifest.shards)])
    assert all(shard.samples <= 8 for shard in manifest.shards)
    read = {
        sample["__key__"]: sample
        for shard in manifest.shards
        for sample in webdataset.WebDataset(str(out / shard.name), shardshuffle=False, empty_check=False)
    }
    assert sorted(read) == sorted(key.decode() for key in index.key)
    for n in range(len(index)):
        key = index.key[n].decode()
        sample = Sample.model_validate_json(read[key]["json"])
        assert (sample.key, sample.patient) == (key, index.patient[n].decode())
        assert manifest.shards[index.shard[n]].name.startswith(sample.split == SPLITS[index.split[n]] and sample.split)
        members = list(index.members(n))
        assert [member.name.split(".", 1)[1] for member in members] == [
            "json", *(f"{k}.jpg" for k in range(len(sample.images)))
        ]  # fmt: skip
        for member in members:
            data = store.read_range(manifest.shards[member.shard].name, member.offset, member.length)
            assert data == read[key][member.name.split(".", 1)[1]]


def test_one_and_two_workers_and_a_second_run_give_the_same_bytes(tmp_path: Path) -> None:
    one = build("phantom", None, str(tmp_path / "one"), PHANTOM, SMALL)
    two = build("phantom", None, str(tmp_path / "two"), PHANTOM, BuildSettings(workers=2, shard_samples=8))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert one.manifest_hash == two.manifest_hash
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}
    again = build("phantom", None, str(tmp_path / "two"), PHANTOM, SMALL)
    assert (again.reused, again.samples, again.manifest_hash) == (True, 60, two.manifest_hash)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "two").iterdir()}


def test_image_text_end_to_end(archive: Path, tmp_path: Path) -> None:
    result = build("image_text", archive, str(tmp_path / "out"), {"name": "notes"}, BuildSettings(workers=1))
    assert (result.samples, sum(result.patients.values())) == (20, 10)
    manifest = Manifest.load(Store(tmp_path / "out"))
    assert (manifest.dataset, min(manifest.splits.values()) > 0) == ("notes", True)
    for shard in manifest.shards:
        with tarfile.open(tmp_path / "out" / shard.name) as tar:
            for member in tar:
                data = tar.extractfile(member).read()
                assert member.name.startswith("notes-")
                assert b"1.2.840" not in data
                if member.name.endswith(".json"):
                    (view,) = Sample.model_validate_json(data).images
                    assert (view.view, view.width, view.height, view.source_bits) == ("PA", 30, 40, 16)
    everything = b"".join(contents(tmp_path / "out").values())
    assert b"1.2.840" not in everything
    assert str(archive).encode() not in everything
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in (tmp_path / "out").iterdir())


def test_a_moved_archive_is_the_same_build(archive: Path, tmp_path: Path) -> None:
    build("image_text", archive, str(tmp_path / "out"), {}, SMALL)
    moved = archive.rename(tmp_path / "moved")
    assert build("image_text", moved / "data.json", str(tmp_path / "out"), {}, SMALL).reused


def test_what_cannot_be_used_is_counted_and_named(archive: Path, tmp_path: Path) -> None:
    rows = read_table(archive)
    rows[3]["text"] = ""
    rows[4]["language"] = "x"  # the description refuses it
    rows.append({**rows[5], "text": "again"})
    write_table(archive, rows)
    (archive / rows[0]["image"]).unlink()
    broken = archive / rows[1]["image"]
    broken.write_bytes(broken.read_bytes()[:200])
    result = build("image_text", archive, str(tmp_path / "out"), {}, BuildSettings(workers=1, max_skipped=5))
    named = {skip["name"]: skip["reason"] for skip in result.skipped}
    assert named["raw: images/1.2.840.0.png"] == "missing image file"
    assert named["raw: images/1.2.840.1.png"].startswith("broken image: ")
    assert named["raw: images/1.2.840.3.png"] == "empty text"
    assert named["raw: images/1.2.840.4.png"].startswith("description refused: language: ")
    assert named["raw: images/1.2.840.5.png"] == "duplicate key"
    manifest = Manifest.load(Store(tmp_path / "out"))
    assert manifest.skipped == {
        "broken image": 1, "description refused": 1, "duplicate key": 1, "empty text": 1, "missing image file": 1,
    }  # fmt: skip
    assert manifest.samples == result.samples == 16
    again = build("image_text", archive, str(tmp_path / "out"), {}, BuildSettings(workers=1, max_skipped=5))
    assert again.reused
    assert "1 studies were left out when it was built: empty text" in again.warnings


@pytest.mark.parametrize("workers", [1, 2])
def test_too_many_unusable_studies_fail_and_may_be_mended(archive: Path, tmp_path: Path, workers: int) -> None:
    lost = {path: path.read_bytes() for path in sorted(archive.glob("images/*"))[:4]}
    for path in lost:
        path.unlink()
    settings = BuildSettings(workers=workers, shard_samples=3, max_skipped="10%")
    # two workers may each report a shard before the build looks: 3 or 4 are known by then
    with pytest.raises(UserError, match=r"[34] of 20 studies cannot be used, and max_skipped allows 2: raw: images"):
        build("image_text", archive, str(tmp_path / "out"), {}, settings)
    assert not (tmp_path / "out" / "manifest.json").exists()
    for path, data in lost.items():
        path.write_bytes(data)
    assert build("image_text", archive, str(tmp_path / "out"), {}, settings).samples == 20
    build("image_text", archive, str(tmp_path / "fresh"), {}, settings)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_the_budget_of_tiny_archives_allows_one(archive: Path, tmp_path: Path) -> None:
    next(iter(archive.glob("images/*"))).unlink()
    assert len(build("image_text", archive, str(tmp_path / "out"), {}, BuildSettings(workers=1)).skipped) == 1
    with pytest.raises(UserError, match="1 of 20 studies cannot be used, and max_skipped allows 0"):
        build("image_text", archive, str(tmp_path / "none"), {}, BuildSettings(workers=1, max_skipped=0))
    write_table(archive, [{"image": "no.png", "text": "x", "patient": 1}])
    with pytest.raises(UserError, match="1 of 1 studies cannot be used"):
        build("image_text", archive, str(tmp_path / "empty"), {}, BuildSettings(workers=1))


def test_a_patient_in_two_official_splits_is_refused_before_any_work(archive: Path, tmp_path: Path) -> None:
    rows = read_table(archive)
    write_table(archive, [{**row, "split": "train" if n % 2 else "test"} for n, row in enumerate(rows)])
    with pytest.raises(UserError, match=r"'raw: images/1.2.840.0.png' is in test and .* of the same patient"):
        build("image_text", archive, str(tmp_path / "out"), {}, SMALL)
    assert not (tmp_path / "out").exists()


def test_official_splits_are_kept(archive: Path, tmp_path: Path) -> None:
    write_table(archive, [{**row, "split": SPLITS[n // 2 % 3]} for n, row in enumerate(read_table(archive))])
    assert build("image_text", archive, str(tmp_path / "out"), {}, SMALL).splits == {
        "train": 8, "validate": 6, "test": 6,
    }  # fmt: skip


def test_another_build_is_refused_unless_forced(archive: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    build("phantom", None, out, PHANTOM, SMALL)
    with pytest.raises(UserError, match=r"out: holds another build \(other quality\); use another folder, or --force"):
        build("phantom", None, out, PHANTOM, BuildSettings(workers=1, shard_samples=8, quality=80))
    assert build("phantom", None, out, PHANTOM, SMALL).reused
    forced = BuildSettings(workers=1, shard_samples=30, quality=80, force=True)
    assert not build("phantom", None, out, PHANTOM, forced).reused
    build("phantom", None, str(tmp_path / "fresh"), PHANTOM, forced)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_another_unfinished_build_is_refused_too(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        build("phantom", None, str(out), PHANTOM, SMALL, lambda done, total: stop_at(done, 20))
    assert records(out)
    with pytest.raises(UserError, match=r"holds another, unfinished build \(other options, source\)"):
        build("phantom", None, str(out), {**PHANTOM, "seed": "1"}, SMALL)
    assert build("phantom", None, str(out), PHANTOM, SMALL).samples == 60


def stop_at(done: int, limit: int) -> None:
    if done >= limit:
        raise RuntimeError("stop")


def test_a_changed_table_is_noticed(archive: Path, tmp_path: Path) -> None:
    build("image_text", archive, str(tmp_path / "out"), {}, SMALL)
    rows = read_table(archive)
    rows[7]["text"] += " And more."
    write_table(archive, rows)
    with pytest.raises(UserError, match=r"holds another build \(other source\)"):
        build("image_text", archive, str(tmp_path / "out"), {}, SMALL)


def test_foreign_tars_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"somebody's work")
    with pytest.raises(UserError, match=r"holds train-000000.tar of something else"):
        build("phantom", None, str(tmp_path), PHANTOM, SMALL)
    with pytest.raises(UserError, match="a file is in the way"):
        build("phantom", None, str(tmp_path / "train-000000.tar"), PHANTOM, SMALL)
    with pytest.raises(UserError, match=r"--out .*x#balanced: '#balanced' would name a subset"):
        build("phantom", None, str(tmp_path / "x#balanced"), PHANTOM, SMALL)
    with pytest.raises(UserError, match="ftp://host/x: .*; allowed are a folder and s3, gs, az, http, file URLs"):
        build("phantom", None, "ftp://host/x", PHANTOM, SMALL)
    assert os.listdir(tmp_path) == ["train-000000.tar"]


def test_settings_that_cannot_be() -> None:
    for values, message in (
        ({"workers": 0}, "workers: 0 is too few"),
        ({"longest_side": 5}, "longest_side: 5 pixels; allowed are 16 to 65500"),
        ({"quality": 101}, "quality: 101; allowed are 1 to 100"),
        ({"ratios": (0.5, 0.5, 0.5)}, r"ratios: .* must add up to 1"),
        ({"shard_samples": 0}, "shard_samples: 0 is too few"),
        ({"max_skipped": "many"}, "max_skipped: 'many'; allowed are a count such as 20 or a share such as 1%"),
    ):
        with pytest.raises(UserError, match=message):
            BuildSettings(**values)
    budgets = [BuildSettings(max_skipped=given).skip_budget(250) for given in ("1%", "0%", "0.5%", 7, "12")]
    assert budgets == [3, 0, 2, 7, 12]


def test_a_build_needs_no_torch() -> None:
    code = "import sys, shards.build, shards.verify, shards.datasets.phantom; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_a_named_work_folder_keeps_what_is_not_ours(archive: Path, tmp_path: Path) -> None:
    named_work = tmp_path / "work"
    named_work.mkdir()
    (named_work / "thesis.tex").write_text("three years")
    settings = BuildSettings(workers=1, work=named_work)
    assert build("image_text", archive, str(tmp_path / "out"), {}, settings).samples == 20
    assert [path.name for path in named_work.iterdir()] == ["thesis.tex"]
    assert not (tmp_path / "out" / ".build").exists()


def test_what_a_forced_build_was_to_be_apart_from_is_forgotten(archive: Path, tmp_path: Path) -> None:
    """An unfinished build that drops near-duplicates leaves nothing to a forced one that only reports them."""
    rows = [{**row, "split": "test" if n < 2 else "train"} for n, row in enumerate(read_table(archive))]
    write_table(archive, rows)
    (archive / rows[4]["image"]).write_bytes((archive / rows[0]["image"]).read_bytes())

    def interrupt(done: int, total: int) -> None:
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build("image_text", archive, str(tmp_path / "out"), {}, SMALL, interrupt)
    assert list((tmp_path / "out" / ".build").glob("others-*.npz"))
    forced = BuildSettings(workers=1, shard_samples=8, duplicates="report", force=True)
    result = build("image_text", archive, str(tmp_path / "out"), {}, forced)
    assert (result.samples, result.skipped) == (20, [])


def test_a_listing_of_an_older_version_is_written_anew(tmp_path: Path) -> None:
    """An interrupted build may go on with another version of the code, whose pickles name other modules."""
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        build("phantom", None, str(out), PHANTOM, SMALL, lambda done, total: stop_at(done, 20))
    connection = sqlite3.connect(out / ".build" / "listing.sqlite")
    connection.execute("UPDATE facts SET value = 'another' WHERE name = 'format'")
    connection.execute("UPDATE studies SET raw = x'80'")
    connection.commit()
    connection.close()
    assert build("phantom", None, str(out), PHANTOM, SMALL).samples == 60
    build("phantom", None, str(tmp_path / "fresh"), PHANTOM, SMALL)
    assert contents(out) == contents(tmp_path / "fresh")

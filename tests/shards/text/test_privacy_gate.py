"""Identifiers of a person do not pass into the shards, and the words taken out are counted."""

import json
import os
from pathlib import Path

import pytest

from radhpc.core.manifest import Manifest
from radhpc.core.sample import Sample
from radhpc.storage.store import Store
from shards.build import build
from shards.verify import verify
from tests.shards.helpers import SMALL, notes

pytestmark = pytest.mark.timeout(120)
SECRETS = (
    "Seen on 12/03/2019 by Dr. Ramirez.",
    "MRN 12345678, born in 1950.",
    "Please call 555-123-4567.",
    "Signed electronically by J. Doe, MD on March 3rd, 2011 at 10:35 am.",
)


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Four studies of twenty tell what must not be kept, one has a date in a label's name, one image is gone."""
    folder = notes(tmp_path / "Hospital of Nowhere", 20)
    rows = json.loads((folder / "data.json").read_text())
    for row, secret in zip(rows, SECRETS, strict=False):
        row["text"] = f"FINDINGS: The lungs are clear. {secret} IMPRESSION: Normal, nodule of 4 x 5 mm."
    rows[5]["labels"] = {"seen 12/03/2019": 1}
    for n, row in enumerate(rows):
        row["patient"] = f"PATIENT-{n}"
    (folder / "data.json").write_text(json.dumps(rows))
    (folder / rows[7]["image"]).unlink()
    return folder


def test_nothing_that_identifies_passes(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = build("image_text", archive, str(out), {}, SMALL.__class__(workers=1, max_skipped=2))
    everything = b"".join(path.read_bytes() for path in sorted(out.iterdir())).decode("latin-1")
    of_texts = ("12/03/2019", "Ramirez", "12345678", "in 1950", "555-123", "Doe", "March", "10:35")
    for secret in (*of_texts, "PATIENT-", "1.2.840", "Nowhere"):
        assert secret not in everything, secret
    assert everything.count("nodule of 4 x 5 mm") == len(SECRETS)
    assert {"date": 2, "record number": 1, "phone": 1}.items() <= result.scrubbed.items()
    reasons = {skip["name"].rsplit("/", 1)[1]: skip["reason"] for skip in result.skipped}
    assert reasons == {"1.2.840.5.png": "identifier refused: labels: date", "1.2.840.7.png": "missing image file"}
    card = (out / "card.md").read_text()
    assert "identifier refused" in card
    assert "missing image file" in card
    assert verify(str(out)).ok


def test_raw_names_are_kept_where_the_user_alone_reads_them(archive: Path, tmp_path: Path) -> None:
    result = build("image_text", archive, str(tmp_path / "out"), {}, SMALL.__class__(workers=1, max_skipped=2))
    path = result.skipped_file
    assert path is not None
    assert path.is_relative_to(os.environ["XDG_STATE_HOME"])
    assert path.stat().st_mode & 0o777 == 0o600
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert {entry["name"] for entry in kept} == {skip["name"] for skip in result.skipped}
    card = (tmp_path / "out" / "card.md").read_text()
    assert all(entry["id"] in card for entry in kept)


def test_verify_finds_what_the_gate_would_not_let_in(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    build("image_text", archive, str(out), {}, SMALL.__class__(workers=1, max_skipped=2))
    manifest = Manifest.load(Store(out))
    index = manifest.load_index(Store(out))
    for row in range(len(index)):
        member = next(index.members(row))
        shard = out / manifest.shards[member.shard].name
        data = shard.read_bytes()
        sample = Sample.model_validate_json(data[member.offset : member.offset + member.length])
        if "Report" in sample.report.text():
            break
    changed = sample.model_dump_json().replace("Report", "5/3/19")  # as long as it was
    assert len(changed) == member.length
    assert "5/3/19" in changed
    shard.write_bytes(data[: member.offset] + changed.encode() + data[member.offset + member.length :])
    faults = [fault for fault in verify(str(out)).faults if fault.member == member.name]
    assert "description: other: date" in {fault.fault for fault in faults}
    assert all(fault.offset == member.offset for fault in faults)
    assert "5/3/19" not in json.dumps([vars(fault) for fault in faults])

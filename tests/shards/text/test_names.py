"""Names that a person lists are taken out of texts; names that a model finds are only proposed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from typer.testing import CliRunner

from radhpc.cli.main import app
from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest
from radhpc.storage.store import Store
from shards.build import build
from shards.proposals import propose_names
from shards.repair import repair
from shards.settings import BuildSettings
from shards.text import names
from shards.text.deidentification import STANDARD, scrub, with_names
from shards.verify import verify
from tests.shards.helpers import notes

pytestmark = pytest.mark.timeout(120)
TEXTS = (
    "Margaret was called, KOWALCZYK agrees. The lungs are clear.",
    "Anna Maria Żuk: no effusion. Annamaria has a margaret of 3 mm.",
    "No acute process in the right lung.",
    "Seen by Żuk and by Margaret.",
)


def archive(folder: Path) -> Path:
    raw = notes(folder, len(TEXTS))
    rows = json.loads((raw / "data.json").read_text())
    for row, text in zip(rows, TEXTS, strict=True):
        row["text"] = text
    (raw / "data.json").write_text(json.dumps(rows))
    return raw


def listed(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def stored(out: Path) -> str:
    return b"".join(path.read_bytes() for path in sorted(out.iterdir()) if path.is_file()).decode("utf-8", "replace")


@pytest.mark.parametrize("content", [b"", b"# none\n\n", b"a\n", b"Margaret\n1951\n", b"A-\n", b"\xff\xfe\x00"])
def test_a_list_without_names_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "names.txt").write_bytes(content)
    for path in (tmp_path / "names.txt", tmp_path / "missing.txt", tmp_path):
        with pytest.raises(UserError, match="--remove-names .*allowed") as error:
            names.read(path)
        assert "\n" not in str(error.value)
        assert "Margaret" not in str(error.value)


def test_a_list_is_read_up_to_its_tabs(tmp_path: Path) -> None:
    path = listed(tmp_path / "names.tsv", "\ufeffŻuk\t3", "# Lung\t9", "", "Anna   Maria\t1", "O'Brien-Lopez")
    assert names.read(path) == ["Anna Maria", "O'Brien-Lopez", "Żuk"]


letters = st.text("abcxyzäßŻđ'-", min_size=1, max_size=6)
people = st.tuples(st.sampled_from("ABŻÄ"), letters, st.sampled_from("aeö")).map("".join)


@given(st.lists(people, min_size=1, max_size=4), people, st.sampled_from(["", " ", ", ", "\n"]))
def test_listed_names_go_and_twice_is_once(chosen: list[str], other: str, gap: str) -> None:
    rules = with_names(chosen)
    text = "Lung of " + gap.join(f" {name} and {name.upper()}." for name in [*chosen, f"x{other}x"])
    clean, counts = scrub(text, rules)
    assert counts["listed name"]
    for name in chosen:
        assert not re.search(rf"(?<!\w)(?:{re.escape(name)}|{re.escape(name.upper())})(?!\w)", clean)
    assert f"x{other}x" in clean
    assert scrub(clean, rules) == (clean, {})
    assert with_names([]) is STANDARD


def test_a_build_takes_listed_names_out_and_keeps_the_list_to_itself(tmp_path: Path) -> None:
    raw, out = archive(tmp_path / "raw"), tmp_path / "out"
    settings = BuildSettings(
        workers=1, remove_names=listed(tmp_path / "names.txt", "Margaret", "Kowalczyk", "Anna Maria Żuk")
    )
    result = build("image_text", raw, str(out), {}, settings)
    assert result.scrubbed["listed name"] == 4
    everything = stored(out)
    for name in ("Margaret", "KOWALCZYK", "Kowalczyk", "Anna Maria"):
        assert name not in everything
    assert "Annamaria has a margaret of 3 mm" in everything
    assert "listed name" in (out / "card.md").read_text()
    assert verify(str(out)).ok
    assert build("image_text", raw, str(out), {}, settings).reused
    with pytest.raises(UserError, match=r"other names|other rules|another build"):
        build("image_text", raw, str(out), {}, BuildSettings(workers=1, remove_names=listed(tmp_path / "b.txt", "Żuk")))

    before = (out / "train-000000.tar").read_bytes()
    (out / "train-000000.tar").write_bytes(before[:-4000] + bytes(4000))
    with pytest.raises(UserError, match="--remove-names: .*same one"):
        repair(str(out), raw, verify(str(out)), workers=1)
    repair(str(out), raw, verify(str(out)), workers=1, remove_names=settings.remove_names)
    assert (out / "train-000000.tar").read_bytes() == before


@pytest.mark.parametrize("files", [(), ("config.json",)])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, files: tuple[str, ...]) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"--names .*no spaCy model; allowed is a folder with a config.cfg"):
        names.load_finder(tmp_path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model of spaCy's that knows three people by a list: no weights are needed to see that all else works."""
    spacy: Any = pytest.importorskip("spacy")
    pipeline = spacy.blank("en")
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "PERSON", "pattern": name} for name in ("Margaret", "KOWALCZYK", "Anna Maria Żuk")])
    pipeline.to_disk(tmp_path / "model")
    return tmp_path / "model"


def test_proposals_come_back_as_a_list(tmp_path: Path, model: Path) -> None:
    raw, out = archive(tmp_path / "raw"), tmp_path / "out"
    build("image_text", raw, str(out), {}, BuildSettings(workers=1))
    before = stored(out)
    proposals = propose_names(str(out), names.load_finder(model))
    assert proposals.counts == {"Margaret": 2, "KOWALCZYK": 1, "Anna Maria Żuk": 1}
    assert proposals.samples == 3
    assert proposals.file is not None
    assert proposals.file.stat().st_mode & 0o777 == 0o600
    assert proposals.file.read_text().splitlines()[0] == "Margaret\t2"
    assert stored(out) == before

    again = tmp_path / "again"
    build("image_text", raw, str(again), {}, BuildSettings(workers=1, remove_names=proposals.file))
    assert propose_names(str(again), names.load_finder(model)).file is None


def test_verify_counts_proposals_apart_from_faults(tmp_path: Path, model: Path) -> None:
    build("image_text", archive(tmp_path / "raw"), str(tmp_path / "out"), {}, BuildSettings(workers=1))
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--names", str(model), "--json"])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout.strip().splitlines()[-1])
    assert answer["proposed_names"] == 3
    assert answer["faults"] == []
    assert "Margaret" not in result.output
    assert Manifest.load(Store(tmp_path / "out")).samples == len(TEXTS)

"""PathVQA: pickles that are read and never run, duplicates, and names of images."""

import builtins
import contextlib
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st

from radhpc.core.errors import UserError
from shards.datasets import reader
from shards.tabular import safe_pickle
from tests.shards.datasets.drawn import built, draw, listed, refusal, write_json

pytestmark = pytest.mark.timeout(60)


def record(image: str, question: str = "what is present?", answer: Any = "liver") -> dict[str, Any]:
    return {"image": image, "question": question, "answer": answer}


SPLITS = {
    "train": [
        record("train_0001"),
        record("train_0001", answer="hepatobiliary"),  # the same question with another answer stays
        record("train_0001"),  # the very same does not
        record("train_0002 a.b", "is it\nnecrotic?", "Yes"),
    ],
    "val": [record("val_0001", answer=3), record("val_0001", "où?", "à gauche")],
    "test": [record("test_0001", "is it?", "no")],
}


def write(folder: Path, splits: dict[str, Any] = SPLITS, form: str = "pkl", protocol: int = 4) -> Path:
    for split, rows in splits.items():
        path = folder / "qas" / split / f"{split}_qa.{form}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if form == "pkl":
            path.write_bytes(pickle.dumps(rows, protocol))
        else:
            write_json(path, rows)
        for seed, row in enumerate(rows):
            draw(folder / "images" / split / f"{row['image']}.jpg", seed)
    return folder


def test_as_published(tmp_path: Path) -> None:
    result, samples = built("pathvqa", write(tmp_path / "raw"), tmp_path / "out", max_skipped=1)
    assert result.splits == {"train": 3, "validate": 2, "test": 1}
    assert [(sample.question, sample.answer, sample.split) for sample in samples] == [
        ("is it necrotic?", "Yes", "train"),
        ("is it?", "no", "test"),
        ("où?", "à gauche", "validate"),
        ("what is present?", "3", "validate"),
        ("what is present?", "hepatobiliary", "train"),
        ("what is present?", "liver", "train"),
    ]
    kinds = [sample.labels for sample in samples]
    assert kinds[0] == kinds[1] == {"answer type": {"closed": 1}}
    assert kinds[2] == {"answer type": {"open": 1}}
    assert samples[4].patient == samples[5].patient
    assert len({sample.patient for sample in samples}) == 4
    assert [(skip["name"], skip["reason"]) for skip in result.skipped] == [
        ("train_qa.pkl record 3: train/train_0001.jpg", "duplicate key")
    ]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_says_the_same(protocol: int, tmp_path: Path) -> None:
    assert [study.answer for study in listed("pathvqa", write(tmp_path, protocol=protocol))] == [
        "liver", "hepatobiliary", "liver", "Yes", "3", "à gauche", "no",
    ]  # fmt: skip


def test_json_of_the_same_records_says_the_same(tmp_path: Path) -> None:
    def said(raw: Path) -> list[Any]:
        return [(s.study, s.patient, s.split, s.question, s.answer, s.labels) for s in listed("pathvqa", raw)]

    original = said(write(tmp_path / "a"))
    write(tmp_path / "b" / "pvqa", form="json")
    assert said(tmp_path / "b") == original
    for split, rows in SPLITS.items():
        named = [{**row, "image": f"{split}/{row['image']}.jpg"} for row in rows]
        write_json(tmp_path / "c" / f"pathvqa_{split}.json", named)
        (tmp_path / "c" / "images").mkdir(exist_ok=True)
    assert said(tmp_path / "c") == original


class Reduces:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def attacks(witness: Path) -> dict[str, bytes]:
    """Pickles that would leave the witness, read something, or fill the memory."""
    shell = f"touch {witness}"
    return {
        "os.system": pickle.dumps([Reduces(os.system, shell)], 4),
        "os.system, protocol 0": pickle.dumps([Reduces(os.system, shell)], 0),
        "eval": pickle.dumps(Reduces(builtins.eval, f"open({str(witness)!r}, 'w')"), 2),
        "open": pickle.dumps({"a": Reduces(open, str(witness), "w")}, 5),
        "hidden behind plain data": pickle.dumps([*SPLITS["train"], Reduces(Path.touch, witness)]),
        "an old instance": f"(S'{shell}'\nios\nsystem\n.".encode(),
        "an object": f"(cos\nsystem\nS'{shell}'\no.".encode(),
        "getattr": b"cbuiltins\ngetattr\n.",
        "a harmless class": pickle.dumps([OrderedDict(SPLITS["train"][0])]),
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent identifier": b"Pabc\n.",
        "a binary persistent identifier": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "a buffer from outside": b"\x80\x05\x97.",
    }


def test_no_pickle_is_run(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    raw = write(tmp_path / "raw")
    path = raw / "qas" / "train" / "train_qa.pkl"
    for name, data in attacks(witness).items():
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"train_qa.pkl: byte \d+: a pickle of more than plain data") as error:
            listed("pathvqa", raw)
        assert "\n" not in str(error.value), name
        assert not witness.exists(), name
    path.write_bytes(pickle.dumps([Reduces(os.system, f"touch {witness}")], 0))
    with pytest.raises(UserError, match=r"GLOBAL (posix|nt) system"):
        safe_pickle.load(path)


def test_the_attacks_would_work_on_a_plain_unpickler(tmp_path: Path) -> None:
    """Else the test above proves nothing."""
    witness = tmp_path / "witness"
    for name in ("os.system", "os.system, protocol 0", "eval", "open", "hidden behind plain data", "an old instance"):
        pickle.loads(attacks(witness)[name])
        assert witness.exists(), name
        witness.unlink()


def test_the_second_lock_holds_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    witness = tmp_path / "witness"
    monkeypatch.setattr(safe_pickle, "_check", lambda path, data: None)
    path = tmp_path / "a.pkl"
    for name, data in attacks(witness).items():
        path.write_bytes(data)
        with pytest.raises(UserError, match="a.pkl: broken pickle"):
            safe_pickle.load(path)
        assert not witness.exists(), name


def test_a_hash_without_end_is_refused(tmp_path: Path) -> None:
    """Each step doubles the time that the hash of the last tuple takes: 2**60 calls behind 240 bytes."""
    key = b"N" + b"2\x86" * 60  # None, then the top of the stack twice in a tuple
    (tmp_path / "a.pkl").write_bytes(b"}" + key + b"Ns.")
    assert pickle.loads(b"N" + b"2\x86" * 3 + b".") == (((None, None), (None, None)), ((None, None), (None, None)))
    with pytest.raises(UserError, match=r"a pickle of more than plain data \('TUPLE2'\)"):
        safe_pickle.load(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04",
        b"\x80\x63N.",  # a protocol to come
        b"]q\x00(",
        b"no pickle at all",
        b"PK\x03\x04",
        pickle.dumps(SPLITS["train"])[:-10],
        b"]r\xff\xff\xff\x7f.",  # a memo of two thousand million entries
        b"]p4294967296\n.",
        b"N\x8d\xff\xff\xff\xff\xff\xff\xff\x7f.",  # a text of 2**63 bytes
        b"N\x8e\xff\xff\xff\xff\xff\xff\xff\xff.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fN.",
        b"]]s.",
        b"}]Ns.",  # a list as a key
        b"I" + b"9" * 10000 + b"\n.",
    ],
)
def test_broken_pickles_are_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a.pkl: .*") as error:
        safe_pickle.load(path)
    assert "\n" not in str(error.value)


def test_size_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safe_pickle, "MAX_BYTES", 10)
    (tmp_path / "a.pkl").write_bytes(pickle.dumps("x" * 20))
    with pytest.raises(UserError, match=r"a.pkl: \d+ bytes; pickles of at most 10 bytes are allowed"):
        safe_pickle.load(tmp_path / "a.pkl")
    with pytest.raises(UserError, match=r"b.pkl: cannot be read \(No such file"):
        safe_pickle.load(tmp_path / "b.pkl")


KEYS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary())
PLAIN = st.recursive(KEYS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(KEYS, inner)), max_leaves=10)


@settings(max_examples=50, deadline=None)
@given(PLAIN, st.integers(3, pickle.HIGHEST_PROTOCOL))
def test_plain_data_come_back(tmp_path_factory: pytest.TempPathFactory, value: Any, protocol: int) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert safe_pickle.load(path) == value


@settings(deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.pkl"
    path.write_bytes(data)
    with contextlib.suppress(UserError):  # and nothing else
        safe_pickle.load(path)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"answer": ""}, "empty answer"),
        ({"answer": b"yes"}, "answer is no text"),
        ({"answer": 10**5000}, "answer is no text"),
        ({"question": "\t"}, "empty question"),
        ({"image": None}, "no image named"),
        ({"image": "a\0"}, "image path with a zero byte"),
        ({"image": "../../a"}, "image path that leaves the folder"),
    ],
)
def test_unusable_records_are_named(values: dict[str, Any], fault: str, tmp_path: Path) -> None:
    raw = write(tmp_path)
    path = raw / "qas" / "test" / "test_qa.pkl"
    path.write_bytes(pickle.dumps([*SPLITS["test"], {**record("test_0002"), **values}, {7: 8}]))
    studies = [study for study in listed("pathvqa", raw) if study.fault]
    assert [(study.fault, study.name) for study in studies] == [
        (fault, "test_qa.pkl record 2"),
        ("no image named", "test_qa.pkl record 3"),
    ]


@pytest.mark.filterwarnings("ignore::shards.datasets.reader.DatasetWarning")
def test_what_is_missing_is_said_in_one_line(tmp_path: Path) -> None:
    assert "--raw is missing: the folder of PathVQA" in refusal("pathvqa", None)
    assert "no PathVQA there; looked for qas/train/train_qa.pkl, " in refusal("pathvqa", tmp_path)
    path = tmp_path / "qas" / "val" / "val_qa.pkl"
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "no folder of PathVQA's images; looked for images" in refusal("pathvqa", tmp_path)
    (tmp_path / "images").mkdir()
    assert "val_qa.pkl: the records must be a list of dictionaries" in refusal("pathvqa", tmp_path)
    path.write_bytes(pickle.dumps([{"img_id": 1, "sent": "x"}]))
    assert "val_qa.pkl: no image, question, answer in the records; found are img_id" in refusal("pathvqa", tmp_path)
    path.write_bytes(pickle.dumps([]))
    assert "found are none" in refusal("pathvqa", tmp_path)
    path.write_bytes(pickle.dumps(SPLITS["val"]))
    with pytest.warns(reader.DatasetWarning, match=r"split 'train' stays empty, for want of qas/train/train_qa.pkl"):
        assert [study.split for study in listed("pathvqa", tmp_path)] == ["validate", "validate"]

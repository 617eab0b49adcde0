"""Balanced subsets: what is thinned, what always stays, the same bytes twice, and nothing else touched."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.manifest import Manifest, sha256
from radhpc.core.sample import Sample
from radhpc.storage.store import Store
from shards.balance import BalanceSettings, balance, picture
from shards.balance.selection import select
from shards.build import BuildSettings as Build, build
from shards.verify import verify

pytestmark = pytest.mark.timeout(120)
NORMAL = "No acute cardiopulmonary process."
ALONE = {
    "Expanding hydropneumothorax beneath fractured ribs.": ["Fracture"],
    "Swan-Ganz tip coiled within azygos vein.": ["Support Devices"],
    "Miliary nodules throughout; tuberculosis suspected.": ["Lung Lesion"],
}
SMALL = BalanceSettings(rare=0.03, cap="50%", min_cluster_size=5, min_samples=2)


def rows() -> list[dict[str, object]]:
    """160 times the same report, four families of like ones, three studies like no other; and the held-out ones."""
    texts = [(NORMAL, ["No Finding"])] * 160
    for family, word in enumerate(("effusion", "cardiomegaly", "atelectasis", "edema")):
        label = ("Pleural Effusion", "Cardiomegaly", "Atelectasis", "Edema")[family]
        for n in range(8 + 4 * family):
            texts.append((f"{word} {word}, {'unchanged ' * (n % 3)}{word} since examination {n // 3}.", [label]))
    texts += ALONE.items()
    texts[7] = (NORMAL, ["No Finding", "Pneumonia"])  # a rare label on a report that is not
    held = [(NORMAL, ["No Finding"], split) for split in ("validate", "test") for _ in range(4)]
    every = [(*row, "train") for row in texts] + held
    return [
        {"image": "a.png", "text": text, "labels": names, "split": split, "patient": f"p{n}", "study": f"s{n}"}
        for n, (text, names, split) in enumerate(every)
    ]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("raw")
    picture = Image.new("L", (32, 32), 90)  # nearly an empty one, which is nobody's duplicate
    picture.putpixel((10, 10), 200)
    picture.putpixel((20, 24), 30)
    picture.save(raw / "a.png")
    (raw / "data.json").write_text(json.dumps(rows()))
    out = tmp_path_factory.mktemp("balance") / "shards"
    build("image_text", raw, str(out), {}, Build(workers=1, shard_samples=50))
    return out


@pytest.fixture
def shards(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "shards"))


@pytest.fixture
def blank(monkeypatch: pytest.MonkeyPatch) -> None:
    """No picture, where the test is not about it."""
    monkeypatch.setattr(picture, "draw", lambda *given: b"picture")


def samples(url: str) -> dict[str, Sample]:
    """By key, in the order of the index; each read where the index says it lies."""
    store = Store(url)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)
    result = {}
    for row in range(len(index)):
        (member,) = (m for m in index.members(row) if m.name.endswith(".json"))
        data = store.read_range(manifest.shards[member.shard].name, member.offset, member.length)
        result[index.key[row].decode()] = Sample.model_validate_json(data)
    assert list(result) == [sample.key for sample in result.values()]
    return result


def training(url: str) -> list[Sample]:
    return [sample for sample in samples(url).values() if sample.split == "train"]


@pytest.mark.usefixtures("blank")
def test_what_is_often_said_is_thinned_and_the_rest_stays(shards: Path) -> None:
    before = {path.name: path.read_bytes() for path in shards.iterdir()}
    result = balance(str(shards), SMALL)
    assert result.url == f"{shards}#balanced"
    all_of, kept = training(str(shards)), training(result.url)
    assert (result.kept, result.dropped) == (len(kept), len(all_of) - len(kept))
    count = Counter(sample.report.text() for sample in kept)
    pneumonia = [s for s in kept if s.labels["chexpert"].get("Pneumonia")]
    assert len(pneumonia) == 1  # rare
    assert count[NORMAL] == result.cap + 1  # the one with a rare label is a point of its own
    assert all(count[text] == 1 for text in ALONE)
    assert result.clusters >= 2
    assert 5 <= result.cap <= 20
    assert result.largest[0].samples >= 159
    assert result.largest[0].kept == result.cap
    assert "Pneumonia" in result.rare
    assert "Edema" not in result.rare
    for name, (was, now) in result.labels.items():
        assert was == sum(s.labels["chexpert"].get(name) == 1 for s in all_of), name
        assert now == sum(s.labels["chexpert"].get(name) == 1 for s in kept), name
        assert name not in result.rare or was == now
    held = [sample for sample in samples(result.url).values() if sample.split != "train"]
    assert len(held) == 8
    assert set(samples(result.url)) <= set(samples(str(shards)))
    after = {path.name: path.read_bytes() for path in shards.iterdir()}
    assert set(after) - set(before) == {"balanced.json", "balanced.npz", "balanced.png"}
    assert {name: after[name] for name in before} == before
    manifest, whole = Manifest.load(Store(result.url)), Manifest.load(Store(shards))
    assert manifest.subset_of == whole.hash != manifest.hash
    assert manifest.shards == whole.shards
    assert manifest.splits == {"train": result.kept, "validate": 4, "test": 4}
    assert {name: manifest.build[name] for name in whole.build} == whole.build


def test_the_same_bytes_twice_and_others_with_another_seed(shards: Path, built: Path, tmp_path: Path) -> None:
    names = [f"balanced.{kind}" for kind in ("json", "npz", "png")]
    balance(str(shards), SMALL)
    first = {name: (shards / name).read_bytes() for name in names}
    again = Path(shutil.copytree(built, tmp_path / "again"))
    balance(str(again), SMALL)
    assert {name: (again / name).read_bytes() for name in names} == first
    assert first["balanced.png"].startswith(b"\x89PNG")
    assert Image.open(again / "balanced.png").width > 1000
    keys = set(samples(f"{shards}#balanced"))
    other = balance(str(again), BalanceSettings(**{**vars(SMALL), "seed": 1, "name": "other"}))
    assert other.kept == len(training(f"{shards}#balanced"))
    assert set(samples(other.url)) != keys


@pytest.mark.usefixtures("blank")
def test_a_cap_of_so_many_and_a_sample_of_the_points(shards: Path) -> None:
    result = balance(str(shards), BalanceSettings(**{**vars(SMALL), "cap": 3, "rare": 0.0, "fit": 40}))
    assert result.cap == 3
    assert result.rare == ()
    assert result.kept == result.noise + sum(min(3, cluster.samples) for cluster in result.largest)
    assert verify(result.url).ok


@pytest.mark.usefixtures("blank")
def test_vectors_of_the_users_own(shards: Path, tmp_path: Path) -> None:
    """They alone decide what is alike, whatever the texts say."""
    store = Store(shards)
    index = Manifest.load(store).load_index(store)
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(index), 16)).astype(np.float32)
    near = rng.choice(index.of_split("train"), 100, replace=False)
    vectors[near] = vectors[near[0]]
    path = tmp_path / "vectors.npz"
    np.savez(path, key=index.key[::-1], vector=vectors[::-1])
    own = {**vars(SMALL), "label_weight": 0.0, "rare": 0.0, "cap": 5, "embeddings": path, "min_cluster_size": 100}
    result = balance(str(shards), BalanceSettings(**own))
    kept = set(samples(result.url))
    alike = {key.decode() for key in index.key[near]}
    assert len(alike & kept) == 5
    assert {key.decode() for key in index.key} - alike == kept - alike
    np.savez(path, key=index.key[1:], vector=vectors[1:])
    with pytest.raises(UserError, match="no vector of"):
        balance(str(shards), BalanceSettings(**own))
    path.write_bytes(b"none")
    with pytest.raises(UserError, match=r"allowed is a \.npz of key and vector"):
        balance(str(shards), BalanceSettings(**own))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cap": 0}, "cap: '0'; allowed are a count"),
        ({"cap": "101%"}, "cap: '101%'"),
        ({"rare": 2.0}, "rare: 2.0"),
        ({"name": "manifest"}, "name: 'manifest'"),
        ({"name": "index"}, "full index"),
        ({"min_cluster_size": 1}, "min_cluster_size: 1; allowed are whole numbers from 2"),
    ],
)
def test_a_setting_that_cannot_be(given: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        BalanceSettings(**given)  # type: ignore[arg-type]


def test_what_cannot_be_balanced(shards: Path) -> None:
    with pytest.raises(UserError, match="'cheXpert' \\(did you mean 'chexpert'\\?\\); allowed are chexpert"):
        balance(str(shards), BalanceSettings(vocabulary="cheXpert"))
    with pytest.raises(UserError, match="is a subset; allowed is the folder of all samples"):
        balance(f"{shards}#balanced", SMALL)
    shard = sorted(shards.glob("train-*.tar"))[0]
    data = bytearray(shard.read_bytes())
    data[data.index(b'"dataset"') + 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=f"{shard.name}: .*checksum differs"):
        balance(str(shards), SMALL)
    assert not (shards / "balanced.json").exists()


def test_choosing_keeps_what_is_rare_first() -> None:
    keys = np.array([b"k%d" % n for n in range(100)])
    cluster = np.array([0] * 60 + [1] * 30 + [-1] * 10)
    always = np.zeros(100, bool)
    always[[3, 4, 70, 71, 72, 73]] = True
    kept = select(keys, cluster, always, 3, 0)
    assert [int(kept[cluster == number].sum()) for number in (0, 1, -1)] == [3, 4, 10]
    assert kept[always].all()
    assert (kept == select(keys, cluster, always, 3, 0)).all()
    shuffled = np.random.default_rng(0).permutation(100)
    assert (select(keys[shuffled], cluster[shuffled], always[shuffled], 3, 0) == kept[shuffled]).all()


@pytest.mark.usefixtures("blank")
def test_verify_holds_a_subset_against_the_whole(shards: Path) -> None:
    result = balance(str(shards), SMALL)
    report = verify(result.url)
    assert report.ok
    assert report.samples == result.kept + 8
    store = Store(result.url)
    manifest = Manifest.load(store)
    index = manifest.load_index(store)

    def faults(changed: object) -> str:
        data = changed.to_bytes()  # type: ignore[attr-defined]
        (shards / "balanced.npz").write_bytes(data)
        file = manifest.index.model_copy(update={"size": len(data), "sha256": sha256(data)})
        (shards / "balanced.json").write_bytes(manifest.model_copy(update={"index": file}).to_bytes())
        return "; ".join(fault.fault for fault in verify(result.url).faults)

    offset = index.offset.copy()
    offset[3] += 512
    assert "another row than in index.npz" in faults(type(index)(**{**vars(index), "offset": offset}))
    key = index.key.copy()
    key[0] = b"image_text-" + b"0" * 16
    assert "not in index.npz" in faults(type(index)(**{**vars(index), "key": key}))
    held = np.arange(len(index))
    assert "1 samples of split 'test' are missing" in faults(index.take(held[:-1]))
    assert "not in the order" in faults(index.take(held[::-1]))
    assert faults(index.take(held)) == ""

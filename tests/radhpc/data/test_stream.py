"""The stream itself, with a reader that does nothing: any life on any ranks gives the batches of one rank.

What is expected is computed from the order alone, position by position, and never by a stream.
"""

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from radhpc.core.files import write_atomically
from radhpc.core.manifest import INDEX, MANIFEST, FileEntry, Manifest, Shard, sha256
from radhpc.core.recipe import OptimizerSettings, Stage, StreamSettings
from radhpc.core.sample import SPLITS, Sample
from radhpc.data.source import BadSample, RawSample, Source
from radhpc.data.stream import BatchPlan, Step, Stream, StreamSpec, stage_sampler, stage_samples, stage_steps
from shards.execution.assembly import concatenate, index_of_shard
from shards.execution.writer import write_shard

pytestmark = pytest.mark.timeout(120)

# Samples of each shard, and the most views of a study.
DATASETS = {"mixed": ((7, 1, 12, 5), 4), "plain": ((3, 20, 9), 1), "small": ((6,), 2)}
Key = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    key: str
    views: int
    length: int
    supervised: int


class Light:
    """A reader that keeps of each sample its name and its size."""

    def read(self, raw: RawSample) -> Row:
        length = len(raw.members[0][1])
        return Row(raw.key, len(raw.members) - 1, length, length // 2)

    def empty(self) -> Row:
        return Row("", 1, 10, 0)

    def batch(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows)


def make(folder: Path, name: str, counts: Sequence[int], most_views: int) -> Path:
    """A dataset in shards of these sizes, whose studies have one view to `most_views` and texts of any length."""
    folder.mkdir()
    random_ = random.Random(name)
    shards: list[Shard] = []
    parts = []
    for number, count in enumerate(counts):
        described = [
            Sample.model_validate(
                {
                    "dataset": name,
                    "patient": f"{random_.getrandbits(64):016x}",
                    "study": f"{random_.getrandbits(64):016x}",
                    "split": "train",
                    "images": [{"width": 9, "height": 9}] * random_.randint(1, most_views),
                    "report": {"findings": "clear " * random_.randint(1, 60)},
                }
            )
            for _ in range(count)
        ]
        members = (
            (
                sample.key,
                [("json", sample.model_dump_json().encode())]
                + [(f"{n}.jpg", f"{sample.key} {n}".encode()) for n in range(len(sample.images))],
            )
            for sample in described
        )
        shard, rows = write_shard(folder / f"train-{number:06d}.tar", members)
        assert shard is not None
        parts.append(index_of_shard(rows, [sample.patient for sample in described], "train", number))
        shards.append(shard)
    columns = concatenate(parts).to_bytes()
    write_atomically(folder / INDEX, columns)
    samples = {str(split): sum(counts) if split == "train" else 0 for split in SPLITS}
    manifest = Manifest(
        dataset=name,
        samples=sum(counts),
        splits=samples,
        patients=samples,
        shards=tuple(shards),
        index=FileEntry(name=INDEX, size=len(columns), sha256=sha256(columns)),
        build={},
        build_hash=sha256(b""),
    )
    write_atomically(folder / MANIFEST, manifest.to_bytes())
    return folder


@pytest.fixture(scope="session")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("datasets")
    return {name: make(root / name, name, *shape) for name, shape in DATASETS.items()}


def stage_of(**given_: Any) -> Stage:
    return Stage(name="s", train=(".*",), optimizer=OptimizerSettings(learning_rate=1.0), **given_)


@dataclass(frozen=True)
class Life:
    """How a run was set up between two interruptions."""

    world: int
    micro_batch: int | None
    threads: int
    prefetch: int
    steps: int  # after which it was cut


LIFE = st.builds(
    Life,
    world=st.integers(1, 9),
    micro_batch=st.none() | st.integers(1, 5),
    threads=st.integers(1, 3),
    prefetch=st.integers(1, 3),
    steps=st.integers(0, 7),
)


@dataclass(frozen=True)
class Data:
    """Which datasets, how they are mixed, and for how long."""

    names: tuple[str, ...]
    mix: str
    weights: tuple[float, ...]
    window: int | None
    batch: int
    epochs: int
    steps: int
    seed: int

    def shards(self, folders: Mapping[str, Path]) -> tuple[str, ...] | dict[str, float]:
        urls = [str(folders[name]) for name in self.names]
        return dict(zip(urls, self.weights, strict=False)) if self.mix == "weights" else tuple(urls)

    def recipe(self, life: Life | None = None) -> StreamSettings:
        changes = {"threads": life.threads, "prefetch": life.prefetch} if life else {}
        return StreamSettings(window=self.window, temperature=2.0 if self.mix == "temperature" else None, **changes)

    def stage(self, life: Life | None = None) -> Stage:
        micro = life.micro_batch if life else None
        length = {"epochs": self.epochs} if self.mix == "none" else {"steps": self.steps}
        return stage_of(batch=self.batch, micro_batch=micro, **length)


DATA = st.builds(
    Data,
    names=st.permutations(list(DATASETS)).flatmap(
        lambda names: st.integers(1, len(names)).map(lambda n: tuple(names[:n]))
    ),
    mix=st.sampled_from(["none", "weights", "temperature"]),
    weights=st.tuples(*[st.floats(0.1, 8)] * 3),
    window=st.none() | st.integers(1, 6),
    batch=st.integers(1, 23),
    epochs=st.integers(1, 2),
    steps=st.integers(1, 9),
    seed=st.integers(0, 99),
)


def lived(source: Source, data: Data, life: Life, done: int) -> list[list[Step]]:
    """The steps of every rank in one life that goes on after `done` steps."""
    stage = data.stage(life)
    cursor = min(done * data.batch, stage_samples(stage, len(source)))
    streams = [
        Stream(source, Light(), StreamSpec(stage, 0, data.recipe(life), data.seed, rank, life.world, cursor))
        for rank in range(life.world)
    ]
    try:
        rows = zip(*streams, strict=True)  # ranks in lockstep: none has a step more than another
        return [list(step) for step in itertools.islice(rows, life.steps)]
    finally:
        for stream in streams:
            stream.close()


def expected(source: Source, data: Data) -> list[list[str]]:
    """The keys of every global batch, position by position."""
    stage, order = data.stage(), stage_sampler(source, 0, data.recipe(), data.seed)
    count = stage_samples(stage, len(source))
    numbers = [int(order.at(np.asarray([position])).sample[0]) for position in range(count)]
    return [source.keys(np.asarray(numbers[at : at + data.batch])) for at in range(0, count, data.batch)]


def micro_batches(ranks: list[Step]) -> list[list[Row]]:
    """The micro-batches of a step in the order in which they were dealt."""
    return [batch for turn in zip(*(step.micro_batches for step in ranks), strict=True) for batch in turn]


def names(rows: Sequence[Row]) -> list[str]:
    return [row.key for row in rows if row.key]


@given(data=DATA, lives=st.lists(LIFE, min_size=1, max_size=3))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
def test_any_lives_on_any_ranks_train_on_the_batches_of_one(
    datasets: dict[str, Path], data: Data, lives: list[Life]
) -> None:
    source = Source(data.shards(datasets), "train")
    wanted = expected(source, data)
    assert len(wanted) == stage_steps(data.stage(), len(source))
    done: list[list[str]] = []
    for life in [*lives, Life(2, 3, 2, 2, 10**6)]:
        for ranks in lived(source, data, life, len(done)):
            batch = wanted[len(done)]
            assert {step.number for step in ranks} == {len(done)}
            assert Counter(key for step in ranks for key in step.keys) == Counter(batch)
            size = min(life.micro_batch or data.batch, -(-data.batch // life.world))
            rounds = -(-len(batch) // (size * life.world))  # no more than are needed
            for step in ranks:
                assert [len(rows) for rows in step.micro_batches] == [size] * rounds
                assert [key for rows in step.micro_batches for key in names(rows)] == step.keys
                assert all(row.views >= 1 for rows in step.micro_batches for row in rows)
                assert not step.bad
                held = [row for rows in step.micro_batches for row in rows if row.key]
                assert step.tokens == sum(row.length for row in held)
                assert step.supervised == sum(row.supervised for row in held)
                assert step.padded == sum(max(row.length for row in rows) * size for rows in step.micro_batches)
            done.append(sorted(batch))
    assert done == [sorted(batch) for batch in wanted]
    if data.mix == "none":
        every = sorted(source.keys(np.arange(len(source))))
        flat = [key for batch in wanted for key in batch]
        for epoch in range(data.epochs):  # the last batch holds the rest: nothing is dropped, nothing repeated
            assert sorted(flat[epoch * len(source) : (epoch + 1) * len(source)]) == every


@given(data=DATA, life=LIFE)
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_the_longest_come_first_and_little_is_padded(datasets: dict[str, Path], data: Data, life: Life) -> None:
    """Never more than by dealing the batch as it comes: in views always, in tokens where all have as many views."""
    source = Source(data.shards(datasets), "train")
    rows = {raw.key: Light().read(raw) for raw in source.read_raw(np.arange(len(source)))}
    for batch, ranks in zip(expected(source, data), lived(source, data, life, 0), strict=False):
        dealt = micro_batches(ranks)
        size = len(dealt[0])
        flat = [row for micro in dealt for row in micro if row.key]
        sizes = [(row.views, row.length) for row in flat]
        assert sizes == sorted(sizes, reverse=True)
        unsorted = [[rows[key] for key in batch[at : at + size]] for at in range(0, len(batch), size)]
        assert longest(dealt, "views") <= longest(unsorted, "views")
        if len({row.views for row in flat}) == 1:
            assert longest(dealt, "length") <= longest(unsorted, "length")


def longest(dealt: Sequence[Sequence[Row]], what: str) -> int:
    """The views or tokens of the longest sample of each micro-batch, added up: all others are filled up to it."""
    held = [[int(getattr(row, what)) for row in rows if row.key] for rows in dealt]
    return sum(max(values) for values in held if values)


class Tokens(Light):
    """A reader that counts the tokens of the report, and keeps no image."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def read(self, raw: RawSample) -> Row:
        text = Sample.model_validate_json(bytes(raw.members[0][1])).report.text()
        length = len(self.tokenizer(text)["input_ids"])
        return Row(raw.key, len(raw.members) - 1, length, length)


def test_of_real_wordings_little_is_padded(tmp_path: Path) -> None:
    """Phantoms' reports: sorted by the bytes of their descriptions, they need less than half of the padding that the
    same micro-batches need unsorted, and their images less than a quarter.
    """
    from transformers import AutoTokenizer

    from radhpc.models.tokenizer import train
    from shards.build import BuildSettings, build

    url = str(tmp_path / "shards")
    options = {"studies": "400", "size": "32"}
    build("phantom", None, url, options, BuildSettings(workers=1, longest_side=32), lambda done, total: None)
    source = Source((url,), "train")
    train((sample.report.text() for sample in source.samples()), 800, tmp_path / "tokenizer")
    reader = Tokens(AutoTokenizer.from_pretrained(tmp_path / "tokenizer"))
    batch, size = 64, 4
    stage = stage_of(epochs=1, batch=batch, micro_batch=size)
    streams = [Stream(source, reader, StreamSpec(stage, 0, StreamSettings(), 0, rank, 2)) for rank in range(2)]
    steps = list(zip(*streams, strict=True))[:-1]  # the last batch is filled up with empty slots
    for stream in streams:
        stream.close()
    dealt = [rows for ranks in steps for rows in micro_batches(list(ranks))]
    rows = {row.key: row for micro in dealt for row in micro}
    positions = np.arange(len(dealt) * size)
    keys = source.keys(stage_sampler(source, 0, StreamSettings(), 0).at(positions).sample)
    unsorted = [[rows[key] for key in keys[at : at + size]] for at in range(0, len(keys), size)]
    for what, share in (("length", 1 / 2), ("views", 1 / 4)):
        needed = sum(getattr(row, what) for row in rows.values())
        assert longest(dealt, what) * size - needed < share * (longest(unsorted, what) * size - needed), what
    assert sum(step.padded for ranks in steps for step in ranks) == longest(dealt, "length") * size


@given(
    data=DATA,
    life=LIFE,
    flips=st.lists(st.tuples(st.sampled_from(list(DATASETS)), st.integers(0, 10**6), st.integers(0, 7)), max_size=6),
)
@example(Data(("small",), "none", (1, 1, 1), None, 12, 2, 1, 0), Life(1, None, 1, 1, 9), [("small", 0, 0)])
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
def test_a_bad_sample_leaves_all_others_where_they_were(
    datasets: dict[str, Path], broken: dict[str, Path], data: Data, life: Life, flips: list[tuple[str, int, int]]
) -> None:
    """A flipped bit in any member: its samples are named at every turn, in empty slots."""
    whole = Source(data.shards(datasets), "train")
    bad = set()
    for name, which, bit in flips:
        bad |= {flip(broken[name], which, bit)}
    try:
        damaged = Source(data.shards(broken), "train")
        assert damaged.hashes == whole.hashes
        for clean, ranks in zip(lived(whole, data, life, 0), lived(damaged, data, life, 0), strict=True):
            for before, after in zip(micro_batches(clean), micro_batches(ranks), strict=True):
                assert names(after) == [key for key in names(before) if key not in bad]
                assert len(after) == len(before)
            for before, after in zip(clean, ranks, strict=True):
                turns = Counter(key for key in before.keys if key in bad)
                assert Counter(key for key, _ in after.bad) == turns
                assert all(".tar: " in fault and "checksum differs" in fault for _, fault in after.bad)
                assert Counter(after.keys) + turns == Counter(before.keys)
    finally:
        for name in broken:
            for shard in broken[name].glob("*.tar"):
                shutil.copyfile(datasets[name] / shard.name, shard)


@pytest.fixture(scope="session")
def broken(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A copy whose shards a test may damage; it mends them."""
    root = tmp_path_factory.mktemp("broken")
    return {name: Path(shutil.copytree(folder, root / name)) for name, folder in datasets.items()}


def flip(folder: Path, which: int, bit: int) -> str:
    """Flip a bit of one member; returns the sample's key. The same bit twice would mend it, so it is set apart."""
    source = Source((str(folder),), "train")
    index = source.datasets[0].index
    member = which % len(index.offset)
    sample = int(np.searchsorted(index.first, member, "right")) - 1
    with (folder / source.datasets[0].manifest.shards[int(index.shard[sample])].name).open("r+b") as file:
        at = int(index.offset[member]) + which % int(index.length[member])
        file.seek(at)
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1 << bit if not is_flipped(source, sample) else value]))
    return source.key(sample)


def is_flipped(source: Source, sample: int) -> bool:
    try:
        list(source.read_raw(np.asarray([sample])))
    except BadSample:
        return True
    return False


def test_the_documented_example_of_a_deal() -> None:
    """Six samples, micro-batches of two, two ranks; and a last batch of three."""
    numbers, sizes = np.arange(6), np.asarray([[1, 5], [1, 9], [2, 1], [1, 7], [1, 6], [1, 8]])
    plan = BatchPlan(samples=9, batch=6, micro_batch=2, world=2)
    assert plan.steps == 2
    assert [plan.rank_samples(numbers, sizes, rank).tolist() for rank in range(2)] == [[2, 1, 4, 0], [5, 3]]
    assert [plan.micro_batch_sizes(0, rank) for rank in range(2)] == [[2, 2], [2, 0]]
    assert [plan.micro_batch_sizes(1, rank) for rank in range(2)] == [[2], [1]]


def row(source: Source, stage: int = 0, seed: int = 0, **changes: Any) -> list[str]:
    """The keys of the first 100 positions."""
    recipe = StreamSettings(**{"window": 3, **changes})
    return source.keys(stage_sampler(source, stage, recipe, seed).at(np.arange(100)).sample)


def test_the_order_depends_on_what_it_shall_and_on_nothing_else(datasets: dict[str, Path], tmp_path: Path) -> None:
    mixed, plain = str(datasets["mixed"]), str(datasets["plain"])
    first = row(Source((mixed, plain), "train"))
    moved = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in datasets.items()}
    same = [
        row(Source((str(moved["mixed"]), str(moved["plain"])), "train")),  # elsewhere
        row(Source((f"file://{mixed}", f"file://{plain}"), "train")),  # through the client of object stores
        row(Source((mixed, plain), "train"), threads=3, prefetch=9, requests=1, prefetch_megabytes=16),
        row(Source((mixed, plain), "train"), max_bad_samples=9, audit=False),
    ]
    assert all(one == first for one in same)
    other_build = Manifest.model_validate_json((moved["mixed"] / MANIFEST).read_bytes())
    write_atomically(moved["mixed"] / MANIFEST, other_build.model_copy(update={"build": {"again": 1}}).to_bytes())
    rows = [
        first,
        row(Source((mixed, plain), "train"), seed=1),
        row(Source((mixed, plain), "train"), stage=1),
        row(Source((mixed, plain), "train"), window=2),
        row(Source((mixed, plain), "train"), window=None),
        row(Source((str(moved["mixed"]), plain), "train")),
        row(Source((plain, mixed), "train")),
        row(Source({mixed: 1, plain: 1}, "train")),
        row(Source({mixed: 1, plain: 2}, "train")),
        row(Source((mixed, plain), "train"), temperature=3.0),
    ]
    assert len(set(map(tuple, rows))) == len(rows)
    # Weights are shares, and a temperature of 1 is the sizes themselves.
    assert row(Source({mixed: 3, plain: 6}, "train")) == row(Source({mixed: 1, plain: 2}, "train"))
    sizes = {mixed: sum(DATASETS["mixed"][0]), plain: sum(DATASETS["plain"][0])}
    assert row(Source((mixed, plain), "train"), temperature=1.0) == row(Source(sizes, "train"))

"""Samples to steps: which samples a step trains on, who of the ranks takes which, decoded and batched ahead of time.

    manifests -> source.py   numbers -> places -> checked bytes
    recipe    -> sampler.py    position -> number of a sample
              -> prefetch.py    reads this rank's coming samples ahead, where they are far
              -> Stream      decodes and batches them: Step after Step

The samples of step k are positions k * batch to (k + 1) * batch of the order, whatever the number of ranks. Within
them, the longest come first and like with like: sorted by images and length of text, they are cut into micro-batches,
and these are dealt to the ranks in turn, so that little is padded and no rank waits long for another. Example with
batch 6, micro_batch 2 and 2 ranks: rank 0 takes the two longest and the two shortest, rank 1 the two between, and an
empty micro-batch, which has no loss. Every rank has as many micro-batches as its peers; each of them has an image.

The last step of a stage that counts epochs holds the rest and may be smaller; nothing is dropped, nothing repeated. A
sample that cannot be read leaves an empty slot, so that all others keep their places.

    python -m radhpc.data.stream recipes/quickstart.yaml --show 3      # what the model will see, printed and as
    pictures
"""

import argparse
import io
import itertools
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from radhpc.core.batch import IGNORE
from radhpc.core.errors import UserError
from radhpc.core.files import write_atomically
from radhpc.core.recipe import Recipe, Stage, StreamSettings, load
from radhpc.core.sample import SPLITS, Split
from radhpc.data.prefetch import Prefetcher
from radhpc.data.sampler import Positions, Sampler
from radhpc.data.source import BadSample, RawSample, Source, decode_study

_TASK = 16  # samples that one task decodes
_PATIENCE = 0.2  # seconds between two looks at whether the run has to stop
_DEALT = 4096  # samples, of all ranks, whose order is computed at a time


class Reader(Protocol):
    """What becomes of a sample: collate.StudyEncoder for training."""

    def read(self, raw: RawSample) -> Any:
        """Decode and encode one sample; the result has `key`, `supervised` and `length`. Raises BadSample."""
        ...

    def empty(self) -> Any:
        """A slot without a sample."""
        ...

    def batch(self, rows: Sequence[Any]) -> Any:
        """One micro-batch."""
        ...


class StopRequested(Exception):
    """The run was told to stop while it waited for data."""


@dataclass
class Step:
    """One rank's share of one optimizer step."""

    number: int  # in the stage, from 0
    micro_batches: list[Any]
    keys: list[str]  # samples with a loss, those without text included
    bad: list[tuple[str, str]] = field(default_factory=list)  # samples that could not be read, and why
    supervised: int = 0  # tokens with a loss
    tokens: int = 0  # tokens that are no padding
    padded: int = 0  # tokens, padding included
    wait_seconds: float = 0.0  # that the loop stood still for it


def stage_samples(stage: Stage, length: int) -> int:
    """How many samples a stage trains on."""
    return stage.steps * stage.batch if stage.steps is not None else (stage.epochs or 0) * length


def stage_steps(stage: Stage, length: int) -> int:
    """How many optimizer steps a stage has. With `epochs` the last one may be smaller than the batch."""
    return -(-stage_samples(stage, length) // stage.batch)


def stage_sampler(source: Source, stage_number: int, recipe: StreamSettings, seed: int) -> Sampler:
    """The order of a stage: a pure function of seed, stage, manifests, window and weights. Raises UserError."""
    shards, weights = [part.shard_samples() for part in source.datasets], source.weights
    if weights is None and recipe.temperature is None:
        shards = [np.concatenate(shards)]
    else:
        for part in source.datasets:
            if not len(part.rows):
                raise UserError(f"{part.url}: no sample of split '{source.split}', but a weight")
        if weights is None and recipe.temperature is not None:
            weights = tuple(len(part.rows) ** (1 / recipe.temperature) for part in source.datasets)
    return Sampler(shards, f"{seed}/{stage_number}/{'/'.join(source.hashes)}", recipe.window, weights)


@dataclass(frozen=True)
class BatchPlan:
    """How the samples of each step are dealt to ranks and micro-batches: arithmetic, the same on every rank."""

    samples: int  # of the stage
    batch: int
    size: int  # of a micro-batch
    world: int

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch)

    def count(self, step: int) -> int:
        """The samples of a step, over all ranks."""
        return min(self.batch, self.samples - step * self.batch)

    def counts(self, step: int, rank: int) -> list[int]:
        """The samples of each micro-batch of a rank; the number of micro-batches is the same for all ranks."""
        rounds = -(-self.count(step) // (self.size * self.world))
        before = (np.arange(rounds) * self.world + rank) * self.size
        return [int(count) for count in np.clip(self.count(step) - before, 0, self.size)]

    def numbers(self, numbers: Positions, sizes: npt.NDArray[np.int64], rank: int) -> Positions:
        """The samples of a rank in a step, micro-batch by micro-batch: the longest first (by images, then by text)."""
        ranked = numbers[np.lexsort((-sizes[:, 1], -sizes[:, 0]))]  # a stable sort, so that it is repeatable
        width = self.size * self.world
        return np.concatenate(
            [ranked[at + rank * self.size :][: self.size] for at in range(0, len(numbers), width)]
        )  # fmt: skip


class Stream:
    """The steps of one stage, from a cursor on. Iterate it once; leave it with close()."""

    def __init__(
        self,
        source: Source,
        reader: Reader,
        stage: Stage,
        stage_number: int,
        recipe: StreamSettings,
        seed: int,
        rank: int = 0,
        world: int = 1,
        cursor: int = 0,
        pin: bool = False,
        told: Callable[[], object] = lambda: False,
    ) -> None:
        """`cursor`: samples of this stage that were trained on; `pin`: leave batches in memory that a GPU reads.

        `told`: whether the run has to stop. While data are slow to come it is asked, and if so StopRequested is raised.
        """
        samples = stage_samples(stage, len(source))
        assert cursor % stage.batch == 0 or cursor == samples, cursor
        most = -(-stage.batch // world)
        self.plan = BatchPlan(samples, stage.batch, min(stage.micro_batch or most, most), world)
        self._source, self._reader, self._rank, self._pin, self._told = source, reader, rank, pin, told
        self._order = stage_sampler(source, stage_number, recipe, seed)
        self._first, self._prefetch = -(-cursor // stage.batch), recipe.prefetch
        self._epochs: dict[int, int] = {}  # of the turns that are read ahead
        self.prefetcher = Prefetcher(source, self._turns(), recipe, world, samples / max(1, len(source)))
        self._decoders = ThreadPoolExecutor(recipe.threads, thread_name_prefix="decode")
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="assemble")

    def __iter__(self) -> Iterator[Step]:
        pending: deque[Future[Step]] = deque()
        turn = 0
        for number in range(self._first, self.plan.steps):
            tasks = []
            for count in self.plan.counts(number, self._rank):
                ends = [*range(turn, turn + count, _TASK), turn + count]
                tasks.append([self._decoders.submit(self._read, *ends) for ends in itertools.pairwise(ends)])
                turn += count
            pending.append(self._assembler.submit(self._assemble, number, tasks))
            if len(pending) > self._prefetch:
                yield self._awaited(pending.popleft())
        while pending:
            yield self._awaited(pending.popleft())

    def _awaited(self, future: "Future[Step]") -> Step:
        started = time.perf_counter()
        while wait([future], _PATIENCE).not_done:
            if self._told():
                raise StopRequested
        step = future.result()
        step.wait_seconds = time.perf_counter() - started
        return step

    def close(self) -> None:
        """Drop what was read ahead."""
        for pool in (self._decoders, self._assembler):
            pool.shutdown(wait=False, cancel_futures=True)
        self.prefetcher.close()
        for pool in (self._decoders, self._assembler):
            pool.shutdown(wait=True)

    def traffic(self) -> dict[str, float]:
        """What this rank has asked of stores and of the node's cache so far."""
        traffic, cache = self._source.traffic, self.prefetcher.cache
        return {
            "requests": traffic.requests,
            "megabytes": traffic.bytes / 1e6,
            "repeated": sum(traffic.retries.values()),
            "cache_hits": cache.counts.hits if cache else 0,
            "cache_misses": cache.counts.misses if cache else 0,
        }

    def _turns(self) -> Iterator[Positions]:
        """This rank's samples from the cursor on, some steps at a time."""
        deal = self.plan
        at_once, turn = max(1, _DEALT // deal.batch), 0
        for first in range(self._first, deal.steps, at_once):
            positions = np.arange(first * deal.batch, min((first + at_once) * deal.batch, deal.samples))
            drawn = self._order.at(positions)
            numbers = drawn.sample
            sizes = self._source.sizes(numbers)
            for start in range(0, len(numbers), deal.batch):
                step = slice(start, start + deal.batch)
                mine = deal.numbers(np.arange(len(numbers[step])), sizes[step], self._rank)
                self._epochs |= zip(range(turn, turn + len(mine)), drawn.epoch[step][mine].tolist(), strict=True)
                turn += len(mine)
                yield numbers[step][mine]

    def _read(self, first: int, end: int) -> list[Any]:
        """Some turns, decoded; a BadSample stands for itself."""
        rows: list[Any] = []
        for turn, raw in enumerate(self.prefetcher.take(first, end), first):
            epoch = self._epochs.pop(turn)
            try:
                rows.append(raw if isinstance(raw, BadSample) else self._reader.read(raw._replace(epoch=epoch)))
            except BadSample as error:
                rows.append(error)
        return rows

    def _assemble(self, number: int, tasks: list[list[Future[list[Any]]]]) -> Step:
        step = Step(number, [], [])
        for task in tasks:
            read = [row for future in task for row in future.result()]
            rows = [row for row in read if not isinstance(row, BadSample)]
            step.bad += [(row.key, row.fault) for row in read if isinstance(row, BadSample)]
            step.keys += [row.key for row in rows]
            step.supervised += sum(row.supervised for row in rows)
            step.tokens += sum(row.length for row in rows)
            rows += [self._reader.empty() for _ in range(self.plan.size - len(rows))]
            step.padded += max(row.length for row in rows) * len(rows)
            batch = self._reader.batch(rows)
            step.micro_batches.append({name: t.pin_memory() for name, t in batch.items()} if self._pin else batch)
        return step


def main(arguments: Sequence[str]) -> None:
    """Say what the model will see of the first samples of a stage, and draw it. Raises UserError."""
    parser = argparse.ArgumentParser("python -m radhpc.data.stream", description="What the model will see of a recipe.")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as those in recipes/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, such as seed=1")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="samples, in the order of the stage")
    parser.add_argument("--stage", metavar="NAME", help="default: the first")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--out", type=Path, default=Path("shown"), help="folder of the pictures; default: shown")
    parser.error = _refuse  # type: ignore[method-assign]
    given = parser.parse_intermixed_args(arguments)
    recipe = load(given.recipe, given.overrides)
    names = [stage.name for stage in recipe.stages]
    if given.stage not in (None, *names):
        raise UserError(f"--stage {given.stage}: allowed are {', '.join(names)}")
    if given.show < 1:
        raise UserError(f"--show {given.show}: allowed are numbers from 1")
    try:
        given.out.mkdir(mode=0o700, parents=True, exist_ok=True)  # pictures of patients
    except OSError as error:
        raise UserError(f"--out {given.out}: {error.strerror}") from error
    _show(recipe, names.index(given.stage or names[0]), given.split, given.show, given.out)


def _show(recipe: Recipe, number: int, split: Split, count: int, out: Path) -> None:
    from radhpc.core import board
    from radhpc.data import collate
    from radhpc.models import family as models, tokenizer  # PyTorch, which a stream does without

    stage = recipe.stages[number]
    source = Source(recipe.shards_of(stage), split)
    if not len(source):
        raise UserError(f"stage '{stage.name}': no sample of split '{split}' in its shards")
    print(f"stage {stage.name}, split {split}: {len(source)} samples in {len(source.datasets)} dataset(s)")
    images = source.sizes(np.arange(len(source)))[:, 0]
    limit = recipe.images_of(stage).limit
    if limit is not None and (more := int((images > limit).sum())):
        print(f"{more} of them have more than {limit} view(s), of which the others are left out")
    if near := recipe.text_of(stage).neighbours:
        print(f"before the prompt of a report, not shown here: reports of {near} training studies that look alike")
    with tempfile.TemporaryDirectory() as temporary:
        folder = recipe.model.tokenizer.folder or recipe.model.weights or temporary
        if recipe.model.tokenizer.train_vocabulary is not None:  # on what the first stage is trained on, as a run does
            samples = Source(recipe.shards_of(recipe.stages[0]), "train").samples()
            first = recipe.text_of(recipe.stages[0])
            texts = (collate.conversation(sample, first, recipe.findings) for sample in samples)
            tokenizer.train(texts, recipe.model.tokenizer.train_vocabulary, Path(folder))
        family = models.family(recipe.model, folder)
    encoder = collate.StudyEncoder(family, recipe.text_of(stage), recipe.images_of(stage), recipe.findings, recipe.seed)
    turns = min(count, stage_samples(stage, len(source)))
    drawn = stage_sampler(source, number, recipe.stream, recipe.seed).at(np.arange(turns))
    for turn, place in enumerate(source.locate(drawn.sample)):
        print(f"\n{turn} {place.key}, epoch {drawn.epoch[turn]} of {source.datasets[place.part].url}")
        try:
            raw = next(source.read_raw(np.asarray([place.number])))._replace(epoch=int(drawn.epoch[turn]))
            (_, described, views), row = decode_study(raw), encoder.read(raw)
        except BadSample as error:
            print(f"  cannot be read, and leaves an empty slot: {error.fault}")
            continue
        taught = row.labels != IGNORE
        for n, (view, image) in enumerate(itertools.zip_longest(views, described.images)):
            print(f"  view {n}     {image.view if image else None}, {view.width} x {view.height} pixels, {view.mode}")
        for name, values in row.images.items():
            small = f" {values.tolist()}" if values.size <= 8 else ""
            print(f"  {name:<10} {values.shape} {values.dtype}{small}")
        print(f"  task       {row.task or 'none: nothing is learnt'}")
        print(f"  prompt     {(~taught).sum()} tokens: {family.tokenizer.decode(row.input_ids[~taught])}")
        cut = f", cut at text.max_tokens {recipe.text_of(stage).max_tokens}" if row.cut else ""
        print(f"  answer     {row.supervised} supervised tokens{cut}: {family.tokenizer.decode(row.input_ids[taught])}")
        picture = board.side_by_side({"in the shard": views, "what the model sees": family.show_images(row.images)})
        path, data = out / f"{turn}-{place.key}.png", io.BytesIO()
        picture.save(data, "PNG")
        write_atomically(path, data.getvalue(), 0o600)
        print(f"  picture    {path}")


def _refuse(message: str) -> NoReturn:
    raise UserError(f"python -m radhpc.data.stream: {message}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)

"""Turn samples into steps: which samples a step trains on, which rank takes which, decoded and batched ahead of time.

    manifests -> source.py     numbers -> locations -> checked bytes
    recipe    -> sampler.py    position -> number of a sample
              -> prefetch.py   reads this rank's coming samples ahead, where they are far
              -> Stream        decodes and batches them: Step after Step

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
from radhpc.core.sample import SPLITS, Sample, Split
from radhpc.data.prefetch import Prefetcher
from radhpc.data.sampler import Positions, Sampler
from radhpc.data.source import BadSample, RawSample, Source, decode_study

_TASK = 16  # samples that one task decodes
_POLL_SECONDS = 0.2  # between two looks at whether the run has to stop
_PLANNED_SAMPLES = 4096  # of all ranks, whose order is computed at a time


class SampleEncoder(Protocol):
    """Turns samples into rows, and rows into batches: collate.StudyEncoder for training."""

    def read(self, raw: RawSample) -> Any:
        """Decode and encode one sample; the result has `key`, `supervised` and `length`. Raises BadSample."""
        ...

    def empty(self) -> Any:
        """Return a slot without a sample."""
        ...

    def batch(self, rows: Sequence[Any]) -> Any:
        """Return one micro-batch."""
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
    """Return how many samples a stage trains on."""
    return stage.steps * stage.batch if stage.steps is not None else (stage.epochs or 0) * length


def stage_steps(stage: Stage, length: int) -> int:
    """Return how many optimizer steps a stage has. With `epochs` the last one may be smaller than the batch."""
    return -(-stage_samples(stage, length) // stage.batch)


def stage_sampler(source: Source, stage_number: int, recipe: StreamSettings, seed: int) -> Sampler:
    """Return the order of a stage: a pure function of seed, stage, manifests, window and weights. Raises UserError."""
    shards, weights = [dataset.shard_samples() for dataset in source.datasets], source.weights
    if weights is None and recipe.temperature is None:
        shards = [np.concatenate(shards)]
    else:
        for dataset in source.datasets:
            if not len(dataset.rows):
                raise UserError(f"{dataset.url}: no sample of split '{source.split}', but a weight")
        if weights is None and recipe.temperature is not None:
            weights = tuple(len(dataset.rows) ** (1 / recipe.temperature) for dataset in source.datasets)
    return Sampler(shards, f"{seed}/{stage_number}/{'/'.join(source.hashes)}", recipe.window, weights)


@dataclass(frozen=True)
class BatchPlan:
    """Divides the samples of each step into micro-batches and assigns them to ranks: arithmetic, the same on every
    rank.
    """

    samples: int  # of the stage
    batch: int
    micro_batch: int
    world: int

    @property
    def steps(self) -> int:
        return -(-self.samples // self.batch)

    def step_samples(self, step: int) -> int:
        """Return the number of samples of a step, over all ranks."""
        return min(self.batch, self.samples - step * self.batch)

    def micro_batch_sizes(self, step: int, rank: int) -> list[int]:
        """Return the number of samples of each micro-batch of a rank; all ranks have as many micro-batches."""
        samples = self.step_samples(step)
        rounds = -(-samples // (self.micro_batch * self.world))
        before = (np.arange(rounds) * self.world + rank) * self.micro_batch
        return [int(count) for count in np.clip(samples - before, 0, self.micro_batch)]

    def rank_samples(self, numbers: Positions, sizes: npt.NDArray[np.int64], rank: int) -> Positions:
        """Return the samples of a rank in a step, micro-batch by micro-batch, from `numbers` of the whole step and
        their `sizes`, (numbers, 2): the longest first, by images, then by text.
        """
        ranked = numbers[np.lexsort((-sizes[:, 1], -sizes[:, 0]))]  # a stable sort, so that it is repeatable
        width = self.micro_batch * self.world
        return np.concatenate(
            [ranked[at + rank * self.micro_batch :][: self.micro_batch] for at in range(0, len(numbers), width)]
        )


@dataclass(frozen=True)
class StreamSpec:
    """The part of a stage that one rank streams, and how."""

    stage: Stage
    number: int  # of the stage, from 0
    recipe: StreamSettings
    seed: int
    rank: int = 0
    world: int = 1
    cursor: int = 0  # samples of this stage that were trained on
    pin: bool = False  # whether batches are left in memory that a GPU reads


class Stream:
    """The steps of one stage, from a cursor on. Iterate it once; leave it with close()."""

    def __init__(
        self,
        source: Source,
        encoder: SampleEncoder,
        settings: StreamSpec,
        should_stop: Callable[[], object] = lambda: False,
    ) -> None:
        """`should_stop`: whether the run has to stop. It is asked while data are slow to come; StopRequested is raised
        if so.
        """
        stage, recipe, cursor, world = settings.stage, settings.recipe, settings.cursor, settings.world
        samples = stage_samples(stage, len(source))
        assert cursor % stage.batch == 0 or cursor == samples, cursor
        largest = -(-stage.batch // world)
        self.plan = BatchPlan(samples, stage.batch, min(stage.micro_batch or largest, largest), world)
        self._source, self._encoder, self._should_stop = source, encoder, should_stop
        self._rank, self._pin = settings.rank, settings.pin
        self._sampler = stage_sampler(source, settings.number, recipe, settings.seed)
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
            for count in self.plan.micro_batch_sizes(number, self._rank):
                ends = [*range(turn, turn + count, _TASK), turn + count]
                tasks.append([self._decoders.submit(self._read, *ends) for ends in itertools.pairwise(ends)])
                turn += count
            pending.append(self._assembler.submit(self._assemble, number, tasks))
            if len(pending) > self._prefetch:
                yield self._await(pending.popleft())
        while pending:
            yield self._await(pending.popleft())

    def _await(self, future: "Future[Step]") -> Step:
        started = time.perf_counter()
        while wait([future], _POLL_SECONDS).not_done:
            if self._should_stop():
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
        """Return what this rank has asked of stores and of the node's cache so far."""
        traffic, cache = self._source.traffic, self.prefetcher.cache
        return {
            "requests": traffic.requests,
            "megabytes": traffic.bytes / 1e6,
            "repeated": sum(traffic.retries.values()),
            "cache_hits": cache.counts.hits if cache else 0,
            "cache_misses": cache.counts.misses if cache else 0,
        }

    def _turns(self) -> Iterator[Positions]:
        """Yield this rank's samples from the cursor on, step by step; the order of several is computed at once."""
        plan = self.plan
        steps_at_once, turn = max(1, _PLANNED_SAMPLES // plan.batch), 0
        for first in range(self._first, plan.steps, steps_at_once):
            positions = np.arange(first * plan.batch, min((first + steps_at_once) * plan.batch, plan.samples))
            draws = self._sampler.at(positions)
            numbers = draws.sample
            sizes = self._source.sizes(numbers)
            for start in range(0, len(numbers), plan.batch):
                step = slice(start, start + plan.batch)
                own = plan.rank_samples(np.arange(len(numbers[step])), sizes[step], self._rank)
                self._epochs |= zip(range(turn, turn + len(own)), draws.epoch[step][own].tolist(), strict=True)
                turn += len(own)
                yield numbers[step][own]

    def _read(self, first: int, end: int) -> list[Any]:
        """Return the rows of turns first to end; a BadSample takes the place of a row."""
        rows: list[Any] = []
        for turn, raw in enumerate(self.prefetcher.take(first, end), first):
            epoch = self._epochs.pop(turn)
            try:
                rows.append(raw if isinstance(raw, BadSample) else self._encoder.read(raw._replace(epoch=epoch)))
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
            rows += [self._encoder.empty() for _ in range(self.plan.micro_batch - len(rows))]
            step.padded += max(row.length for row in rows) * len(rows)
            batch = self._encoder.batch(rows)
            step.micro_batches.append({name: t.pin_memory() for name, t in batch.items()} if self._pin else batch)
        return step


def main(arguments: Sequence[str]) -> None:
    """Print what the model will see of the first samples of a stage, and draw it. Raises UserError."""
    parser = argparse.ArgumentParser("python -m radhpc.data.stream", description="What the model will see of a recipe.")
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file, such as those in recipes/")
    parser.add_argument("overrides", nargs="*", default=[], metavar="KEY=VALUE", help="changes, such as seed=1")
    parser.add_argument("--show", type=int, default=3, metavar="N", help="samples, in the order of the stage")
    parser.add_argument("--stage", metavar="NAME", help="default: the first")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--out", type=Path, default=Path("shown"), help="folder of the pictures; default: shown")
    parser.error = _refuse  # type: ignore[method-assign]
    options = parser.parse_intermixed_args(arguments)
    recipe = load(options.recipe, options.overrides)
    names = [stage.name for stage in recipe.stages]
    if options.stage not in (None, *names):
        raise UserError(f"--stage {options.stage}: allowed are {', '.join(names)}")
    if options.show < 1:
        raise UserError(f"--show {options.show}: allowed are numbers from 1")
    try:
        options.out.mkdir(mode=0o700, parents=True, exist_ok=True)  # pictures of patients
    except OSError as error:
        raise UserError(f"--out {options.out}: {error.strerror}") from error
    _show(recipe, names.index(options.stage or names[0]), options.split, options.show, options.out)


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
    if neighbours := recipe.text_of(stage).neighbours:
        print(
            f"before the prompt of a report, not shown here: reports of {neighbours} training studies that look alike"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = recipe.model.tokenizer.folder or temporary
        if recipe.model.tokenizer.folder is None and isinstance(recipe.model.weights, str):
            folder = recipe.model.weights
        if recipe.model.tokenizer.train_vocabulary is not None:  # on what the first stage is trained on, as a run does
            samples = Source(recipe.shards_of(recipe.stages[0]), "train").samples()
            first = recipe.text_of(recipe.stages[0])
            texts = (collate.conversation(sample, first, recipe.findings) for sample in samples)
            tokenizer.train(texts, recipe.model.tokenizer.train_vocabulary, Path(folder))
        family = models.family(recipe.model, folder)
    encoder = collate.StudyEncoder(family, recipe.text_of(stage), recipe.images_of(stage), recipe.findings, recipe.seed)
    turns = min(count, stage_samples(stage, len(source)))
    draws = stage_sampler(source, number, recipe.stream, recipe.seed).at(np.arange(turns))
    for turn, location in enumerate(source.locate(draws.sample)):
        print(f"\n{turn} {location.key}, epoch {draws.epoch[turn]} of {source.datasets[location.dataset].url}")
        try:
            raw = next(source.read_raw(np.asarray([location.number])))._replace(epoch=int(draws.epoch[turn]))
            (_, described, views), row = decode_study(raw), encoder.read(raw)
        except BadSample as error:
            print(f"  cannot be read, and leaves an empty slot: {error.fault}")
            continue
        supervised = row.labels != IGNORE
        for n, (view, image) in enumerate(itertools.zip_longest(views, described.images)):
            print(f"  view {n}     {image.view if image else None}, {view.width} x {view.height} pixels, {view.mode}")
        for name, text in _context(described):
            print(f"  {name:<10} {text}")
        for name, values in row.images.items():
            small = f" {values.tolist()}" if values.size <= 8 else ""
            print(f"  {name:<10} {values.shape} {values.dtype}{small}")
        print(f"  task       {row.task or 'none: nothing is learnt'}")
        print(f"  prompt     {(~supervised).sum()} tokens: {family.tokenizer.decode(row.input_ids[~supervised])}")
        cut = f", cut at text.max_tokens {recipe.text_of(stage).max_tokens}" if row.cut else ""
        answer = family.tokenizer.decode(row.input_ids[supervised])
        print(f"  answer     {row.supervised} supervised tokens{cut}: {answer}")
        picture = board.side_by_side({"in the shard": views, "what the model sees": family.show_images(row.images)})
        path, data = out / f"{turn}-{location.key}.png", io.BytesIO()
        picture.save(data, "PNG")
        write_atomically(path, data.getvalue(), 0o600)
        print(f"  picture    {path}")


def _context(sample: Sample) -> Iterator[tuple[str, str]]:
    """Yield what a description holds beside images, findings and impression: (name, text)."""
    for name in ("indication", "history", "comparison", "technique"):
        if text := getattr(sample.report, name):
            yield name, text
    if sample.study_rank is not None:
        yield "study", f"number {sample.study_rank} of its patient"
    if sample.prior is not None:
        yield "prior", f"{sample.prior}, {sample.days_since_prior or 'an unknown number of'} days before"
    for box in sample.boxes:
        place = f"image {box.image}, {box.x0:g} {box.y0:g} to {box.x1:g} {box.y1:g}"
        yield "box", f"{box.label}: {place}{f', by {box.source}' if box.source else ''}"


def _refuse(message: str) -> NoReturn:
    raise UserError(f"python -m radhpc.data.stream: {message}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)

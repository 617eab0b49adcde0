"""The training loop: stream -> engine.step -> hooks, and never a lost or repeated step.

At every step boundary the ranks agree, in one small all-reduce, on the tokens of the step to come and on whether
anybody has been told to stop. If so, all save and leave before the step, not after it.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from radhpc.core.errors import UserError
from radhpc.core.ledger import Ledger
from radhpc.core.recipe import Stage
from radhpc.data.stream import Step, StopRequested, Stream
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import CAUSES, Interrupted, Stop
from radhpc.engine.fsdp import Engine, StepReport
from radhpc.engine.optimizers import learning_rate_factor

NAMED = 20  # bad samples in the message that ends a run


@dataclass
class Position:
    """Where the run stands; the same on every rank."""

    stage: int  # number, from 0
    step: int  # optimizer steps of the run so far
    stage_step: int  # of this stage so far
    stage_steps: int  # that this stage has
    samples: int  # of this stage that were trained on
    stage_samples: int  # that this stage has

    @property
    def stage_done(self) -> bool:
        return self.stage_step == self.stage_steps


@dataclass(frozen=True)
class Pace:
    """What a step took on this rank, without what was done between the steps."""

    seconds: float
    collective_seconds: float  # of them: in collectives, which is mostly waiting for slower ranks
    data_seconds: float  # of them: standing still for data


@dataclass(frozen=True)
class Report:
    """What the step just made was like, over all ranks."""

    engine: StepReport
    samples: int
    tokens: int
    padding: float  # part of all tokens that is padding
    seconds: float
    wait_seconds: float  # that a rank stood still for data, in the mean
    traffic: dict[str, float]  # of this step: requests to stores, bytes, repeated requests, blocks of the node's cache
    pace: Pace  # of this rank alone


@dataclass(frozen=True)
class Hook:
    """Something that happens after every so many steps."""

    every: int
    call: Callable[[Position, Report], None]


class Quarantine:
    """The samples of a run that could not be read, by name, each counted once however often it comes up."""

    def __init__(self, limit: int, known: Iterable[str], record: Callable[[str, str], None] | None) -> None:
        """`known`: those of earlier lives; `record`: called on rank 0 with the key and the fault of a new one."""
        self._limit, self._known, self._record = limit, set(known), record

    def add(self, bad: dict[str, str]) -> None:
        """The same on all ranks. Raises UserError with the list when there are more than the recipe allows."""
        new = {key: bad[key] for key in sorted(bad) if key not in self._known}
        self._known |= set(new)
        for key, fault in new.items():
            if self._record is not None:
                self._record(key, fault)
        if len(self._known) > self._limit:
            named = "; ".join(f"{key}: {fault}" for key, fault in list(new.items())[:NAMED])
            more = f"; and {len(new) - NAMED} more" if len(new) > NAMED else ""
            raise UserError(
                f"{len(self._known)} sample(s) of this run could not be read, stream.max_bad_samples allows "
                f"{self._limit}; now {named}{more}; 'radhpc verify' names every fault"
            )


def train(
    stream: Stream,
    engine: Engine,
    stage: Stage,
    position: Position,
    hooks: Sequence[Hook],
    ledger: Ledger | None,
    quarantine: Quarantine,
    stop: Stop,
    ranks: Ranks,
    seed: int,
) -> None:
    """Train a stage from `position` to its end, moving `position` on. Raises Interrupted at a step boundary."""
    before = time.perf_counter()
    traffic = stream.traffic()
    first = position.step  # slow: readers and kernels start
    ranks.watchdog.beat(f"data of step {first + 1}", first, slow=True)
    begun, waited = time.perf_counter(), ranks.waited()
    for step in _or_given_up(stream, position):
        ranks.watchdog.beat(f"step {position.step + 1}", position.step + 1, slow=position.step == first)
        assert step.number == position.stage_step
        now_traffic = stream.traffic()
        here = [now_traffic[name] - traffic[name] for name in traffic]
        traffic = now_traffic
        agreed = _agree(step, here, quarantine, stop, ranks)
        supervised = agreed.supervised
        # Random numbers are a function of the step: nothing to save, and what ran in between leaves no trace.
        torch.manual_seed(_seed(seed, position.stage, position.stage_step, ranks.rank))
        factor = learning_rate_factor(stage.optimizer, position.stage_step, position.stage_steps)
        done = engine.step(step.micro_batches, supervised, factor, lambda: stop.check(ranks.max))
        position.step += 1
        position.stage_step += 1
        position.samples = min(position.samples + stage.batch, position.stage_samples)
        if ledger is not None:
            ledger.append(position.stage, position.step, step.keys, step.bad)
        now = time.perf_counter()
        report = Report(
            done,
            agreed.samples,
            agreed.tokens,
            1 - agreed.tokens / max(1, agreed.padded),
            now - before,
            agreed.wait_seconds,
            dict(zip(traffic, agreed.traffic, strict=True)),
            Pace(now - begun, ranks.waited() - waited, step.wait_seconds),
        )
        before = now
        for hook in hooks:
            if position.step % hook.every == 0:
                hook.call(position, report)
        ranks.watchdog.beat(f"data of step {position.step + 1}")
        begun, waited = time.perf_counter(), ranks.waited()
    assert position.stage_done


def _or_given_up(stream: Stream, position: Position) -> Iterator[Step]:
    """The steps; after a stream that has given up, an empty one in which the ranks agree to stop."""
    try:
        yield from stream
    except StopRequested:
        yield Step(position.stage_step, [], [])


@dataclass(frozen=True)
class _Agreed:
    """A step over all ranks."""

    supervised: int
    tokens: int
    padded: int
    samples: int
    wait_seconds: float
    traffic: list[float]


def _agree(step: Step, traffic: list[float], quarantine: Quarantine, stop: Stop, ranks: Ranks) -> _Agreed:
    """What the global batch is like. Raises Interrupted on all ranks if on any, UserError for too many bad samples."""
    code = stop.poll()
    told = [float(code == n) for n in range(1, len(CAUSES))]
    counts = [step.supervised, step.tokens, step.padded, len(step.keys), len(step.bad), step.wait_seconds]
    sums = ranks.sum([*counts, *told, *traffic])
    supervised, tokens, padded, samples, bad, wait = sums[: len(counts)]
    causes = [name for name, count in zip(CAUSES[1:], sums[len(counts) :], strict=False) if count]
    if causes:
        raise Interrupted(causes[-1])
    if bad:
        quarantine.add({key: fault for theirs in ranks.gather(step.bad) for key, fault in theirs})
    return _Agreed(
        int(supervised), int(tokens), int(padded), int(samples), wait / ranks.world, sums[len(counts) + len(told) :]
    )


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")

"""Run the training loop: stream -> engine.step -> hooks, and never a lost or repeated step.

    train(StageLoop(stream, engine, stage, hooks, ...), position)    # moves position on; raises Interrupted

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
    """The position of a run; the same on every rank."""

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
class StepTiming:
    """The seconds of a step on this rank, without what was done between the steps."""

    seconds: float
    collective_seconds: float  # of them: in collectives, which is mostly waiting for slower ranks
    data_seconds: float  # of them: waiting for data


@dataclass(frozen=True)
class StepMetrics:
    """The figures of the step just made, over all ranks."""

    engine: StepReport
    samples: int
    tokens: int
    padding: float  # share of all tokens that is padding
    seconds: float
    wait_seconds: float  # that a rank waited for data, in the mean
    traffic: dict[str, float]  # of this step: requests to stores, bytes, repeated requests, blocks of the node's cache
    timing: StepTiming  # of this rank alone


@dataclass(frozen=True)
class Hook:
    """A call after every so many steps."""

    every: int
    call: Callable[[Position, StepMetrics], None]


class Quarantine:
    """The samples of a run that could not be read, by name; each counts once however often it comes up."""

    def __init__(self, limit: int, known: Iterable[str], record: Callable[[str, str], None] | None) -> None:
        """`known`: those of earlier lives; `record`: called on rank 0 with the key and the fault of a new one."""
        self._limit, self._known, self._record = limit, set(known), record

    def add(self, bad: dict[str, str]) -> None:
        """Add unreadable samples, the same on all ranks. Raises UserError, with the list, when there are more than the
        recipe allows.
        """
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


@dataclass(frozen=True)
class StageLoop:
    """All that the steps of a stage use."""

    stream: Stream
    engine: Engine
    stage: Stage
    hooks: Sequence[Hook]
    ledger: Ledger | None
    quarantine: Quarantine
    stop: Stop
    ranks: Ranks
    seed: int


def train(loop: StageLoop, position: Position) -> None:
    """Train a stage from `position` to its end, moving `position` on. Raises Interrupted at a step boundary."""
    engine, stream, ranks, stage = loop.engine, loop.stream, loop.ranks, loop.stage
    last_end = time.perf_counter()
    traffic = stream.traffic()
    first = position.step  # slow: readers and kernels start
    ranks.watchdog.beat(f"data of step {first + 1}", first, slow=True)
    begun, waited = time.perf_counter(), ranks.waited()
    for step in _steps(stream, position):
        ranks.watchdog.beat(f"step {position.step + 1}", position.step + 1, slow=position.step == first)
        assert step.number == position.stage_step
        traffic_now = stream.traffic()
        local_traffic = [traffic_now[name] - traffic[name] for name in traffic]
        traffic = traffic_now
        agreed = _agree(step, local_traffic, loop.quarantine, loop.stop, ranks)
        # Random numbers are a function of the step: nothing to save, and what ran in between leaves no trace.
        torch.manual_seed(_seed(loop.seed, position.stage, position.stage_step, ranks.rank))
        factor = learning_rate_factor(stage.optimizer, position.stage_step, position.stage_steps)
        report = engine.step(step.micro_batches, agreed.supervised, factor, lambda: loop.stop.check(ranks.max))
        position.step += 1
        position.stage_step += 1
        position.samples = min(position.samples + stage.batch, position.stage_samples)
        if loop.ledger is not None:
            loop.ledger.append(position.stage, position.step, step.keys, step.bad)
        now = time.perf_counter()
        metrics = StepMetrics(
            engine=report,
            samples=agreed.samples,
            tokens=agreed.tokens,
            padding=1 - agreed.tokens / max(1, agreed.padded),
            seconds=now - last_end,
            wait_seconds=agreed.wait_seconds,
            traffic=dict(zip(traffic, agreed.traffic, strict=True)),
            timing=StepTiming(now - begun, ranks.waited() - waited, step.wait_seconds),
        )
        last_end = now
        for hook in loop.hooks:
            if position.step % hook.every == 0:
                hook.call(position, metrics)
        ranks.watchdog.beat(f"data of step {position.step + 1}")
        begun, waited = time.perf_counter(), ranks.waited()
    assert position.stage_done


def _steps(stream: Stream, position: Position) -> Iterator[Step]:
    """Yield the steps; after a stream that has given up, an empty one in which the ranks agree to stop."""
    try:
        yield from stream
    except StopRequested:
        yield Step(position.stage_step, [], [])


@dataclass(frozen=True)
class _GlobalStep:
    """The counts of a step, over all ranks."""

    supervised: int
    tokens: int
    padded: int
    samples: int
    wait_seconds: float
    traffic: list[float]


def _agree(step: Step, traffic: list[float], quarantine: Quarantine, stop: Stop, ranks: Ranks) -> _GlobalStep:
    """Return the counts of the global batch. Raises Interrupted on all ranks if any is told to stop, and UserError for
    too many bad samples.
    """
    code = stop.poll()
    causes = [float(code == n) for n in range(1, len(CAUSES))]
    counts = [step.supervised, step.tokens, step.padded, len(step.keys), len(step.bad), step.wait_seconds]
    sums = ranks.sum([*counts, *causes, *traffic])
    supervised, tokens, padded, samples, bad, wait = sums[: len(counts)]
    raised = [name for name, count in zip(CAUSES[1:], sums[len(counts) :], strict=False) if count]
    if raised:
        raise Interrupted(raised[-1])
    if bad:
        quarantine.add({key: fault for of_rank in ranks.gather(step.bad) for key, fault in of_rank})
    return _GlobalStep(
        supervised=int(supervised),
        tokens=int(tokens),
        padded=int(padded),
        samples=int(samples),
        wait_seconds=wait / ranks.world,
        traffic=sums[len(counts) + len(causes) :],
    )


def _seed(*numbers: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=7).digest(), "little")

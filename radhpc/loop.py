"""The training loop: stream -> engine.step -> hooks, and never a lost or repeated step.

At every step boundary the ranks agree, in one small all-reduce, on the tokens of the step to come and on whether
anybody has been told to stop. If so, all save and leave before the step, not after it.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from radhpc.dist import Ranks
from radhpc.engine import Engine, StepReport, schedule
from radhpc.ledger import Ledger
from radhpc.recipe import Stage
from radhpc.stop import CAUSES, Interrupted, Stop
from radhpc.stream import Step, Stream


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
class Report:
    """What the step just made was like, over all ranks."""

    engine: StepReport
    samples: int
    tokens: int
    seconds: float
    wait_seconds: float  # the longest that a rank stood still for data


@dataclass(frozen=True)
class Hook:
    """Something that happens after every so many steps."""

    every: int
    call: Callable[[Position, Report], None]


def train(
    stream: Stream,
    engine: Engine,
    stage: Stage,
    position: Position,
    hooks: Sequence[Hook],
    ledger: Ledger | None,
    stop: Stop,
    ranks: Ranks,
    seed: int,
) -> None:
    """Train a stage from `position` to its end, moving `position` on. Raises Interrupted at a step boundary."""
    before = time.perf_counter()
    for step in stream:
        assert step.number == position.stage_step
        supervised, tokens, samples = _agree(step, stop, ranks)
        # Random numbers are a function of the step: nothing to save, and what ran in between leaves no trace.
        torch.manual_seed(_seed(seed, position.stage, position.stage_step, ranks.rank))
        factor = schedule(stage.optimizer, position.stage_step, position.stage_steps)
        done = engine.step(step.micro_batches, supervised, factor)
        position.step += 1
        position.stage_step += 1
        position.samples = min(position.samples + stage.batch, position.stage_samples)
        if ledger is not None:
            ledger.append(position.stage, position.step, step.keys, step.bad)
        now = time.perf_counter()
        report = Report(done, samples, tokens, now - before, step.wait_seconds)
        before = now
        for hook in hooks:
            if position.step % hook.every == 0:
                hook.call(position, report)
    assert position.stage_done


def _agree(step: Step, stop: Stop, ranks: Ranks) -> tuple[int, int, int]:
    """Supervised tokens, tokens and samples of the global batch. Raises Interrupted on all ranks if on any."""
    code = stop.poll()
    told = [float(code == n) for n in range(1, len(CAUSES))]
    supervised, tokens, samples, *told = ranks.sum([step.supervised, step.tokens, len(step.keys), *told])
    causes = [name for name, count in zip(CAUSES[1:], told, strict=True) if count]
    if causes:
        raise Interrupted(causes[-1])
    return int(supervised), int(tokens), int(samples)


def _seed(*parts: int) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")

"""Each private name of DeepSpeed that radhpc uses is still there, and does what radhpc expects of it."""

import inspect
import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from radhpc.core.errors import UserError
from radhpc.engine import compat_deepspeed as compat

pytestmark = pytest.mark.timeout(240)


class CountingRanks:
    """Counts the collectives that are timed."""

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def timed(self) -> Iterator[None]:
        self.count += 1
        yield


def started(stage: int) -> tuple[Any, nn.Linear, torch.optim.Optimizer, CountingRanks, torch.Tensor]:
    """A linear layer under ZeRO on one rank: DeepSpeed's engine, the layer, its optimizer, the ranks, the weights."""
    library, ranks = compat.load(torch.device("cpu")), CountingRanks()
    assert library.ops.__compatible_ops__["deepspeed_shm_comm"] is False
    os.environ.setdefault("LOCAL_RANK", "0")
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    library.init_distributed(dist_init_required=False)
    compat.time_collectives(library, ranks)  # type: ignore[arg-type]
    layer = nn.Linear(3, 2)
    weights = layer.weight.detach().clone()
    config = {
        "train_batch_size": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    if stage == 3:
        assert not compat.is_partitioned(layer.weight)
        compat.partition_first(library, layer.weight, config, torch.float32)
        assert compat.is_partitioned(layer.weight)
        compat.partition_like(layer.weight, layer.bias)
        assert compat.is_partitioned(layer.bias)
        assert layer.weight.numel() == 0
    assert compat.whole_shape(layer.weight) == (2, 3)
    assert compat.whole_numel(layer.weight) == 6
    assert torch.equal(compat.local_values(layer.weight)[:6].view(2, 3), weights)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    engine, *_ = library.initialize(model=layer, optimizer=optimizer, config=config)
    return engine, layer, optimizer, ranks, weights


def fragments(stage: int) -> None:
    """The flat values hold each parameter where its fragment says; written to, they are what the next step changes."""
    engine, layer, optimizer, ranks, weights = started(stage)
    flats = compat.flat_values(engine, stage)
    fragment = compat.fragment(engine, stage, layer.weight, rank=0)
    assert fragment is not None
    assert (fragment.numel, fragment.first) == (6, 0)
    held = flats[fragment.group].detach().narrow(0, fragment.start, fragment.numel)
    assert torch.equal(held.view(2, 3), weights)
    engine.backward(engine(torch.ones(1, 3)).sum())
    made, norm = compat.step(engine, None)
    assert made
    assert norm == pytest.approx(8**0.5, rel=1e-5)  # six weights and two biases have a gradient of one
    assert ranks.count > 0, "collectives go through the backend that is timed"
    assert {"exp_avg", "exp_avg_sq"} <= optimizer.state[flats[fragment.group]].keys()
    assert not torch.equal(held.view(2, 3), weights)
    compat.destroy_process_group()
    assert not torch.distributed.is_initialized()


def overflow(stage: int) -> None:
    """A step with gradients that are not finite is not made, and says so."""
    engine, layer, _, _, _ = started(stage)
    engine.backward(engine(torch.full((1, 3), torch.inf)).sum())
    made, norm = compat.step(engine, None)
    assert not (made and torch.isfinite(torch.tensor(norm)) and norm >= 0)
    compat.destroy_process_group()


def in_a_process(work: Callable[[int], None], stage: int) -> None:
    """DeepSpeed leaves traces in a process, so that each test has one of its own."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=(stage,))
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("work", [fragments, overflow])
def test_zero_holds_its_values_where_it_says(work: Callable[[int], None], stage: int) -> None:
    in_a_process(work, stage)


def test_the_backend_has_all_timed_collectives() -> None:
    from deepspeed.comm.torch import TorchBackend

    assert all(inspect.isfunction(getattr(TorchBackend, name)) for name in compat.COLLECTIVES)


def test_a_library_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match="engine: deepspeed: it cannot be imported"):
        compat.load(torch.device("cpu"))


@pytest.mark.parametrize("supported", [True, False])
def test_fp16_is_refused_where_deepspeed_would(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    library = compat.load(torch.device("cpu"))
    monkeypatch.setattr(library.accelerator.get_accelerator(), "is_fp16_supported", lambda: supported)
    if supported:
        compat.check_fp16(library)
        return
    with pytest.raises(UserError, match=r"^precision: fp16: DeepSpeed does not compute in it on this cpu; allowed .*"):
        compat.check_fp16(library)

"""Compiled layers in a whole run: the same losses, the cache where the next life finds it, and a signal meanwhile."""

import os
import time
from pathlib import Path

import pytest
import torch._inductor.config as inductor

from bench.chaos import losses
from radhpc import worker
from radhpc.core.recipe import load
from radhpc.core.run_folder import RunFolder
from radhpc.distributed.background import Background
from radhpc.distributed.stop import Stop
from radhpc.training import compilation

SHORT = [
    "stages=[{name: scratch, steps: 2, batch: 4, micro_batch: 2, train: ['.*'], optimizer: {learning_rate: 1.0e-3}}]",
    "evaluation.samples=1", "evaluation.max_new_tokens=1",
]  # fmt: skip


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_compiled_layers_train_as_plain_ones_and_are_kept(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(compilation.CACHE, "")
    monkeypatch.delenv(compilation.CACHE)
    # The C++ compiler takes most of the time, to make kernels of a few numbers fast.
    monkeypatch.setattr(inductor.cpp, "simdlen", 1)
    monkeypatch.setattr(inductor.aot_inductor, "debug_compile", True)
    compiled = RunFolder.create(tmp_path / "compiled", load(recipe_file, [*SHORT, "model.compile=true"]))
    assert worker.run(str(compiled.path)).state == "finished"
    assert os.environ[compilation.CACHE] == str(compiled.path / "compiled")
    assert any((compiled.path / "compiled").rglob("*.so")) or any((compiled.path / "compiled").rglob("*.py"))
    (event,) = compiled.events("compiled")
    print("compiled in", event["seconds"], "s")
    plain = RunFolder.create(tmp_path / "plain", load(recipe_file, SHORT))
    worker.run(str(plain.path))
    assert losses(compiled.path) == pytest.approx(losses(plain.path), rel=1e-4)


@pytest.mark.timeout(120)
def test_a_signal_while_layers_are_compiled_ends_the_start_up(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from radhpc.engine.fsdp import Engine

    class Told(Stop):
        """Told to stop as soon as the compilation has begun."""

        def poll(self) -> int:
            if begun:
                self.tell("SIGTERM")
            return super().poll()

    begun: list[int] = []

    def long(engine: Engine, batch: object) -> None:  # a compilation would go on behind the test
        begun.append(1)
        time.sleep(2)

    monkeypatch.setattr(Engine, "warm_up", long)
    monkeypatch.setenv(compilation.CACHE, str(tmp_path / "cache"))
    run = RunFolder.create(tmp_path / "run", load(recipe_file, [*SHORT, "model.compile=true"]))
    with Told() as stop:
        outcome = worker.run(str(run.path), stop)
    assert (outcome.state, outcome.step) == ("interrupted", 0)
    assert not run.events("first_step")
    assert run.events("interrupted")[-1]["cause"] == "SIGTERM"


def test_work_beside_the_ranks_sees_the_settings_of_the_compiler() -> None:
    """They belong to a thread, and layers are compiled in one of their own."""
    from torch.fx.experimental import _config as symbolic

    seen: list[bool] = []
    with symbolic.patch(use_duck_shape=False):
        work = Background(lambda: seen.append(symbolic.use_duck_shape))
    work.start()
    work.join()
    assert seen == [False]

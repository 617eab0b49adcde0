"""Every engine and number of ranks trains alike, and goes on from what any other saved."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_RECIPE, tiny_family
from tests.radhpc.engine_ranks import Lives, go_on, train_and_save

WORLDS = [
    ("single", 1), ("fsdp", 2), ("fsdp", 3), ("replicate", 2), ("zero2", 1), ("zero2", 3), ("zero3", 2), ("zero3", 3),
    ("offload", 2),
]  # fmt: skip
SOURCES = [("fsdp-3", 0), ("zero3-2", 0), ("single-1", 1), ("zero2-3", 1)]

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Lives:
    from radhpc.recipe import load

    folder = tmp_path_factory.mktemp("engines")
    text = TINY_RECIPE.format(shards=phantom_shards).replace("dropout: 0.1, ", "")
    text = text.replace("learning_rate: 1.0e-3}", "learning_rate: 1.0e-3, clip: 0.5}")
    (folder / "tiny.yaml").write_text(text.replace("schedule: linear", "clip: 0.01"))
    tiny_family(load(folder / "tiny.yaml"), folder / "tokenizer")
    return Lives(folder)


@pytest.fixture(scope="module")
def trained(lives: Lives) -> dict[str, Any]:
    return {f"{spec}-{n}": lives.run(f"{spec}-{n}", spec, n, train_and_save) for spec, n in WORLDS}


def test_losses_and_norms_are_equal(trained: dict[str, Any]) -> None:
    for stage in ("stage0", "stage1"):
        wanted = trained["single-1"][stage]
        assert max(norm for _, norm in wanted["steps"]) > {"stage0": 0.5, "stage1": 0.01}[stage]
        for name, found in trained.items():
            for (loss, norm), (wanted_loss, wanted_norm) in zip(found[stage]["steps"], wanted["steps"], strict=True):
                assert loss == pytest.approx(wanted_loss, rel=2e-6), (name, stage)
                assert norm == pytest.approx(wanted_norm, rel=2e-5), (name, stage)
            assert found[stage]["loss_sum"] == pytest.approx(wanted["loss_sum"], rel=2e-6), (name, stage)
            assert found[stage]["ids"] == wanted["ids"], (name, stage)


@pytest.mark.parametrize(("spec", "world"), WORLDS)
def test_a_run_goes_on_under_any_engine(lives: Lives, trained: dict[str, Any], spec: str, world: int) -> None:
    name = f"{spec}-{world}"
    done = lives.run(f"{name}-resumed", spec, world, partial(go_on, sources=list(dict.fromkeys([*SOURCES, (name, 0)]))))
    for source, found in done.items():
        assert found["same"], f"{source}: what was loaded is not what was saved"
        stage = source.rpartition(".")[2]
        assert found["step"][0] == pytest.approx(trained["single-1"][stage]["steps"][2][0], rel=2e-6), source
        assert found["far"] < 1e-5, source
        if source.startswith(f"{name}."):
            assert found["exact"], f"{source}: a resume that changes nothing else is not exact"

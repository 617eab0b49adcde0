"""Every engine and number of ranks trains alike, and goes on from what any other saved."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY_RECIPE, tiny_family
from tests.radhpc.engine.engine_ranks import (
    Lives,
    forecast_of,
    go_on,
    peak,
    read_folder,
    read_parts,
    refusal_of_fp16,
    train_and_go_on,
    train_and_save,
)

WORLDS = [
    ("single", 1), ("fsdp", 2), ("fsdp", 3), ("replicate", 2), ("zero2", 1), ("zero2", 3), ("zero3", 2), ("zero3", 3),
    ("offload", 2),
]  # fmt: skip
SOURCES = [("fsdp-3", 0), ("zero3-2", 0), ("single-1", 1), ("zero2-3", 1)]
ORIGINS = [name for name, _ in SOURCES]

# Large enough that tensors of the model outweigh a buffer or two.
WIDE = [
    "model.config.text.hidden_size=128", "model.config.text.intermediate_size=512",
    "model.config.text.num_hidden_layers=4", "model.config.text.cross_attention_layers=[1, 3]",
    "stages.scratch.batch=8", "stages.scratch.micro_batch=2", "stages.adapt.batch=8", "stages.adapt.micro_batch=2",
]  # fmt: skip

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Lives:
    from radhpc.core.recipe import load

    folder = tmp_path_factory.mktemp("engines")
    text = TINY_RECIPE.format(shards=phantom_shards).replace("dropout: 0.1, ", "")
    text = text.replace("learning_rate: 1.0e-3}", "learning_rate: 1.0e-3, clip: 0.5, weight_decay: 1.0}")
    (folder / "tiny.yaml").write_text(text.replace("schedule: linear", "clip: 0.01, weight_decay: 1.0"))
    tiny_family(load(folder / "tiny.yaml"), folder / "tokenizer")
    return Lives(folder)


class Trained:
    """What each engine and world trained and saved, once it was asked for: a test pays for what it needs alone."""

    def __init__(self, lives: Lives) -> None:
        self._lives = lives
        self._done: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._done:
            spec, _, world = name.partition("-")
            work: Any = train_and_save
            if name not in ORIGINS:  # these go on at once; those from which others go on, in a life of their own
                assert all(self[origin] for origin in ORIGINS)
                work = partial(train_and_go_on, stages=(0, 1), sources=SOURCES)
            self._done[name] = self._lives.run(name, spec, int(world), work)
        return self._done[name]


@pytest.fixture(scope="module")
def trained(lives: Lives) -> Trained:
    return Trained(lives)


@pytest.mark.parametrize(("spec", "world"), WORLDS)
def test_losses_and_norms_are_equal(trained: Trained, spec: str, world: int) -> None:
    reference, done = trained["single-1"], trained[f"{spec}-{world}"]
    for stage in ("stage0", "stage1"):
        found, wanted = done[stage], reference[stage]
        assert max(norm for _, norm in wanted["steps"]) > {"stage0": 0.5, "stage1": 0.01}[stage], "nothing was clipped"
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found["steps"], wanted["steps"], strict=True):
            assert loss == pytest.approx(wanted_loss, rel=2e-6), stage
            assert norm == pytest.approx(wanted_norm, rel=2e-5), stage
        assert found["loss_sum"] == pytest.approx(wanted["loss_sum"], rel=2e-6), stage
        assert found["ids"] == wanted["ids"], stage


@pytest.mark.parametrize(("spec", "world"), WORLDS)
def test_a_run_goes_on_under_any_engine(lives: Lives, trained: Trained, spec: str, world: int) -> None:
    name = f"{spec}-{world}"
    sources = list(dict.fromkeys([*SOURCES, (name, 0)]))
    done = trained[name]
    if name in ORIGINS:
        assert all(trained[origin] for origin in ORIGINS)
        done = lives.run(f"{name}-resumed", spec, world, partial(go_on, sources=sources))
    for origin, stage in sources:
        source = f"{origin}.stage{stage}"
        found, wanted = done[source], trained["single-1"][f"stage{stage}"]["steps"][2]
        assert found["same"], f"{source}: what was loaded is not what was saved"
        assert found["step"][0] == pytest.approx(wanted[0], rel=2e-6), source
        assert found["far"] < 1e-5, source
        if origin == name:
            assert found["exact"], f"{source}: a resume that changes nothing else is not exact"


VARIANTS = [
    ("fsdp", 2, 1, ["precision=bf16"]),
    ("zero2", 2, 1, ["precision=bf16"]),
    ("fsdp", 2, 0, ["precision=fp16"]),
    ("zero2", 2, 1, ["precision=fp16"]),
    ("fsdp", 3, 1, ["precision=bf16", "model.quantise=nf4"]),
    ("zero3", 2, 1, ["model.quantise=nf4"]),
    ("single", 1, 0, ["stages.scratch.optimizer.kind=adamw_8bit"]),
    ("fsdp", 3, 0, ["stages.scratch.optimizer.kind=adamw_8bit"]),
]


@pytest.mark.parametrize(("spec", "world", "stage", "overrides"), VARIANTS, ids=lambda v: str(v).replace(".", "-"))
def test_precisions_four_bits_and_eight_bits(
    lives: Lives, trained: Trained, spec: str, world: int, stage: int, overrides: list[str]
) -> None:
    """Master parameters and moments stay float32, the frozen base is as small as was asked for, a resume is exact."""
    if (
        spec.startswith("zero")
        and "precision=fp16" in overrides
        and (why := lives.run("fp16", spec, 1, refusal_of_fp16))
    ):
        pytest.skip(why)
    name = f"{spec}-{world}-{'-'.join(overrides)}"
    done = lives.run(name, spec, world, partial(train_and_go_on, stages=(stage,), sources=[]), overrides)
    found, resumed = done[f"stage{stage}"], done[f"{name}.stage{stage}"]
    wanted = trained["single-1"][f"stage{stage}"]
    assert resumed["same"], "what was loaded is not what was saved"
    assert resumed["exact"], "a resumed run is not the one that was not interrupted"
    assert "torch.bfloat16" not in found["trained"], "a trained parameter or a moment is not float32"
    nf4, low = "model.quantise=nf4" in overrides, overrides[0].startswith("precision")
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found["steps"], wanted["steps"], strict=True):
        assert loss == pytest.approx(wanted_loss, rel=1e-3 if nf4 else 1e-4 if low else 1e-5), "another function"
        assert norm == pytest.approx(wanted_norm, rel=0.1 if nf4 else 0.02 if low else 1e-3)
        assert not nf4 or loss != pytest.approx(wanted_loss, rel=1e-6), "nothing was quantised"
    if "precision=bf16" in overrides:
        assert found["frozen"] == ["torch.bfloat16"]
    if "precision=fp16" in overrides:
        assert found["scale"] < 2.0**40, "the first step overflowed and was made again"


def test_a_folder_is_read_row_by_row_into_the_ranks(lives: Lives) -> None:
    """As the family reads it whole, whatever the layout; earlier stages' changes of the base are in it."""
    assert lives.run("folder-1", "single", 1, read_folder)["same"]
    assert lives.run("folder-3", "fsdp", 3, read_folder)["same"]
    assert lives.run("folder-z3", "zero3", 2, read_folder)["same"]


def test_a_model_of_several_folders_is_read_row_by_row_too(lives: Lives) -> None:
    assert lives.run("parts-3", "fsdp", 3, read_parts) == {"gla": [], "lightmedvlm": []}


@pytest.mark.parametrize("spec", ["fsdp", "zero2", "zero3"])
def test_the_memory_of_a_rank_is_forecast(lives: Lives, spec: str) -> None:
    """By a step on fake tensors and without peers, against a real one on two ranks: all that is alive at its peak."""
    wanted = lives.run(f"forecast-{spec}", spec, 1, partial(forecast_of, world=2), WIDE)
    for stage in (0, 1):
        found = lives.run(f"peak-{spec}-{stage}", spec, 2, partial(peak, stage=stage), WIDE)
        print(f"{spec}, stage {stage}: forecast {1e3 * wanted[stage]:.2f} MB, measured {1e3 * found:.2f} MB")
        assert wanted[stage] == pytest.approx(found, rel=0.15)


def test_sixteen_bits_under_zero_are_forecast_on_every_login_node(lives: Lives) -> None:
    """DeepSpeed looks for overflows in both kinds, and refuses fp16 on most CPUs; the numbers of both are as large."""
    work = partial(forecast_of, world=2, fp16=False)
    bf16 = lives.run("forecast-bf16", "zero2", 1, work, ["precision=bf16"])
    assert bf16 == lives.run("forecast-fp16", "zero2", 1, work, ["precision=fp16"])


def test_an_engine_that_cannot_be_is_refused(lives: Lives) -> None:
    from radhpc.core.errors import UserError
    from radhpc.core.recipe import load

    for overrides, said in (
        (["engine=deepspeed", "stages.scratch.optimizer.kind=adamw_8bit"], "goes with engines fsdp and single"),
        (["model.quantise=nf4", "stages.refine.adapters=merge"], "four bits cannot hold a merged weight"),
        (["engine=deepspeed", "zero.stage=1"], "2 or 3"),
        (["precision=fp8"], "'fp32', 'bf16' or 'fp16'"),
    ):
        with pytest.raises(UserError, match=said):
            load(lives.folder / "tiny.yaml", overrides)


def test_a_library_that_is_missing_is_named(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from radhpc.core.errors import UserError
    from radhpc.core.recipe import load

    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("deepspeed", "bitsandbytes") else there(name)
    )
    load(lives.folder / "tiny.yaml").refuse_missing()
    for override, said in (
        ("engine=deepspeed", "engine: deepspeed: deepspeed is not installed"),
        ("model.quantise=nf4", "model.quantise: nf4: bitsandbytes"),
        ("stages.adapt.optimizer.kind=adamw_paged", "optimizer.kind: adamw_paged: bitsandbytes"),
    ):
        with pytest.raises(UserError, match=said):
            load(lives.folder / "tiny.yaml", [override]).refuse_missing()


def test_a_card_without_bf16_is_named(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card is one that only says of itself what it can: there is none here."""
    import torch

    from radhpc.core.errors import UserError
    from radhpc.core.recipe import load
    from radhpc.distributed.ranks import Ranks
    from radhpc.engine.fsdp import check_support

    ranks = Ranks()
    ranks.device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    check_support(load(lives.folder / "tiny.yaml", ["precision=fp16"]), ranks)
    with pytest.raises(UserError, match="precision: bf16: Tesla T4 cannot compute in it; allowed here are fp16 and"):
        check_support(load(lives.folder / "tiny.yaml", ["precision=bf16"]), ranks)


def test_a_gpu_that_is_full_is_told_what_to_change(lives: Lives, tmp_path: Path) -> None:
    from radhpc.core.errors import UserError
    from radhpc.core.recipe import load
    from radhpc.core.run_folder import RunFolder
    from radhpc.training.out_of_memory import explain_out_of_memory

    run = RunFolder.create(tmp_path / "run", load(lives.folder / "tiny.yaml"))
    error = explain_out_of_memory(run, rank=1, world=2)
    assert isinstance(error, UserError)
    for said in ("rank 1's GPU", "GB in stage 'adapt'", "precision: bf16", "micro_batch below 3", "nf4", "more ranks"):
        assert said in str(error)
    assert "\n" not in str(error)

"""What one rank of test_engines.py does: train under an engine, save, and go on from what others saved.

The ranks of all engines and worlds are forked from one process that has imported everything, so that a life costs a
second; see Lives.
"""

import gc
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe, load
from radhpc.data.collate import Batch, StudyEncoder
from radhpc.data.source import Source
from radhpc.distributed.ranks import Ranks
from radhpc.engine import compat_deepspeed, zero
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters, family as models, lazy_loading, quantization
from radhpc.planning import forecast
from radhpc.planning.memory_trace import MemoryTrace
from tests.conftest import ROOT, free_port

SPECS: dict[str, list[str]] = {
    "single": ["engine=single"],
    "fsdp": ["engine=fsdp"],
    "replicate": ["engine=fsdp", "replicate=true"],
    "zero2": ["engine=deepspeed", "zero.stage=2"],
    "zero3": ["engine=deepspeed", "zero.stage=3"],
    "offload": ["engine=deepspeed", "zero.stage=2", "zero.offload=true"],
}
BATCH, MICRO = 6, 2


class Life:
    """One rank's world: the recipe, the samples, and engines made of them."""

    def __init__(self, folder: Path, spec: str, overrides: list[str]) -> None:
        self.recipe = load(folder / "tiny.yaml", [*SPECS[spec], *overrides])
        self.folder, self.ranks = folder, Ranks()
        self.family = models.family(self.recipe.model, str(folder / "tokenizer"))
        encoder, source = StudyEncoder(self.family, self.recipe.text), Source(self.recipe.shards, "train")
        self.rows = [encoder.encode(*source.read(n)) for n in range(4 * BATCH)]
        self.encoder = encoder

    def engine(self, stage: int, recipe: Recipe | None = None) -> Engine:
        recipe = recipe or self.recipe
        model = self.family.build(0)
        if recipe.model.quantise:
            quantization.quantise(model, self.family.blocks, ())
        adapters.prepare(model, recipe.stages[stage : stage + 1], 0, lambda _: {}, seed=1)
        kind = zero.ZeroEngine if recipe.engine == "deepspeed" else Engine
        return kind(model, recipe, recipe.stages[stage].optimizer, self.family.blocks, self.ranks)

    def batches(self, step: int) -> tuple[list[Batch], int]:
        """This rank's micro-batches of a step, and the supervised tokens of all."""
        rows = self.rows[step * BATCH : (step + 1) * BATCH]
        mine = rows[self.ranks.rank :: self.ranks.world]
        supervised = sum(row.supervised for row in rows)
        return [self.encoder.batch(mine[n : n + MICRO]) for n in range(0, len(mine), MICRO)], supervised

    def step(self, engine: Engine, number: int) -> tuple[float, float]:
        """Loss and norm of the gradients."""
        batches, supervised = self.batches(number)
        torch.manual_seed(number)
        report = engine.step(batches, supervised, 1.0)
        return report.loss, report.gradient_norm


def train_and_save(life: Life, name: str, stages: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """Two steps, a checkpoint, a third step; for a stage that trains all, and one of adapters."""
    results: dict[str, Any] = {}
    for stage in stages:
        engine = life.engine(stage)
        if engine.scaler is not None:
            engine.scaler.value = 2.0**40  # which overflows
        steps = [life.step(engine, 0), life.step(engine, 1)]
        state = engine.state()
        steps.append(life.step(engine, 2))
        last = engine.state()
        if life.ranks.first:
            save_file(state, life.folder / f"{name}.stage{stage}.safetensors")
            save_file(last, life.folder / f"{name}.stage{stage}.last.safetensors")
        ids = engine.generate(life.encoder.batch(life.rows[:1], left=True), 4).tolist()
        loss = engine.loss_sum(life.encoder.batch(life.rows[:2]))
        kinds = {str(p.dtype) for p in engine.model.parameters() if not p.requires_grad}
        results[f"stage{stage}"] = {
            "steps": steps,
            "loss_sum": loss,
            "ids": ids,
            "frozen": sorted(kinds),
            "trained": sorted({str(tensor.dtype) for tensor in state.values()}) if life.ranks.first else [],
            "numbers": sum(p.numel() for p in engine.model.parameters() if not p.requires_grad),
            "scale": engine.scaler.value if engine.scaler is not None else None,
        }
    life.ranks.barrier()  # what the first rank has written is there for all
    return results


def go_on(life: Life, name: str, sources: list[tuple[str, int]]) -> dict[str, Any]:
    """The third step from each of these (checkpoint, stage), beside the state that its own run came to."""
    results: dict[str, Any] = {}
    for source, stage in sources:
        tensors = load_file(life.folder / f"{source}.stage{stage}.safetensors")
        engine = life.engine(stage)
        engine.load(tensors, 2)
        before = engine.state()
        step = life.step(engine, 2)
        after = engine.state()
        if life.ranks.first:
            same = before.keys() == tensors.keys() and all(torch.equal(before[n], tensors[n]) for n in tensors)
            wanted = load_file(life.folder / f"{source}.stage{stage}.last.safetensors")
            far = max(float((after[n] - wanted[n]).abs().max()) for n in wanted)
            exact = all(torch.equal(after[n], wanted[n]) for n in wanted)
            results[f"{source}.stage{stage}"] = {"same": same, "step": step, "far": far, "exact": exact}
    return results


def train_and_go_on(life: Life, name: str, stages: tuple[int, ...], sources: list[tuple[str, int]]) -> dict[str, Any]:
    """Both, in one life: from its own checkpoint of the first of the stages, and from these."""
    return train_and_save(life, name, stages) | go_on(life, name, [(name, stages[0]), *sources])


def read_folder(life: Life, name: str) -> dict[str, Any]:
    """Weights of a folder, with a merged adapter and a changed parameter, beside the family's own way to them."""
    folder = life.folder / f"{name}.model"
    if life.ranks.first:
        life.family.build(3).save_pretrained(folder, max_shard_size="100KB")  # type: ignore[operator]
    life.ranks.barrier()
    recipe = life.recipe.model.model_copy(update={"weights": str(folder), "config": None, "gates": None})
    family: Any = models.family(recipe, str(life.folder / "tokenizer"))
    lora = life.recipe.stages[1].lora
    assert lora is not None
    torch.manual_seed(5)
    stages = (life.recipe.stages[1], life.recipe.stages[2].model_copy(update={"adapters": "merge"}))

    def prepared(model: torch.nn.Module) -> torch.nn.Module:
        norm = "model.language_model.norm.weight"
        wanted = dict(model.named_parameters())[norm].shape
        before: adapters.Tensors = {norm: torch.linspace(0, 1, wanted[0])}
        torch.manual_seed(6)
        for key, weight in model.named_parameters():
            if (
                key.endswith("q_proj.weight")
                and "language_model" in key
                or key.endswith("v_proj.weight")
                and "language_model" in key
            ):
                before[key.replace(".weight", ".lora_A.weight")] = torch.randn(lora.rank, weight.shape[1])
                before[key.replace(".weight", ".lora_B.weight")] = torch.randn(weight.shape[0], lora.rank)
        adapters.prepare(model, stages, 1, lambda _: before, seed=1)
        return model

    stage = stages[1].optimizer
    kind = zero.ZeroEngine if life.recipe.engine == "deepspeed" else Engine
    whole = Engine(prepared(family.build(0)), life.recipe.model_copy(update={"replicate": True, "engine": "fsdp"}),
                   stage, family.blocks, life.ranks)  # fmt: skip
    promised = lazy_loading.build(family, recipe, 0)
    assert all(p.untyped_storage().nbytes() <= 4 for p in promised.parameters()), "a value was read"
    read = kind(prepared(promised), life.recipe, stage, family.blocks, life.ranks)
    batch = life.encoder.batch(life.rows[:2])
    buffers = all(torch.equal(a, b) for a, b in zip(whole.model.buffers(), read.model.buffers(), strict=True))
    same = abs(whole.loss_sum(batch) / read.loss_sum(batch) - 1) < 1e-6
    return {
        "same": same and buffers and whole.model.generation_config.to_dict() == read.model.generation_config.to_dict()
    }  # type: ignore[union-attr,operator]


def read_parts(life: Life, name: str) -> dict[str, Any]:
    """What is not the same in models of two folders, whose tokenizer was given a token more, and the families' own way
    to them.
    """
    from transformers import AutoModelForCausalLM

    differs = {}
    for twin in ("gla", "lightmedvlm"):
        path, folder = ROOT / "recipes" / "tiny" / f"{twin}.yaml", life.folder / f"{name}.{twin}"
        if life.ranks.first:
            made: Any = models.family(load(path, ["shards=[none]"]).model, str(life.folder / "tokenizer"))
            made.build(3).model.vision_tower.save_pretrained(folder / "vision")
            shutil.copytree(life.folder / "tokenizer", folder / "text")
            for file in (folder / "text").glob("tokenizer*.json"):
                file.write_text(file.read_text().replace("<|image|>", "<|other|>"))
            language = AutoModelForCausalLM.from_config(made.config.text_config)
            language.save_pretrained(folder / "text", max_shard_size="100KB")
        life.ranks.barrier()
        folders = f"model.weights={{vision: {folder}/vision, text: {folder}/text}}"
        recipe = load(path, ["model.config=null", "model.tokenizer={}", folders, "shards=[none]"])
        assert recipe.model.tokenizer_folder is not None
        family: Any = models.family(recipe.model, recipe.model.tokenizer_folder)
        whole, promised = family.build(7), lazy_loading.build(family, recipe.model, 7)
        read = {n for n, p in promised.named_parameters() if p.untyped_storage().nbytes() > 4}
        assert all("multi_modal_projector" in n for n in read), f"a value was read: {read}"
        assert promised.get_input_embeddings().num_embeddings > language_rows(folder / "text")
        adapters.choose_trained(promised, recipe.stages[0])
        engine = Engine(promised, recipe, recipe.stages[0].optimizer, family.blocks, life.ranks)
        state, wanted = engine.model.state_dict(), whole.state_dict()
        assert state.keys() == wanted.keys()
        found = {n: value.full_tensor() if isinstance(value, DTensor) else value for n, value in state.items()}
        other = [n for n in wanted if not torch.equal(found[n], wanted[n])]
        theirs = dict(whole.named_buffers())
        other += [n for n, value in engine.model.named_buffers() if not torch.equal(value, theirs[n])]
        differs[twin] = other
    return differs


def peak(life: Life, name: str, stage: int) -> float:
    """Gigabytes of live tensors at the peak of a real step, over the batch that `plan` would take."""
    recipe, chosen = life.recipe, life.recipe.stages[stage]
    source = Source(recipe.shards, "train")
    family, _ = forecast.build_family(recipe, source, life.folder / f"{name}.tokenizer.{life.ranks.rank}")
    encoder = StudyEncoder(family, recipe.text, recipe.images)
    rows, _, _ = forecast.largest_rows(recipe, source, encoder, chosen.micro_batch or 1, False)
    life.family, batch = family, encoder.batch(rows)
    engine = life.engine(stage)
    held = [
        *engine.model.parameters(),
        *engine.model.buffers(),
        *batch.values(),
        *getattr(engine, "_values", {}).values(),
    ]
    held += [p.ds_tensor for p in engine.model.parameters() if hasattr(p, "ds_tensor")]
    with MemoryTrace(held) as memory:
        return forecast.trace_step(engine, [batch, batch], memory) / 1e9


def forecast_of(life: Life, name: str, world: int, fp16: bool = True) -> list[float]:
    """The same by `plan`, of each stage, without peers; on request as on a CPU whose fp16 DeepSpeed refuses."""
    if not fp16:
        library = compat_deepspeed.load(life.ranks.device)
        library.accelerator.get_accelerator().is_fp16_supported = lambda: False
    return [stage.gigabytes_per_gpu for stage in forecast.forecast(life.recipe, world)]


def refusal_of_fp16(life: Life, name: str) -> str:
    """What DeepSpeed's own accelerator has against fp16 on this machine; empty where it computes in it."""
    try:
        compat_deepspeed.check_fp16(compat_deepspeed.load(life.ranks.device))
    except UserError as error:
        return str(error)
    return ""


def language_rows(folder: Path) -> int:
    """Tokens that a language model's folder has vectors for."""
    return int(json.loads((folder / "config.json").read_text())["vocab_size"])


def _main(folder: Path, name: str, spec: str, overrides: list[str], work: Callable[..., Any], rank: int, world: int,
          port: int) -> None:  # fmt: skip
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    gc.freeze()  # what was imported before the fork is no garbage, and DeepSpeed looks for some often
    torch.set_num_threads(1)
    life = Life(folder, spec, overrides)
    results = work(life, name)
    if rank == 0:
        (folder / f"{name}.json").write_text(json.dumps(results))
    life.ranks.close()


class Lives:
    """Starts ranks and waits for them."""

    def __init__(self, folder: Path) -> None:
        os.environ["DS_ACCELERATOR"] = "cpu"
        self.folder = folder
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["tests.radhpc.engine.engine_ranks", "deepspeed", "transformers.generation"]
        )

    def start(
        self, name: str, spec: str, world: int, work: Callable[..., Any], overrides: list[str] | None = None
    ) -> list[BaseProcess]:
        port = free_port()
        processes = [
            self._context.Process(
                target=_main, args=(self.folder, name, spec, overrides or [], work, rank, world, port), daemon=True
            )
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        return list(processes)

    def run(
        self, name: str, spec: str, world: int, work: Callable[..., Any], overrides: list[str] | None = None
    ) -> Any:
        """What rank 0 gives."""
        processes = self.start(name, spec, world, work, overrides)
        for process in processes:
            process.join(200)
        for process in processes:
            if process.is_alive():
                process.kill()
        assert [process.exitcode for process in processes] == [0] * world, name
        return json.loads((self.folder / f"{name}.json").read_text())

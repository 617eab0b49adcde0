"""Forecast what a recipe will need before it is queued: parameters, steps, memory per GPU, size of a checkpoint.

    for stage in forecast(recipe, world=8):
        print(stage.name, stage.trainable, stage.gigabytes_per_gpu)

Nothing is estimated by a formula. The stage's real model is built without values, sharded by the real engine (FSDP2 or
DeepSpeed's own ZeRO) over as many simulated ranks, and one real optimizer step is traced on fake tensors over the
largest micro-batch that the data holds. A local model folder needs only its config.json, and placeholders.py stands in
for what is missing altogether. What a GPU needs on top, the CUDA context, workspaces of libraries and fragmentation, is
not in these figures.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn

from radhpc.core.batch import IGNORE, Batch
from radhpc.core.compat_torch import FakeTensorMode, buffer_table, fake_store, parameter_table
from radhpc.core.errors import UserError
from radhpc.core.recipe import Recipe, Stage
from radhpc.data.collate import NEIGHBOUR_WORDS, EncodedStudy, StudyEncoder, conversation
from radhpc.data.source import Source
from radhpc.data.stream import stage_samples, stage_steps
from radhpc.distributed.ranks import Ranks
from radhpc.engine import compat_deepspeed, zero
from radhpc.engine.fsdp import Engine
from radhpc.models import adapters, extra_modules, family as models, tokenizer
from radhpc.models.quantization import quantise
from radhpc.planning import placeholders
from radhpc.planning.memory_trace import MemoryTrace

LONGEST = 32  # samples with the longest descriptions that are encoded to find the longest text
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


@dataclass(frozen=True)
class StageForecast:
    """The forecast of one stage. Gigabytes and megabytes are decimal."""

    name: str
    steps: int | None  # None: whole epochs of shards that are missing
    samples: int | None  # that it trains on, with repetitions
    epoch_samples: int | None
    parameters: int
    trainable: int
    micro_batch: int  # samples per rank and forward pass
    tokens: int  # of the longest sample
    views: int  # of the sample that has the most
    gigabytes_per_gpu: float  # tensors at the peak of a step, on rank 0
    host_gigabytes: float  # of a rank's weights on the CPU, before they are sharded or moved
    checkpoint_megabytes: float


class SimulatedRanks(Ranks):
    """Rank 0 of a world of any size, without peers and on the CPU."""

    def __init__(self, world: int) -> None:
        super().__init__()
        assert self.world == 1, "a forecast runs in one process"
        self.world, self.device = world, torch.device("cpu")

    def _reduce(self, values: Sequence[float], operation: Any) -> list[float]:
        return list(values)

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world


def forecast(recipe: Recipe, world: int) -> list[StageForecast]:
    """Return the forecast of every stage of a recipe on `world` ranks.

    Raises UserError for what cannot be trained at all, as the job would.
    """
    with tempfile.TemporaryDirectory(prefix="radhpc-plan-") as folder:
        recipe = recipe.model_copy(update={"model": placeholders.fill_missing_folders(recipe.model, Path(folder))})
        sources = [_source(recipe, stage) for stage in recipe.stages]
        family, is_placeholder = build_family(recipe, sources[0], Path(folder))
        return [
            _stage(recipe, stage, source, _encoder(recipe, stage, family), world, is_placeholder)
            for stage, source in zip(recipe.stages, sources, strict=True)
        ]


def _source(recipe: Recipe, stage: Stage) -> Source | None:
    """Return the samples of a stage; None where some of its shards are missing."""
    if placeholders.missing_shards(recipe.shards_of(stage)):
        return None
    source = Source(recipe.shards_of(stage), "train")
    if not len(source):
        raise UserError(f"stage '{stage.name}': no sample of split 'train' in its shards")
    return source


def _encoder(recipe: Recipe, stage: Stage, family: models.ModelFamily) -> StudyEncoder:
    text, images, labelled = recipe.text_of(stage), recipe.images_of(stage), bool(stage.objective.clinical)
    encoder = StudyEncoder(family, text, images, recipe.findings, recipe.seed, labelled)
    if text.neighbours:  # as long as they can be
        encoder.retrieve = lambda views, patient: ["opacity " * NEIGHBOUR_WORDS] * text.neighbours
    return encoder


def build_family(recipe: Recipe, source: Source | None, folder: Path) -> tuple[models.ModelFamily, bool]:
    """Return the model family, and whether its tokenizer is a placeholder, with which texts cannot be measured."""
    existing, folder = recipe.model.tokenizer_folder, folder / "tokenizer"
    if existing is not None and (
        recipe.model.tokenizer.folder is not None or any((Path(existing) / name).exists() for name in TOKENIZER_FILES)
    ):
        return models.family(recipe.model, existing), False
    if existing is not None or source is None:
        placeholders.write_tokenizer(recipe, folder)
        return models.family(recipe.model, str(folder)), True
    text, size = recipe.text_of(recipe.stages[0]), recipe.model.tokenizer.train_vocabulary
    assert size is not None
    tokenizer.train((conversation(sample, text, recipe.findings) for sample in source.samples()), size, folder)
    return models.family(recipe.model, str(folder)), False


def _stage(
    recipe: Recipe, stage: Stage, source: Source | None, encoder: StudyEncoder, world: int, is_placeholder: bool
) -> StageForecast:
    size = min(stage.micro_batch or stage.batch, -(-stage.batch // world))
    rows, tokens, views = largest_rows(recipe, source, encoder, size, is_placeholder)
    rounds = -(-stage.batch // (size * world))
    with _simulated_group(world, recipe.engine == "deepspeed"):
        engine, mode = fake_engine(recipe, stage, encoder.family, SimulatedRanks(world))
        weights = [*engine.model.parameters(), *engine.model.buffers()]
        batch = {  # integers stay real: shapes may follow from them
            name: mode.from_tensor(tensor) if tensor.is_floating_point() else tensor
            for name, tensor in encoder.batch(rows).items()
        }
        with mode, MemoryTrace([*weights, *batch.values()], fake_values=True) as memory:
            # From the second micro-batch of a step on, the gradients of the first are alive, too.
            peak = trace_step(engine, [batch] * min(2, rounds), memory)
        offloaded = engine.offloaded_bytes() if isinstance(engine, zero.ZeroEngine) else 0
        length = len(source) if source is not None else None
        known = length if length is not None or stage.steps is None else 0  # a number of steps needs no length
        return StageForecast(
            name=stage.name,
            steps=None if known is None else stage_steps(stage, known),
            samples=None if known is None else stage_samples(stage, known),
            epoch_samples=length,
            parameters=engine.parameters,
            trainable=engine.trainable,
            micro_batch=size,
            tokens=tokens,
            views=views,
            gigabytes_per_gpu=(peak - offloaded) / 1e9,
            host_gigabytes=(_host_numbers(engine, recipe) * 4 + offloaded) / 1e9,
            checkpoint_megabytes=engine.trainable * 12 / 1e6,  # parameters and moments in float32, of every engine
        )


def _host_numbers(engine: Engine, recipe: Recipe) -> int:
    """Return how many numbers a rank holds on the host at a time: random weights are made whole, those of folders are
    read one by one.
    """
    if recipe.model.weights is None or recipe.model.config:
        return engine.parameters
    return max(compat_deepspeed.whole_numel(parameter) for parameter in engine.model.parameters())


def trace_step(engine: Engine, batches: list[Batch], memory: MemoryTrace) -> int:
    """Return the peak bytes of one optimizer step that finds the optimizer's state already made."""
    if isinstance(engine, zero.ZeroEngine):  # a whole step makes its state and learns its order of layers
        engine.step(batches, supervised=1, schedule=1.0)
        memory.peak = memory.current
        engine.step(batches, supervised=1, schedule=1.0)
        return memory.peak
    for parameter in engine.trained.values():
        parameter.grad = torch.zeros_like(parameter)
    engine.optimizer.step()
    if engine.lockstep or len(batches) == 1:
        engine.optimizer.zero_grad(set_to_none=True)
    else:  # the gradients stand for those of a micro-batch before, which saves half of the time
        batches = batches[:1]
    memory.peak = memory.current
    engine.step(batches, supervised=1, schedule=1.0)
    return memory.peak


def fake_engine(
    recipe: Recipe, stage: Stage, family: models.ModelFamily, ranks: Ranks
) -> tuple[Engine, FakeTensorMode]:
    """Return the engine of a stage, all of whose tensors are fake, and the mode that they belong to."""
    model = family.build_empty()
    with torch.device("meta"):
        extra_modules.attach(model, family, recipe, recipe.seed)
    if recipe.model.quantise is not None:
        quantise(model, family.blocks, (pattern for each in recipe.stages for pattern in each.train))
    adapters.check(model, recipe.stages)
    if stage.lora is not None:
        with torch.device("meta"):
            adapters.attach(model, stage.lora, recipe.seed)
    adapters.choose_trained(model, stage)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    _replace_tensors(model, mode)
    model.to = lambda *_, **__: model  # type: ignore[method-assign]  # they lie where they should
    if recipe.engine != "deepspeed":
        return Engine(model, recipe, stage.optimizer, family.blocks, ranks, stage.objective), mode
    if recipe.precision == "fp16":  # DeepSpeed refuses it on most login nodes; bf16 takes the same two bytes
        recipe = recipe.model_copy(update={"precision": "bf16"})
    with mode:
        return zero.ZeroEngine(model, recipe, stage.optimizer, family.blocks, ranks, stage.objective), mode


def _replace_tensors(model: nn.Module, mode: FakeTensorMode) -> None:
    """Replace tensors without values by fake ones on the CPU; tied ones stay tied."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in fakes:
            with mode:
                made = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            fakes[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if is_parameter else made
        return fakes[id(tensor)]

    keep = [*model.parameters(), *model.buffers()]  # keeps id() unique
    for module in model.modules():
        for tensors in (parameter_table(module), buffer_table(module)):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = fake(tensor)  # type: ignore[assignment]
    del keep


def largest_rows(
    recipe: Recipe, source: Source | None, encoder: StudyEncoder, size: int, is_placeholder: bool
) -> tuple[list[EncodedStudy], int, int]:
    """Return a micro-batch of `size` samples, each as long as the longest and with the views of the sample that has the
    most; its tokens and the views that the model sees.
    """
    tokens, samples, limit = encoder.text.max_tokens, [], encoder.images.limit
    if source is None:
        views, shape = limit or placeholders.VIEWS, (placeholders.PIXELS, placeholders.PIXELS)
    else:
        sizes = source.sizes(np.arange(len(source)))
        views = int(min(sizes[:, 0].max(), limit or sizes[:, 0].max()))
        longest = np.argsort(-sizes[:, 1], kind="stable")[:LONGEST]
        samples = list(source.samples(np.sort(longest)))
        shapes = [(view.width, view.height) for sample in samples for view in sample.images]
        shape = max(shapes, key=lambda shape: shape[0] * shape[1], default=(64, 64))
    picture = Image.new("L", shape)
    prompt = encoder.encode_prompt("", None, [picture] * views)
    if not is_placeholder:
        tokens = max((encoder.encode("", sample, [picture] * views).length for sample in samples), default=tokens)
    ids = np.resize(prompt.input_ids, max(tokens, prompt.length))
    ids[: prompt.length] = prompt.input_ids
    ids[prompt.length :] = encoder.family.tokenizer.eos_token_id
    labels = ids.copy()
    labels[: prompt.length] = IGNORE
    shown = 1 if encoder.images.stitch else views
    return [EncodedStudy("", ids, labels, prompt.images)] * size, len(ids), shown


@contextmanager
def _simulated_group(world: int, deepspeed: bool) -> Iterator[None]:
    """Join a process group of `world` ranks in which only this one exists: collectives return at once."""
    if world == 1 and not deepspeed:  # DeepSpeed needs a group for a single rank, too
        yield
        return
    dist.init_process_group("fake", store=fake_store(), rank=0, world_size=world)
    try:
        yield
    finally:
        zero.destroy_process_group() if deepspeed else dist.destroy_process_group()

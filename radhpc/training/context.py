"""The parts of a run, built from its folder: tokenizer, model family, data, and the model of any stage."""

import gc
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.files import read_json, write_atomically
from radhpc.core.protocol import Event
from radhpc.core.recipe import Recipe
from radhpc.core.run_folder import RunFolder
from radhpc.core.sample import Sample, Split
from radhpc.data.collate import StudyEncoder, conversation
from radhpc.data.retrieval import RetrievalIndex, encode_thumbnail
from radhpc.data.source import Source
from radhpc.data.tasks import Tasks
from radhpc.distributed.background import run_in_background, run_on_first
from radhpc.distributed.ranks import Ranks
from radhpc.distributed.stop import Stop
from radhpc.engine import zero
from radhpc.engine.checkpoint import Checkpoints, Cursor, sha256
from radhpc.engine.fsdp import Engine, check_support
from radhpc.models import adapters, extra_modules, family as models, lazy_loading, tokenizer
from radhpc.models.quantization import quantise


class Trial(Protocol):
    """The sweep that a run belongs to, as far as the job has to know it; called on rank 0 alone."""

    @property
    def metric(self) -> str: ...

    def parameters(self) -> Mapping[str, bool | int | float | str | None]: ...

    def should_prune(self, step: int) -> bool:
        """Whether to save and end at this step, now that it was evaluated."""


class Parts:
    """Everything that training, evaluation and generation share."""

    def __init__(
        self, run: RunFolder, recipe: Recipe, ranks: Ranks, stop: Stop | None = None, trial: Trial | None = None
    ) -> None:
        """`stop`: ends long work by Interrupted, on all ranks together."""
        self.run, self.recipe, self.ranks, self.stop = run, recipe, ranks, stop or Stop()
        self.trial = trial
        self.checkpoints = Checkpoints.of(run.path, recipe)
        self._sources: dict[tuple[int, str], Source] = {}
        self.base_hash = ""  # known once a model was built
        self.stage = len(recipe.stages) - 1  # whose prompts and views encoder() has: that of the newest engine
        self._encoders: dict[int, StudyEncoder] = {}

    def source(self, stage: int, split: Split) -> Source:
        """The samples of a split, over a stage's shards."""
        if (stage, split) not in self._sources:
            self._sources[stage, split] = Source(self.recipe.shards_of(self.recipe.stages[stage]), split)
        return self._sources[stage, split]

    @cached_property
    def family(self) -> models.ModelFamily:
        return models.family(self.recipe.model, self._tokenizer_folder())

    @property
    def encoder(self) -> StudyEncoder:
        """That of the stage whose engine was built last."""
        return self.encoder_of(self.stage)

    def encoder_of(self, number: int) -> StudyEncoder:
        """Prompts, answers and views as a stage has them."""
        if number not in self._encoders:
            recipe, stage = self.recipe, self.recipe.stages[number]
            text, images = recipe.text_of(stage), recipe.images_of(stage)
            labelled = bool(stage.objective.clinical)
            encoder = StudyEncoder(self.family, text, images, recipe.findings, recipe.seed, labelled)
            self._encoders[number] = encoder
            if text.neighbours:
                encoder.retrieve = self._alike(number, text.neighbours)
        return self._encoders[number]

    def find_neighbours(self) -> None:
        """Before the first step, on all ranks: the library of each stage that grounds its reports, made once and then
        kept as it is. Raises UserError where it is not what an earlier life was trained with.
        """
        for number, stage in enumerate(self.recipe.stages):
            text = self.recipe.text_of(stage)
            if not text.neighbours:
                continue
            training, tasks = self.source(number, "train"), Tasks(text, self.recipe.findings, self.recipe.seed)

            def answer(sample: Sample, tasks: Tasks = tasks) -> str:
                asked = tasks.default(sample)
                return asked.answer if asked and tasks.mixture[asked.task].kind == "report" else ""

            RetrievalIndex.build(training, answer, len(training), self._libraries(number), self.ranks, self.stop)
            run_on_first(lambda n=number: self._check_library(n), self.ranks, self.stop)

    def _libraries(self, number: int) -> Path:
        """A stage's own: two stages may learn other sections of the same studies."""
        return self.run.folder(f"neighbours/{self.recipe.stages[number].name}")

    def _library(self, number: int) -> Path:
        training = self.source(number, "train")
        return RetrievalIndex.path(training, len(training), self._libraries(number))

    def _check_library(self, number: int) -> None:
        path, name = self._library(number), self.recipe.stages[number].name
        found = sha256(path)
        known = next((event for event in self.run.events(Event.NEIGHBOURS) if event["stage"] == name), None)
        if known is None:
            self.run.record(Event.NEIGHBOURS, stage=name, sha256=found)
        elif known["sha256"] != found:
            raise UserError(f"{path}: changed since stage '{name}' began; its prompts would be others: start a new run")

    def _alike(self, number: int, count: int) -> Callable[[Sequence[Image.Image], str], list[str]]:
        path = self._library(number)
        if not path.exists():
            raise UserError(f"{path}: missing; without it the model does not get the reports that it was trained with")
        library = RetrievalIndex.load(path)
        return lambda views, patient: library.most_similar(encode_thumbnail(views), count, patient)

    def engine(self, stage: int, lineage: tuple[str, ...], training: bool = True) -> Engine:
        """The model at the start of a stage, ready to train. `lineage` names the checkpoints of the stages before.

        What is not trained on one rank needs no DeepSpeed.
        """
        family, recipe = self.family, self.recipe
        if not training and self.ranks.world == 1:
            recipe = recipe.model_copy(update={"engine": "single"})
        check_support(recipe, self.ranks)
        gc.collect()  # the engine of the stage before is full of cycles
        whole = any(each.lora is not None and each.lora.dora for each in recipe.stages)
        model = run_in_background(
            lambda: lazy_loading.build(family, recipe.model, recipe.seed, whole), self.ranks, self.stop
        )
        assert model is not None
        self.base_hash = self._base_hash(model)
        if recipe.model.quantise is not None:
            quantise(model, family.blocks, (pattern for each in recipe.stages for pattern in each.train))
        _check_context(model, recipe)
        extra_modules.attach(model, family, recipe, recipe.seed)
        adapters.check(model, recipe.stages)
        self.stage = stage

        def saved(earlier: int) -> adapters.Tensors:
            name = lineage[earlier]
            if fault := self.checkpoints.verify(name):
                where, stage_name = self.checkpoints.storage.where(name), self.recipe.stages[earlier].name
                raise UserError(f"{where}: {fault}; without the end of stage '{stage_name}' the run cannot go on")
            if self.checkpoints.cursor(name).base != self.base_hash:
                where = self.checkpoints.storage.where(name)
                raise UserError(f"{where}: it was trained on another base model than this one")
            return self.checkpoints.tensors(name, moments=False)

        adapters.prepare(model, self.recipe.stages, stage, saved, self.recipe.seed)
        here = recipe.stages[stage]
        kind = zero.ZeroEngine if recipe.engine == "deepspeed" else Engine
        return kind(model, recipe, here.optimizer, family.blocks, self.ranks, here.objective)

    def restored_engine(self, name: str | None = None) -> tuple[Engine, Cursor]:
        """The model of a checkpoint, or of the newest one that verifies. Raises UserError where there is none."""
        newest, skipped = (name, []) if name else self.checkpoints.newest()
        if newest is None:
            why = "".join(f"; {name}: {fault}" for name, fault in skipped)
            raise UserError(f"{self.run.path}: no checkpoint to load{why}")
        cursor = self.checkpoints.cursor(newest)
        engine = self.engine(cursor.stage, cursor.lineage, training=False)
        self.check(cursor)
        engine.load(self.checkpoints.tensors(newest, moments=False), steps=0)
        return engine, cursor

    def check(self, cursor: Cursor) -> None:
        """Refuse a checkpoint of another recipe, base model or data than what is here now."""
        here = self.run.path
        if cursor.recipe != self.recipe.hash:
            raise UserError(f"{here}/recipe.yaml: changed since the checkpoint of step {cursor.step}; start a new run")
        if cursor.base != self.base_hash:
            raise UserError(f"{here}: the base model is not the one of the checkpoint of step {cursor.step}")
        if cursor.data != self.source(cursor.stage, "train").hashes:
            raise UserError(
                f"{here}: the shards are not those of the checkpoint of step {cursor.step}; a run needs the same "
                "manifests all its life"
            )

    def _tokenizer_folder(self) -> str:
        """Where the tokenizer lies; one that is to be trained is trained once, by rank 0."""
        model = self.recipe.model
        if model.tokenizer.train_vocabulary is None:
            return str(model.tokenizer_folder)
        folder = self.run.path / "tokenizer"
        vocabulary = model.tokenizer.train_vocabulary

        def train() -> None:
            temporary = self.run.path / ".tokenizer.writing"
            shutil.rmtree(temporary, ignore_errors=True)
            text, findings = self.recipe.text_of(self.recipe.stages[0]), self.recipe.findings
            texts = (conversation(sample, text, findings) for sample in self.source(0, "train").samples())
            tokenizer.train(texts, vocabulary, temporary)
            temporary.rename(folder)

        run_on_first(lambda: None if folder.exists() else train(), self.ranks, self.stop)
        return str(folder)

    def _base_hash(self, model: torch.nn.Module) -> str:
        """Identity of the base: of the weights' files, or of the random values themselves."""
        parts, remembered = self.recipe.model, self.run.path / "base.json"
        folders = [Path(folder) for _, folder in sorted(parts.folders.items())]
        # What is put together has random values, too: they are a function of the recipe, whose hash is checked beside.
        return run_on_first(
            lambda: _hash_files(folders, remembered) if folders else _hash_tensors(model), self.ranks, self.stop
        )


def _check_context(model: torch.nn.Module, recipe: Recipe) -> None:
    """Refuse texts that are longer than the model can read."""
    config = model.config.get_text_config()  # type: ignore[operator,union-attr]
    longest = getattr(config, "max_position_embeddings", None)
    for stage in recipe.stages:
        tokens = recipe.text_of(stage).max_tokens
        if longest is not None and tokens > longest:
            raise UserError(
                f"stage '{stage.name}': text.max_tokens {tokens} is longer than the model's context; allowed are up to "
                f"{longest}"
            )


def _hash_tensors(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_files(folders: list[Path], remembered: Path) -> str:
    """sha256 over the weights' files. Twenty gigabytes take some ten seconds, so the result is kept in base.json and
    trusted while sizes and times of change stay the same.
    """
    files = []
    for folder in folders:
        files += (found := sorted(folder.glob("*.safetensors")))
        if not found:
            raise UserError(f"model.weights: {folder}: no .safetensors file there")
    seen = [[file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files]
    before = read_json(remembered)
    if before and before["files"] == seen:
        return str(before["hash"])
    digest = hashlib.sha256("".join(f"{file.name} {sha256(file)}\n" for file in files).encode()).hexdigest()
    write_atomically(remembered, json.dumps({"hash": digest, "files": seen}).encode())
    return digest

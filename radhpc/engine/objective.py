"""Turn batches into a loss: the weighted sum of a stage's terms, each normalised over the whole global batch.

Between fsdp.py, which makes the passes, and extra_modules.py, whose heads and fusion the terms listen to. The calls
have to come in this order, on all ranks:

    objective = Objective(stage.objective, model)
    objective.begin_passes(batches, supervised, ranks, run_forward)   # before the passes over a step's micro-batches
    loss = objective(model, batch)              # for each of them, in the same order: a sum over tokens
    (loss / supervised).backward()              # by the engine, before the next batch
    objective.regularise(trained)               # once, after the gradients are summed over the ranks
    objective.reduce_terms()                    # once: each term's mean over the global batch, and losses by group

To repeat the passes of a step (an overflow, or the second gradient of SAM), begin again with begin_passes(), from the
random state of before; in unrecorded() the second round leaves the terms as they were. Outside of training, and
whenever gradients are disabled, a call returns the sum of the token losses alone. Phase says where an objective stands.

The value of a term must not depend on how the batch is divided over ranks and micro-batches. Sums over tokens, samples
and findings do not, once divided by counts of the global batch. InfoNCE is no sum: each pair is held against all
others. Its gradient is, however, a sum over embeddings, so a first pass without gradients makes the embeddings of all
micro-batches, the ranks exchange them, and the second pass gets the loss's gradient with respect to its own (GradCache,
Gao et al., 2021). Random numbers are replayed, so that both passes drop the same units.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from radhpc.core.batch import IGNORE, Batch
from radhpc.core.recipe import ObjectiveSettings
from radhpc.data.collate import TARGET_KEYS, UNKNOWN
from radhpc.distributed import shard_layout
from radhpc.distributed.ranks import Ranks
from radhpc.models import token_loss
from radhpc.models.extra_modules import Heads
from radhpc.models.portable.hierarchical_fusion import HierarchicalFusion

# Weights of the fusion's three measures; Radixpert's training/losses.py, LossConfig.
SIMILARITY, ENTROPY, IMBALANCE = 0.1, 0.05, 0.1


class Phase(Enum):
    """The purpose of a call of the objective."""

    IDLE = auto()  # no step was begun: the token losses alone, which an evaluation reports
    COLLECTING = auto()  # inside of begin_passes(), without gradients: the embeddings for InfoNCE
    TRAINING = auto()  # after begin_passes(): all terms, where gradients are enabled


class NextToken:
    """Predict each supervised token from all that stands before it."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch, grouped: token_loss.GroupedLoss | None = None) -> torch.Tensor:
        """Return the sum of the token losses, in float32: the caller divides by the tokens of the global batch."""
        inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
        smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0  # a loss is reported without
        return token_loss.summed_loss(model, inputs, batch["labels"], smoothing, grouped)


@dataclass(frozen=True)
class _GlobalCounts:
    """Counts of the global batch, by which the terms are divided."""

    tokens: float = 0.0  # supervised
    samples: float = 0.0
    known_findings: float = 0.0


@dataclass
class _Terms:
    """The terms of the passes so far, for reports."""

    sums: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank, divided by the counts of all
    means: dict[str, float] = field(default_factory=dict)  # over the global batch, the same on every rank
    by_group: torch.Tensor | None = None  # (2, groups): summed token losses, and tokens


class Objective:
    """The terms of one stage. The module's docstring says in which order to call it."""

    def __init__(self, recipe: ObjectiveSettings, model: nn.Module) -> None:
        self.recipe = recipe
        self._next_token = NextToken(recipe.label_smoothing)
        heads = getattr(model, "heads", None)
        self._heads = heads if isinstance(heads, Heads) and (recipe.contrastive or recipe.clinical) else None
        self._fusion = next((module for module in model.modules() if isinstance(module, HierarchicalFusion)), None)
        self._phase = Phase.IDLE
        self._embeddings: list[torch.Tensor] = []  # while COLLECTING
        self._embedding_gradients: Iterator[torch.Tensor] = iter(())  # one for each micro-batch, in their order
        self._counts, self._terms = _GlobalCounts(), _Terms()
        self._ranks: Ranks | None = None

    def begin_passes(
        self, batches: Sequence[Batch], supervised: int, ranks: Ranks, run_forward: Callable[[Batch], object]
    ) -> None:
        """Begin the passes over a step's micro-batches; a collective. `run_forward`: the engine's forward pass, which
        calls this objective.

        Call it with the same random state as the passes that follow.
        """
        self._phase, self._terms, self._ranks = Phase.TRAINING, _Terms(), ranks
        samples = known = 0.0
        if self.recipe.clinical or self.recipe.fusion:
            samples = sum(float(_valid(batch["labels"]).sum()) for batch in batches)
            known = sum(float((batch["findings"] != UNKNOWN).sum()) for batch in batches if "findings" in batch)
            samples, known = ranks.sum([samples, known])
        self._counts = _GlobalCounts(float(supervised), samples, known)
        if self.recipe.contrastive:
            self._collect_embeddings(batches, ranks, run_forward)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Return the loss of a micro-batch, in float32, times the supervised tokens of the global batch. In
        Phase.IDLE, and where gradients are disabled, return the sum of the token losses alone.
        """
        collecting = self._phase is Phase.COLLECTING
        training = self._phase is Phase.TRAINING and torch.is_grad_enabled()
        with contextlib.ExitStack() as stack:
            if self._fusion is not None:
                prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
                stack.enter_context(self._fusion.prompted(prompt))
            outputs: Mapping[str, torch.Tensor] = {}
            if self._heads is not None and (collecting or training):
                outputs = stack.enter_context(self._heads.capture(batch))
            grouped = token_loss.GroupedLoss(batch["groups"]) if training and "groups" in batch else None
            loss = self._next_token(model, batch, grouped)
            if collecting:
                self._embeddings.append(torch.stack([outputs["image"], outputs["text"]], dim=1).detach())
            if not training:
                return loss
            if grouped is not None:
                tokens = (batch["labels"][:, 1:] != IGNORE).sum(1).double() @ grouped.groups.double()
                sums = torch.stack([grouped.sums, tokens])
                self._terms.by_group = sums if self._terms.by_group is None else self._terms.by_group + sums
            return self._sum_of_terms(loss, batch, outputs)

    def predict_findings(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Return the head's probability of each of the recipe's findings, (B, names); None without a head."""
        if self._heads is None:
            return None
        phase, self._phase = self._phase, Phase.IDLE
        try:
            with self._heads.capture(batch) as outputs:
                self(model, batch)  # listens to nothing itself
                return outputs["findings"].sigmoid()
        finally:
            self._phase = phase

    def _sum_of_terms(self, loss: torch.Tensor, batch: Batch, outputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the weighted terms. Each is its mean over the global batch, times the supervised tokens."""
        counts = self._counts
        tokens, total = max(1.0, counts.tokens), self.recipe.generation * loss
        self._record("generation", loss, tokens)
        if self.recipe.contrastive:
            pairs = torch.stack([outputs["image"], outputs["text"]], dim=1)
            gradient = next(self._embedding_gradients)
            total = total + self.recipe.contrastive * tokens * (pairs * gradient).sum()
        if self.recipe.clinical:
            known = (batch["findings"] != UNKNOWN).float()
            errors = nn.functional.binary_cross_entropy_with_logits(
                outputs["findings"], batch["findings"].float(), weight=known, reduction="sum"
            )
            total = total + self.recipe.clinical * tokens * self._mean("clinical", errors, counts.known_findings)
        if self.recipe.fusion:
            assert self._fusion is not None
            measures = self._fusion.measures
            each = (
                SIMILARITY * measures["similarity"] + ENTROPY * measures["entropy"] + IMBALANCE * measures["imbalance"]
            )
            errors = (each * _valid(batch["labels"])).sum()
            total = total + self.recipe.fusion * tokens * self._mean("fusion", errors, counts.samples)
        return total

    def _mean(self, name: str, errors: torch.Tensor, count: float) -> torch.Tensor:
        self._record(name, errors, count)
        return errors / max(1.0, count)

    def _record(self, name: str, errors: torch.Tensor, count: float) -> None:
        sums = self._terms.sums
        sums[name] = sums.get(name, 0.0) + errors.detach().double() / max(1.0, count)

    # InfoNCE

    def _collect_embeddings(
        self, batches: Sequence[Batch], ranks: Ranks, run_forward: Callable[[Batch], object]
    ) -> None:
        """Make the first pass, and keep for the second the gradient of the loss by this rank's embeddings."""
        with _replayed(ranks.device), torch.no_grad():
            self._phase, self._embeddings = Phase.COLLECTING, []
            try:
                for batch in batches:
                    run_forward(batch)
                local = torch.cat(self._embeddings)  # (samples and empty slots, 2, DIMENSION)
            finally:
                self._phase, self._embeddings = Phase.TRAINING, []
        valid = torch.cat([_valid(batch["labels"]) for batch in batches])
        gathered = ranks.gather((local.cpu(), valid.cpu()))
        pairs = torch.cat([embeddings for embeddings, _ in gathered]).requires_grad_()
        with torch.enable_grad():
            loss = info_nce(pairs, torch.cat([valid for _, valid in gathered]), self.recipe.temperature)
        (gradient,) = torch.autograd.grad(loss, pairs)
        by_rank = torch.split(gradient, [len(embeddings) for embeddings, _ in gathered])
        own = by_rank[ranks.rank].to(local.device)
        self._embedding_gradients = iter(torch.split(own, [len(batch["labels"]) for batch in batches]))
        self._terms.means["contrastive"] = float(loss.detach())

    # Once per step

    def regularise(self, trained: Mapping[str, nn.Parameter], scale: float = 1.0) -> None:
        """Add the gradients of the adapters' regularisation to the present ones, which are `scale` times too large.

        Radixpert's training/losses.py, MSALoRARegularizationLoss: l2 times the norms of A and B, orthogonal times the
        Frobenius norms of A A' - 1, l1 times the absolute values of A. Each summed over the adapted layers.
        """
        if not self.recipe.regularisation:
            return
        total = 0.0
        with torch.no_grad():
            for name, parameter in trained.items():
                if ".lora_A." not in name and ".lora_B." not in name:
                    continue
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
                value, gradient = self._penalty(whole.detach().float(), ".lora_A." in name)
                total += value
                gradient = shard_layout.dtensor_like(gradient * (self.recipe.regularisation * scale), parameter)
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        self._terms.means["regularisation"] = total

    def _penalty(self, matrix: torch.Tensor, is_a: bool) -> tuple[float, torch.Tensor]:
        """Return the regularisation of one matrix and its gradient; a norm of zero has no gradient."""
        norm = matrix.norm()
        value, gradient = self.recipe.l2 * norm, self.recipe.l2 * matrix / norm.clamp_min(1e-12)
        if is_a:
            rest = matrix @ matrix.T - torch.eye(len(matrix), device=matrix.device)
            off = rest.norm()
            value = value + self.recipe.orthogonal * off + self.recipe.l1 * matrix.abs().sum()
            gradient = gradient + 2 * self.recipe.orthogonal * (rest @ matrix) / off.clamp_min(1e-12)
            gradient = gradient + self.recipe.l1 * matrix.sign()
        return float(value), gradient

    @contextlib.contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Leave the terms that are reported as they are, whatever is computed inside."""
        terms = self._terms
        try:
            yield
        finally:
            self._terms = terms

    def reduce_terms(self) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
        """Return the mean of each term over the global batch, without its weight; and of each of
        StudyEncoder.loss_groups the summed loss of its tokens and their number. All ranks must call it; it is one
        collective.
        """
        assert self._ranks is not None
        terms = self._terms
        groups = [] if terms.by_group is None else terms.by_group.flatten().tolist()
        sums = self._ranks.sum([*(float(value) for value in terms.sums.values()), *groups])
        by_group, count = sums[len(terms.sums) :], len(groups) // 2
        means = dict(zip(terms.sums, sums, strict=False)) | terms.means
        return means, tuple(zip(by_group[:count], by_group[count:], strict=True))

    def local_loss(self) -> float:
        """Return what is minimised, of this rank alone."""
        return self.weighted_sum({name: float(value) for name, value in self._terms.sums.items()} | self._terms.means)

    def weighted_sum(self, terms: Mapping[str, float]) -> float:
        """Return what is minimised, from the terms of reduce_terms()."""
        return float(sum(getattr(self.recipe, name) * value for name, value in terms.items()))


def info_nce(pairs: torch.Tensor, valid: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return InfoNCE (van den Oord et al., 2018) in both directions, as CLIP has it: pairs (N, 2, D) of unit vectors,
    valid (N,) of 0 and 1, the mean over the valid ones. A single pair has no others to be told from: zero.
    """
    present = valid.bool()
    count = valid.sum()
    targets = torch.arange(len(pairs), device=pairs.device).masked_fill(~present, IGNORE)
    total = pairs.new_zeros(())
    for side, other in ((0, 1), (1, 0)):
        scores = pairs[:, side] @ pairs[:, other].T / temperature
        # Slots without a sample are no alternative. Their own rows are ignored, but must not be without any.
        scores = scores.masked_fill(~present & present.any(), -torch.inf)
        total = total + nn.functional.cross_entropy(scores, targets, ignore_index=IGNORE, reduction="sum") / 2
    return total / count.clamp_min(1) * (count > 1)


def _valid(labels: torch.Tensor) -> torch.Tensor:
    """Return which rows are samples with something to learn, and no empty slots: (B,) of 0 and 1."""
    return (labels != IGNORE).any(-1).float()


@contextlib.contextmanager
def _replayed(device: torch.device) -> Iterator[None]:
    """Restore the state of the random numbers at the end."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def random_state(device: torch.device) -> tuple[torch.Tensor, Any]:
    """Return the state of the random numbers that dropout on this device draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[torch.Tensor, Any], device: torch.device) -> None:
    """Restore what random_state() returned."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

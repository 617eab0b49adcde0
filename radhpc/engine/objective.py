"""Batches to a loss: the weighted sum of a stage's terms, each normalised over the whole global batch.

Between fsdp.py, which runs the passes, and extra_modules.py, whose heads and fusion the terms listen to:

    objective = Objective(stage.objective, model)
    objective.begin(batches, supervised, ranks, run)     # once per pass over a step's micro-batches, on all ranks
    loss = objective(model, batch)                       # for each: a sum, for the engine to divide by `supervised`
    objective.regularise(trained)                        # once, behind the gradients' sum over the ranks
    objective.values()                                   # each term's mean over the global batch, and losses by kind

What a term is worth must not depend on how the batch is dealt to ranks and micro-batches. Sums over tokens, samples
and findings do not, once divided by counts of the global batch. InfoNCE is no sum: each pair is held against all
others. Its gradient is, however, a sum over embeddings, so a first pass without gradients makes the embeddings of all
micro-batches, the ranks exchange them, and the second pass gets the loss's gradient with respect to its own (GradCache,
Gao et al., 2021). Random numbers are replayed, so that both passes drop the same units.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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

# Of the fusion's three measures; Radixpert's training/losses.py, LossConfig.
SIMILARITY, ENTROPY, IMBALANCE = 0.1, 0.05, 0.1


class NextToken:
    """Predict each supervised token from all that stands before it."""

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def __call__(self, model: nn.Module, batch: Batch, grouped: token_loss.GroupedLoss | None = None) -> torch.Tensor:
        """The sum of the token losses, in float32: the caller divides by the tokens of the whole global batch."""
        inputs = {name: value for name, value in batch.items() if name not in TARGET_KEYS}
        smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0  # a loss is reported without
        return token_loss.summed_loss(model, inputs, batch["labels"], smoothing, grouped)


class Objective:
    """The terms of one stage."""

    def __init__(self, recipe: ObjectiveSettings, model: nn.Module) -> None:
        self.recipe = recipe
        self._next_token = NextToken(recipe.label_smoothing)
        heads = getattr(model, "heads", None)
        self._heads = heads if isinstance(heads, Heads) and (recipe.contrastive or recipe.clinical) else None
        self._fusion = next((module for module in model.modules() if isinstance(module, HierarchicalFusion)), None)
        self._begun = False
        self._looking: list[torch.Tensor] | None = None
        self._pulls: Iterator[torch.Tensor] = iter(())
        self._tokens = self._samples = self._known = 0.0  # of the global batch
        self._sums: dict[str, torch.Tensor] = {}
        self._means: dict[str, float] = {}
        self._kinds: torch.Tensor | None = None  # (2, kinds): summed token losses, and tokens
        self._ranks: Ranks | None = None

    def begin(self, batches: Sequence[Batch], supervised: int, ranks: Ranks, run: Callable[[Batch], object]) -> None:
        """A pass over a step's micro-batches begins. `run`: the engine's forward pass, which calls this objective.

        Call it with the same random state as the pass that follows.
        """
        self._begun, self._sums, self._means, self._kinds, self._ranks = True, {}, {}, None, ranks
        self._tokens = float(supervised)
        if self.recipe.clinical or self.recipe.fusion:
            samples = sum(float(_valid(batch["labels"]).sum()) for batch in batches)
            known = sum(float((batch["findings"] != UNKNOWN).sum()) for batch in batches if "findings" in batch)
            self._samples, self._known = ranks.sum([samples, known])
        if self.recipe.contrastive:
            self._look_ahead(batches, ranks, run)

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a micro-batch, in float32, times the supervised tokens of the global batch. Before the first
        begin(), and where no gradient is wanted, the sum of the token losses alone: what an evaluation reports.
        """
        looking = self._looking is not None
        with contextlib.ExitStack() as stack:
            if self._fusion is not None:
                prompt = batch["attention_mask"].bool() & (batch["labels"] == IGNORE)
                stack.enter_context(self._fusion.prompted(prompt))
            terms = self._begun and (looking or torch.is_grad_enabled())
            heard = stack.enter_context(self._heads.capture(batch)) if self._heads is not None and terms else {}
            grouped = token_loss.GroupedLoss(batch["groups"]) if terms and not looking and "groups" in batch else None
            loss = self._next_token(model, batch, grouped)
            if looking:
                assert self._looking is not None
                self._looking.append(torch.stack([heard["image"], heard["text"]], dim=1).detach())
                return loss
            if not terms:
                return loss
            if grouped is not None:
                tokens = (batch["labels"][:, 1:] != IGNORE).sum(1).double() @ grouped.groups.double()
                found = torch.stack([grouped.sums, tokens])
                self._kinds = found if self._kinds is None else self._kinds + found
            return self._sum(loss, batch, heard)

    def predict_findings(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """The head's probability of each of the recipe's findings, (B, names); None where the stage has no head."""
        if self._heads is None:
            return None
        begun, self._begun = self._begun, False
        try:
            with self._heads.capture(batch) as heard:
                self(model, batch)  # listens to nothing itself
                return heard["findings"].sigmoid()
        finally:
            self._begun = begun

    def _sum(self, loss: torch.Tensor, batch: Batch, heard: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The weighted terms. Each is its mean over the global batch, times the supervised tokens."""
        tokens, total = max(1.0, self._tokens), self.recipe.generation * loss
        self._note("generation", loss, tokens)
        if self.recipe.contrastive:
            pull = next(self._pulls)
            pairs = torch.stack([heard["image"], heard["text"]], dim=1)
            total = total + self.recipe.contrastive * tokens * (pairs * pull).sum()
        if self.recipe.clinical:
            known = (batch["findings"] != UNKNOWN).float()
            errors = nn.functional.binary_cross_entropy_with_logits(
                heard["findings"], batch["findings"].float(), weight=known, reduction="sum"
            )
            total = total + self.recipe.clinical * tokens * self._mean("clinical", errors, self._known)
        if self.recipe.fusion:
            assert self._fusion is not None
            measures = self._fusion.measures
            each = (
                SIMILARITY * measures["similarity"] + ENTROPY * measures["entropy"] + IMBALANCE * measures["imbalance"]
            )
            errors = (each * _valid(batch["labels"])).sum()
            total = total + self.recipe.fusion * tokens * self._mean("fusion", errors, self._samples)
        return total

    def _mean(self, name: str, errors: torch.Tensor, count: float) -> torch.Tensor:
        self._note(name, errors, count)
        return errors / max(1.0, count)

    def _note(self, name: str, errors: torch.Tensor, count: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + errors.detach().double() / max(1.0, count)

    # InfoNCE

    def _look_ahead(self, batches: Sequence[Batch], ranks: Ranks, run: Callable[[Batch], object]) -> None:
        """The first pass: what the loss wants of this rank's embeddings, for the second."""
        with _replayed(ranks.device), torch.no_grad():
            self._looking = []
            try:
                for batch in batches:
                    run(batch)
                mine = torch.cat(self._looking)  # (samples and empty slots, 2, DIMENSION)
            finally:
                self._looking = None
        valid = torch.cat([_valid(batch["labels"]) for batch in batches])
        everybody = ranks.gather((mine.cpu(), valid.cpu()))
        pairs = torch.cat([theirs for theirs, _ in everybody]).requires_grad_()
        with torch.enable_grad():
            loss = info_nce(pairs, torch.cat([theirs for _, theirs in everybody]), self.recipe.temperature)
        (pull,) = torch.autograd.grad(loss, pairs)
        own = pull.split([len(theirs) for theirs, _ in everybody])[ranks.rank].to(mine.device)
        self._pulls = iter(own.split([len(batch["labels"]) for batch in batches]))
        self._means["contrastive"] = float(loss.detach())

    # Once per step

    def regularise(self, trained: Mapping[str, nn.Parameter], scale: float = 1.0) -> None:
        """Add the gradients of the adapters' regularisation to those that are there, which are `scale` times too large.

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
        self._means["regularisation"] = total

    def _penalty(self, matrix: torch.Tensor, is_a: bool) -> tuple[float, torch.Tensor]:
        """The regularisation of one matrix, and its gradient; a norm of zero has none."""
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
    def silently(self) -> Iterator[None]:
        """What is computed in here leaves values() as they were."""
        sums, means, kinds = self._sums, self._means, self._kinds
        try:
            yield
        finally:
            self._sums, self._means, self._kinds = sums, means, kinds

    def values(self) -> tuple[dict[str, float], tuple[tuple[float, float], ...]]:
        """The mean of each term over the global batch, without its weight; and of each of StudyEncoder.loss_groups the
        summed loss of its tokens and their number. All ranks must call it; it is one collective.
        """
        assert self._ranks is not None
        kinds = [] if self._kinds is None else self._kinds.flatten().tolist()
        sums = self._ranks.sum([*(float(value) for value in self._sums.values()), *kinds])
        by_group, count = sums[len(self._sums) :], len(kinds) // 2
        terms = dict(zip(self._sums, sums, strict=False)) | self._means
        return terms, tuple(zip(by_group[:count], by_group[count:], strict=True))

    def loss(self) -> float:
        """What is minimised, of this rank alone."""
        return self.weighted({name: float(value) for name, value in self._sums.items()} | self._means)

    def weighted(self, values: Mapping[str, float]) -> float:
        """What is minimised, of what values() gives."""
        return sum(getattr(self.recipe, name) * value for name, value in values.items())


def info_nce(pairs: torch.Tensor, valid: torch.Tensor, temperature: float) -> torch.Tensor:
    """InfoNCE (van den Oord et al., 2018) in both directions, as CLIP has it: pairs (N, 2, D) of unit vectors, valid
    (N,) of 0 and 1, the mean over the valid ones. One pair alone has nothing to be told from: zero.
    """
    there = valid.bool()
    count = valid.sum()
    right = torch.arange(len(pairs), device=pairs.device).masked_fill(~there, IGNORE)
    each = pairs.new_zeros(())
    for here, other in ((0, 1), (1, 0)):
        scores = pairs[:, here] @ pairs[:, other].T / temperature
        # Slots without a sample are no alternative. Their own rows are ignored, but must not be without any.
        scores = scores.masked_fill(~there & there.any(), -torch.inf)
        each = each + nn.functional.cross_entropy(scores, right, ignore_index=IGNORE, reduction="sum") / 2
    return each / count.clamp_min(1) * (count > 1)


def _valid(labels: torch.Tensor) -> torch.Tensor:
    """Which rows are samples with something to learn, and no empty slots: (B,)."""
    return (labels != IGNORE).any(-1).float()


@contextlib.contextmanager
def _replayed(device: torch.device) -> Iterator[None]:
    """Leave the random numbers as they were found."""
    state = random_state(device)
    try:
        yield
    finally:
        set_random_state(state, device)


def random_state(device: torch.device) -> tuple[torch.Tensor, Any]:
    """What dropout goes by on this device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(state: tuple[torch.Tensor, Any], device: torch.device) -> None:
    """What random_state() gave."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)

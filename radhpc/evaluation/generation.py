"""Generates texts for studies in batches, on all ranks together, and computes likelihoods of given answers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from radhpc.data.collate import EncodedStudy, StudyEncoder
from radhpc.distributed.ranks import Ranks
from radhpc.engine.fsdp import Engine


def generate(
    engine: Engine,
    encoder: StudyEncoder,
    prompts: Sequence[EncodedStudy],
    batch: int,
    max_new_tokens: int,
    ranks: Ranks,
    check: Callable[[int], None] = lambda done: None,
    given_up: Callable[[], bool] = lambda: False,
    **decoding: Any,
) -> list[str]:
    """Generate a text for each of this rank's prompts (see StudyEncoder.encode_prompt).

    Ranks may hold different numbers of prompts: those with fewer take part in the last batches with empty ones. `check`
    is called before every batch with the prompts done so far, on all ranks alike, and may raise to end the work.
    `given_up` is asked after every token, on this rank alone: once it is true the texts are cut short and do not count.
    `decoding`: as Evaluation.decoding() gives it.
    """
    texts: list[str] = []
    criteria = StoppingCriteriaList([_CancelledCriteria(given_up)])
    (rounds,) = ranks.max([float(-(-len(prompts) // batch))])
    for n in range(int(rounds)):
        check(n * batch)
        rows = list(prompts[n * batch : (n + 1) * batch])
        inputs = encoder.batch(rows or [encoder.empty()], left=True)
        ids = engine.generate(inputs, max_new_tokens, stopping_criteria=criteria, **decoding)
        if rows:  # tokenizers return one empty string for an empty batch
            texts += encoder.family.tokenizer.batch_decode(ids[: len(rows)], skip_special_tokens=True)
    return [text.strip() for text in texts]


def likelihoods(
    engine: Engine,
    encoder: StudyEncoder,
    prompts: Sequence[EncodedStudy],
    batch: int,
    answers: Sequence[Sequence[str]],
    ranks: Ranks,
) -> list[list[float]]:
    """Return for each of this rank's prompts the probability of each answer's first token, normalised over the answers.
    An answer may have several spellings, whose probabilities are summed. Ranks may hold different numbers of prompts.
    """
    tokens = [sorted({_first_token(encoder, spelling) for spelling in spellings}) for spellings in answers]
    assert len({token for spellings in tokens for token in spellings}) == sum(map(len, tokens)), "answers begin alike"
    result: list[list[float]] = []
    (rounds,) = ranks.max([float(-(-len(prompts) // batch))])
    for n in range(int(rounds)):
        rows = list(prompts[n * batch : (n + 1) * batch])
        logits = engine.next_logits(encoder.batch(rows or [encoder.empty()], left=True))[: len(rows)]
        each = torch.stack([logits[:, spellings].logsumexp(1) for spellings in tokens], 1)
        result += each.softmax(1).tolist()
    return result


def _first_token(encoder: StudyEncoder, text: str) -> int:
    return int(encoder.family.tokenizer(text, add_special_tokens=False)["input_ids"][0])


class _CancelledCriteria(StoppingCriteria):
    """Ends a batch at the next token once its texts are not needed any more."""

    def __init__(self, given_up: Callable[[], bool]) -> None:
        self.given_up = given_up

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.given_up(), dtype=torch.bool, device=input_ids.device)

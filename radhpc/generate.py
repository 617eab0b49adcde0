"""Studies to texts: greedy decoding in batches, on all ranks together."""

from collections.abc import Callable, Sequence

from radhpc.collate import Encoded, Encoder
from radhpc.dist import Ranks
from radhpc.engine import Engine


def generate(
    engine: Engine,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    batch: int,
    max_new_tokens: int,
    ranks: Ranks,
    check: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """The generated text of each of this rank's prompts (see Encoder.encode_prompt).

    Ranks may hold different numbers of prompts: those with fewer take part in the last batches with empty ones. `check`
    is called before every batch with the prompts done so far, on all ranks alike, and may raise to end the work.
    """
    texts: list[str] = []
    (rounds,) = ranks.max([float(-(-len(prompts) // batch))])
    for n in range(int(rounds)):
        check(n * batch)
        rows = list(prompts[n * batch : (n + 1) * batch])
        ids = engine.generate(encoder.batch(rows or [encoder.empty()], left=True), max_new_tokens)
        if rows:  # of no rows at all a tokenizer makes one empty text
            texts += encoder.family.tokenizer.batch_decode(ids[: len(rows)], skip_special_tokens=True)
    return [text.strip() for text in texts]

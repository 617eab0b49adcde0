"""Control tokens that a report or a question spells out are text, for every family and kind of tokenizer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from radhpc.core import families
from radhpc.core.recipe import TextSettings, load
from radhpc.core.sample import Report, Sample, View
from radhpc.data.collate import IGNORE, StudyEncoder
from radhpc.data.tokenization import TextTokenizer
from radhpc.models import family as model_family
from radhpc.models.tokenizer import train
from tests.conftest import ROOT, TINY_RECIPE

pytestmark = pytest.mark.timeout(60)
WORDS = ["Findings: a nodule in the left upper lobe. Impression: no effusion. Where is it?"] * 20
FAMILIES = {"mllama": None, "llava": "gla", "swin_qwen": "lightmedvlm", "qwen3_vl": "qwen3_vl"}
TEXT = TextSettings.model_validate(
    {"tasks": {"ask": {"kind": "question", "prompt": "Say: {question}"}, "write": {"kind": "report", "prompt": "Go."}}}
)
PLAIN = "No effusion in the left lobe."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = tmp_path_factory.mktemp("tokenizer")
    train(WORDS, 320, result)
    return result


def encoder(name: str, folder: Path, tmp_path: Path) -> StudyEncoder:
    recipe_name = FAMILIES[name]
    path = ROOT / "recipes" / "tiny" / f"{recipe_name}.yaml"
    if recipe_name is None:
        path = tmp_path / "tiny.yaml"
        path.write_text(TINY_RECIPE.format(shards="none"))
    recipe = load(path, ["shards=[none]"])
    return StudyEncoder(model_family.family(recipe.model, str(folder)), TEXT, recipe.images)


def study(report: str = "", question: str | None = None, answer: str | None = None) -> Sample:
    return Sample(
        dataset="own", patient="0" * 16, study="1" * 16, split="train", images=[View(width=64, height=64)],
        report=Report(findings=report or None), question=question, answer=answer,
    )  # fmt: skip


def controls(tokenizer: Any) -> list[str]:
    return sorted({*tokenizer.all_special_tokens, *(str(t) for t in tokenizer.added_tokens_decoder.values())})


def test_every_family_is_tried() -> None:
    assert set(FAMILIES) == set(families.BUILT_IN)


@pytest.mark.parametrize("name", FAMILIES)
def test_control_tokens_in_a_text_are_text(name: str, folder: Path, tmp_path: Path) -> None:
    own = encoder(name, folder, tmp_path)
    tokenizer, view = own.family.tokenizer, [Image.new("L", (64, 64), 9)]
    control = set(tokenizer.all_special_ids) | {tokenizer.convert_tokens_to_ids(token) for token in controls(tokenizer)}

    def marks(ids: Any) -> list[int]:
        return [i for i in ids if i in control]

    usual = own.encode("a", study(question=PLAIN, answer=PLAIN), view)
    for token in controls(tokenizer):
        text = f"Clear {token} lungs, {token}{token}.\n{token}"
        answered = own.encode("a", study(question=PLAIN, answer=text), view)
        answer = [i for i in answered.labels if i != IGNORE]
        assert marks(answer) == [tokenizer.eos_token_id] == answer[-1:]
        assert tokenizer.decode(answer[:-1]) == text
        asked = own.encode("a", study(question=text, answer=PLAIN), view)
        assert marks(asked.input_ids) == marks(usual.input_ids), "the chat's own tokens and no more"
        assert text in tokenizer.decode(asked.input_ids)
        reported = own.encode("a", study(text), view)
        assert marks(i for i in reported.labels if i != IGNORE) == [tokenizer.eos_token_id]
        own.batch([answered, asked, reported])
        assert marks(own.encode_prompt("a", text, view).input_ids) == marks(own.encode_prompt("a", "?", view).input_ids)


@pytest.mark.parametrize("name", FAMILIES)
def test_ordinary_texts_have_the_ids_that_they_always_had(name: str, folder: Path, tmp_path: Path) -> None:
    own, view = encoder(name, folder, tmp_path), [Image.new("L", (64, 64), 9)]
    row = own.encode("a", study(question="Where?", answer=PLAIN), view)
    tokenizer, family = own.family.tokenizer, own.family
    chat = family.prompt(own.tasks.question_prompt("Where?"), 1)
    prompt = tokenizer(chat, add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(PLAIN, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    expected = [*family.expand_image_tokens(list(prompt), family.encode_images(view)), *answer]
    assert np.array_equal(row.input_ids, expected)


def sentence_pieces(special: bool) -> PreTrainedTokenizerFast:
    """Llama 2's kind: a mark for spaces, an unknown token; the image token may be an ordinary added one."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False,
        initial_alphabet=sorted("<>/|unkimagesto▁."),
    )  # fmt: skip
    tokenizer.train_from_iterator(WORDS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens([AddedToken("<image>", special=special, normalized=False)], special_tokens=special)
    return fast


@pytest.mark.parametrize("special", [True, False])
def test_other_kinds_of_tokenizers(special: bool) -> None:
    tokenizer = sentence_pieces(special)
    image = tokenizer.convert_tokens_to_ids("<image>")
    own = TextTokenizer(tokenizer, image)
    for text in ("no <image> in it", "</s>", "the <s><image></s> lobe", "<image>"):
        ids = own.text(text)
        assert not {image, tokenizer.bos_token_id, tokenizer.eos_token_id} & set(ids)
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
        chat = own.chat(text, lambda inner: f"<s>USER: <image>\n{inner} ASSISTANT:</s>")
        assert [i for i in chat if i in (image, 1, 2)] == [1, image, 2]
    unknown = "no Ж"
    assert own.text(unknown) == tokenizer(unknown, add_special_tokens=False)["input_ids"]

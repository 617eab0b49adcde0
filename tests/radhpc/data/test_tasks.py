"""Tasks: what a study is asked is a function of study and epoch; exactly the answer is supervised."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.recipe import FindingsSettings, Recipe, TextSettings, load
from radhpc.core.sample import Report, Sample, View
from radhpc.data.collate import IGNORE, UNKNOWN, StudyEncoder
from radhpc.data.source import BadSample, RawSample, Source
from radhpc.data.tasks import AnswerNotAllowed, Tasks, check
from radhpc.models.family import ModelFamily
from tests.conftest import TINY_RECIPE, tiny_family

MIXTURE: dict[str, Any] = {
    "report": {"kind": "report", "prompt": "Write {sections} in {language}.", "weight": 2},
    "impression": {"kind": "report", "prompt": "Impression?", "sections": ["impression"]},
    "present": {"kind": "findings", "prompt": "Which of {findings}?", "nothing": "none of them"},
    "rare": {"kind": "finding", "prompt": "Is there {finding}? {answers}.", "findings": ["Fracture", "Edema"]},
    "closed": {"kind": "question", "prompt": "{question} Answer {answers}.", "answers": ["yes", "no"]},
    "open": {"kind": "question", "prompt": "{question}"},
}


def study(number: int = 0, **given: Any) -> Sample:
    plain: dict[str, Any] = {
        "dataset": "d", "patient": "0" * 16, "study": f"{number:016x}", "split": "train",
        "images": (View(width=9, height=9),),
    }  # fmt: skip
    return Sample(**(plain | given))


def tasks(mixture: dict[str, Any] = MIXTURE, **findings: Any) -> Tasks:
    return Tasks(TextSettings(tasks=mixture), FindingsSettings(**findings), seed=0)


LABELLED = {
    "report": Report(findings="Clear lungs.", impression="Normal.", other="Cough."),
    "labels": {"chexpert": {"Fracture": 1, "Edema": 0, "Pneumonia": -1, "Cardiomegaly": 1, "Consolidation": None}},
}


def test_the_task_is_a_function_of_study_and_epoch_by_weight() -> None:
    some = tasks()
    asked = [some.draw(study(number, **LABELLED), epoch) for number in range(400) for epoch in range(2)]
    assert asked == [tasks().draw(study(number, **LABELLED), epoch) for number in range(400) for epoch in range(2)]
    counts = Counter(one.task for one in asked if one)
    assert counts.keys() == {"report", "impression", "present", "rare"}
    assert 0.34 < counts["report"] / 800 < 0.46  # two of five
    assert any(asked[n] != asked[n + 1] for n in range(0, 800, 2)), "every epoch asks the same"
    assert some.draw(study()) is None


def test_each_kind_says_what_it_shall() -> None:
    some, known = tasks(), study(**LABELLED)
    report = tasks({"report": MIXTURE["report"]}).draw(study(**(LABELLED | {"language": "es"})))
    assert report == (
        "report",
        "Write Findings and Impression in Spanish.",
        "Findings: Clear lungs. Impression: Normal.",
    )
    assert "Cough" not in report.answer
    present = tasks({"present": MIXTURE["present"]}).draw(known)
    assert present is not None
    assert present.answer == "Cardiomegaly, Fracture"
    as_present = tasks({"present": MIXTURE["present"]}, uncertain="present").draw(known)
    assert as_present is not None
    assert as_present.answer == "Cardiomegaly, Pneumonia, Fracture"
    nothing = study(labels={"chexpert": {"Edema": 0}})
    assert tasks({"present": MIXTURE["present"]}).draw(nothing)[2] == "none of them"  # type: ignore[index]
    rare = tasks({"rare": MIXTURE["rare"]})
    asked = Counter(rare.draw(study(number, **LABELLED))[1:] for number in range(300))  # type: ignore[index]
    assert asked.keys() == {("Is there Fracture? yes or no.", "yes"), ("Is there Edema? yes or no.", "no")}
    assert 110 < asked["Is there Fracture? yes or no.", "yes"] < 190  # as many of what is present as of what is not
    assert some.default(known) == some.draw(known, 0) or some.default(known)[0] == "report"  # type: ignore[index]


def test_closed_questions_have_closed_answers() -> None:
    some = tasks()
    closed = some.draw(study(question="Is it big?", answer="Yes."))
    assert closed == ("closed", "Is it big? Answer yes or no.", "yes")
    assert some.draw(study(question="Where?", answer="Left")) == ("open", "Where?", "Left")
    alone = tasks({"closed": MIXTURE["closed"]})
    with pytest.raises(AnswerNotAllowed, match="none of yes, no"):
        alone.draw(study(question="Is it big?", answer="maybe"))
    assert alone.draw(study(question="Where?", answer="Left", labels={"answer type": {"closed": 0}})) is None


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ({"kind": "report", "prompt": "In {langage}"}, "unknown placeholder {langage}; allowed are language, sections"),
        ({"kind": "report", "prompt": "x", "answers": ["a", "b"]}, "'answers' goes with kind question or finding"),
        ({"kind": "finding", "prompt": "Is it there?"}, "{finding} is missing"),
        ({"kind": "finding", "prompt": "{finding}?", "answers": ["a", "b", "c"]}, "two are wanted"),
        ({"kind": "report", "prompt": "{"}, "a brace that is meant as one is written twice"),
    ],
)
def test_a_task_that_cannot_be_is_refused(task: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")):
        TextSettings(tasks={"one": task})


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Recipe:
    path = tmp_path_factory.mktemp("tasks") / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=phantom_shards))
    return load(path)


@pytest.fixture(scope="module")
def kind(tmp_path_factory: pytest.TempPathFactory, recipe: Recipe) -> ModelFamily:
    return tiny_family(recipe, tmp_path_factory.mktemp("tokenizer") / "tokenizer")


def test_exactly_the_answer_is_supervised(kind: ModelFamily, recipe: Recipe) -> None:
    """Of each kind of task: what is learnt decodes to the answer and the end token, what is not holds the image."""
    mixture = MIXTURE | {"rare": MIXTURE["rare"] | {"findings": ["Cardiomegaly", "Pleural Effusion"]}}
    encoder = StudyEncoder(kind, TextSettings(tasks=mixture), recipe.images, recipe.findings, seed=0, labelled=True)
    source, seen = Source(recipe.shards, "train"), set()
    for raw in (raw._replace(epoch=epoch) for epoch in range(4) for raw in source.read_raw(source_numbers(source))):
        row = encoder.read(raw)
        sample = source_sample(raw)
        asked = encoder.tasks.draw(sample, raw.epoch)
        assert asked is not None
        seen.add(asked.task)
        learnt = row.labels != IGNORE
        assert kind.tokenizer.decode(row.labels[learnt]) == asked.answer + kind.tokenizer.eos_token
        prompt = kind.tokenizer.decode(row.input_ids[~learnt])
        assert prompt.count("<|image|>") == len(sample.images)
        assert asked.prompt in prompt
        assert asked.answer not in prompt or asked.answer in asked.prompt
        assert row.findings is not None
        told = dict(zip(recipe.findings.names, row.findings.tolist(), strict=True))
        assert all(told[name] == value for name, value in sample.labels["chexpert"].items() if value in (0, 1))
        assert all(
            value == UNKNOWN for name, value in told.items() if sample.labels["chexpert"].get(name) in (None, -1)
        )
    assert seen == {"report", "impression", "present", "rare"}
    batch = encoder.batch([row, encoder.empty()])
    assert (batch["labels"][1] == IGNORE).all()
    assert (batch["findings"][1] == UNKNOWN).all()
    assert ((batch["labels"] == IGNORE) | (batch["attention_mask"] == 1)).all()
    assert "findings" not in encoder.batch([row], left=True)


@pytest.mark.parametrize("left", [False, True])
def test_padding_is_masked_and_nothing_else_is(kind: ModelFamily, recipe: Recipe, left: bool) -> None:
    """Rows of three lengths: attention sees all tokens of each row, in their order, and no padding on either side."""
    encoder, view = StudyEncoder(kind, recipe.text, recipe.images), Image.new("L", (56, 56), 99)
    questions = ("Is it big?", "Is it big? " * 3, "Is it big? " * 6)
    rows = [encoder.encode_prompt(question, question, [view]) for question in questions]
    lengths = [row.length for row in rows]
    assert lengths[0] < lengths[1] < lengths[2]
    batch = encoder.batch(rows, left=left)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, ids, mask in zip(rows, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        assert ids[mask].tolist() == row.input_ids.tolist()
        assert (ids[~mask] == kind.tokenizer.pad_token_id).all()
        assert bool(mask[-1 if left else 0]), "padding is on the other side"


def source_numbers(source: Source) -> Any:
    import numpy as np

    return np.arange(len(source))


def source_sample(raw: RawSample) -> Sample:
    from radhpc.data.source import decode_study as parsed

    return parsed(raw)[1]


def test_bad_input_is_one_line(kind: ModelFamily, recipe: Recipe) -> None:
    from dataclasses import dataclass

    text = recipe.text.model_copy(update={"max_tokens": 8})
    with pytest.raises(UserError, match=r"text.prompt: a prompt of \d+ tokens leaves no room .*max_tokens 8"):
        StudyEncoder(kind, text)
    encoder = StudyEncoder(kind, TextSettings(tasks={"closed": MIXTURE["closed"]}, max_tokens=60))

    @dataclass
    class Shard:
        sample: Sample

        def raw(self) -> RawSample:
            import io

            picture = io.BytesIO()
            Image.new("L", (9, 9)).save(picture, "PNG")
            described = self.sample.model_dump_json().encode()
            return RawSample("d-1", [("json", memoryview(described)), ("0.png", memoryview(picture.getvalue()))])

    words = len(kind.tokenizer("yes", add_special_tokens=False)["input_ids"])
    with pytest.raises(BadSample, match="the answer to a closed question is none of yes, no"):
        encoder.read(Shard(study(question="Is it big?", answer="maybe")).raw())
    with pytest.raises(BadSample, match="leaves no room for an answer in text.max_tokens 60"):
        encoder.read(Shard(study(question="Is it big? " * 40, answer="yes")).raw())
    assert encoder.read(Shard(study(question="Is it big?", answer="yes")).raw()).supervised == words + 1


def test_a_stage_that_would_learn_nothing_is_refused(recipe: Recipe, phantom_shards: Path) -> None:
    source = Source(recipe.shards, "train")
    check(recipe, recipe.stages[0], source)
    stage = recipe.stages[0].model_copy(update={"text": TextSettings(sections=("other",))})
    with pytest.raises(
        UserError, match=r"none of \d+ studies has what text.sections other would learn; they have findings"
    ):
        check(recipe, stage, source)

"""Evaluations: kept batch by batch through preemptions and other numbers of ranks, scored, compared, refused."""

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from radhpc import worker
from radhpc.core.files import read_json, read_lines
from radhpc.core.recipe import load
from radhpc.core.run_folder import RunFolder
from radhpc.distributed.ranks import Ranks
from radhpc.engine.fsdp import Engine
from radhpc.evaluation import evaluate
from radhpc.evaluation.generation import generate, likelihoods
from radhpc.training.context import RunContext, open_context
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.engine_builder import restore_engine
from radhpc.training.sources import open_source
from slurm import evaluation
from tests.conftest import TINY_MODEL

pytestmark = pytest.mark.timeout(600)

RECIPE = f"""
name: tiny
shards: [SHARDS]
model:
{TINY_MODEL}
stages:
  - {{name: scratch, steps: 30, batch: 8, train: ['.*'], optimizer: {{learning_rate: 4.0e-3}}}}
evaluation: {{samples: 4, batch: 2, max_new_tokens: 24, conventions: [r2gen_iu]}}
"""
ONE = "conventions=[r2gen_iu]"  # the others take Java, and seconds


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> RunFolder:
    """Thirty steps in this process."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "tiny.yaml").write_text(RECIPE.replace("SHARDS", str(phantom_shards)))
    made = RunFolder.create(folder / "run", load(folder / "tiny.yaml"))
    assert worker.run(str(made.path)).state == "finished"
    return made


@pytest.fixture(scope="module")
def restored(run: RunFolder) -> tuple[RunContext, Engine]:
    context = open_context(run, run.recipe(), Ranks())
    return context, restore_engine(context)[0]


def prepared(run: RunFolder, split: str, *overrides: str, **more: Any) -> RunFolder:
    """The job folder of an evaluation of all studies of a split."""
    settings = evaluation.settings_of(run, overrides, None)
    given = {"shards": [], "against": None, "every_convention": False, **more}
    return evaluation.prepare(run, "step-000030", "weights", split, settings=settings, **given)


@pytest.fixture(scope="module")
def whole(run: RunFolder) -> dict[str, Any]:
    """An evaluation that nobody disturbs, of the validation split, with yes and no for each drawn finding."""
    job = prepared(run, "validate", "findings_question=Is there {finding}?", "findings_vocabulary=phantom")
    assert worker.run(str(job.path)).state == "finished"
    folder = job.path.parent
    return {"scores": read_json(folder / "scores.json"), "rows": list(read_lines(folder / "reports.jsonl"))}


def test_the_training_leaves_an_evaluation_of_its_own(run: RunFolder) -> None:
    scores = read_json(run.path / "evaluation/step-000030/scores.json")
    assert scores["samples"] == 4
    assert set(scores["baselines"]) == {"constant", "random", "nearest"}
    assert scores["scores"]["loss"]["value"] > 0
    table = (run.path / "evaluation/step-000030/table.md").read_text()
    assert "| r2gen_iu/bleu_4 |" in table
    assert "chexbert/*: not scored: name in evaluation.scorers.chexbert a folder with chexbert.pth" in table


def test_every_score_says_what_it_is(whole: dict[str, Any]) -> None:
    found = whole["scores"]["scores"]
    for name, score in found.items():
        assert score.keys() >= {"value", "low", "high", "convention"}, name
        assert score["low"] is None or score["low"] - 1e-9 <= score["value"] <= score["high"] + 1e-9, name
    assert {"r2gen_iu/bleu_1", "r2gen_iu/cider", "token_f1", "findings_macro_f1", "auroc/macro"} <= found.keys()
    assert 0 <= found["auroc/macro"]["value"] <= 1
    keys = {"key", "patient", "study", "dataset", "question", "reference", "generated", "labels", "likelihoods"}
    assert all(keys <= row.keys() and "thumbnail" not in row for row in whole["rows"])
    assert len({row["generated"] for row in whole["rows"]} - {""}) > 0, "the model writes nothing"


def test_a_preempted_evaluation_goes_on_on_other_ranks_and_loses_nothing(
    run: RunFolder, whole: dict[str, Any], monkeypatch: pytest.MonkeyPatch, local_profile: Callable[[int], Path],
    launch_json: Callable[..., dict[str, Any]],
) -> None:  # fmt: skip
    """A signal in the third batch; a line that a crash has cut; then two ranks by the command, without those done."""
    for path in (run.path / "evaluation/step-000030-validate").glob("*.json*"):
        path.unlink()
    from radhpc.engine.checkpoint import Checkpoints

    settings = evaluation.settings_of(run, [ONE, "batch=1"], None)
    identity = Checkpoints.of(run.path, run.recipe()).identity("step-000030")
    job = evaluation.prepare(run, "step-000030", identity, "validate", [], settings, None, every_convention=False)
    calls, before = [0], evaluate.generate

    def signalled(*arguments: Any, **options: Any) -> list[str]:
        calls[0] += 1
        if calls[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "generate", signalled)
        outcome = worker.run(str(job.path))
    assert (outcome.state, outcome.cause) == ("interrupted", "SIGTERM")
    file = job.path.parent / "generated/rank-00000.jsonl"
    kept = file.read_bytes()
    assert [len(batch["rows"]) for batch in read_lines(file)] == [1, 1], "of the third batch half a text may be there"
    file.write_bytes(kept + b'{"rows": [{"key": "half')
    result = launch_json("evaluate", run.path, ONE, "batch=1", "--split", "validate", "--on", local_profile(2))
    assert result.keys() >= {"run", "step", "split", "samples", "scores"}
    assert (result["step"], result["split"], result["samples"]) == (30, "validate", len(whole["rows"]))
    assert file.read_bytes().startswith(kept), "what was generated is kept as it is"
    again = sum(len(batch["rows"]) for path in file.parent.glob("rank-*.jsonl") for batch in read_lines(path))
    assert again == len(whole["rows"]), "nothing is generated twice"
    mine = {row["key"]: row["generated"] for row in read_lines(job.path.parent / "reports.jsonl")}
    assert mine == {row["key"]: row["generated"] for row in whole["rows"]}
    for name in ("r2gen_iu/bleu_1", "token_f1", "loss"):
        assert result["scores"][name]["value"] == pytest.approx(whole["scores"]["scores"][name]["value"], rel=1e-5)


def test_a_run_against_itself_differs_by_nothing(run: RunFolder, whole: dict[str, Any]) -> None:
    """And it needs no model: all that is asked has been generated before."""
    job = prepared(run, "validate", "findings_question=Is there {finding}?", "findings_vocabulary=phantom")
    assert worker.run(str(job.path)).state == "finished"
    job = prepared(
        run, "validate", "findings_question=Is there {finding}?", "findings_vocabulary=phantom", against=run.path
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("radhpc.evaluation.job.restore_engine", lambda *_: pytest.fail("the model was loaded"))
        assert worker.run(str(job.path)).state == "finished"
    found = read_json(job.path.parent / "scores.json")["comparison"]
    assert "paired bootstrap by patient" in found["test"]
    assert found["scores"]["r2gen_iu/bleu_1"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0}
    assert "| r2gen_iu/bleu_1 | +0.000 |" in (job.path.parent / "table.md").read_text()


def test_decoding_is_what_the_recipe_says(restored: tuple[RunContext, Engine]) -> None:
    """Beams, sampling and penalties reach transformers; texts do not depend on the batch."""
    context, engine = restored
    encoder = build_encoder(context, 0)
    source = open_source(context, 0, "validate")
    studies = [source.read(n) for n in range(3)]
    prompts = [encoder.encode_prompt(key, None, views) for key, _, views in studies]

    def texts(batch: int, *overrides: str) -> list[str]:
        settings = evaluation.settings_of(context.run, overrides, None)
        return generate(engine, encoder, prompts, batch, 12, context.ranks, **settings.decoding())

    greedy = texts(3)
    assert texts(1) == greedy
    assert texts(2, "cache=static") == greedy
    beams = texts(3, "beams=3", "repetition_penalty=2.0", "length_penalty=2.0")
    inputs = engine.to_device(encoder.batch(prompts[:1], left=True))
    del inputs["labels"]
    ids = engine.model.generate(
        **inputs, max_new_tokens=12, num_beams=3, repetition_penalty=2.0, length_penalty=2.0, do_sample=False
    )
    alone = encoder.family.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert beams[0] == alone
    torch.manual_seed(0)
    sampled = texts(3, "temperature=1.5", "top_p=0.9")
    torch.manual_seed(0)
    assert texts(3, "temperature=1.5", "top_p=0.9") == sampled
    assert sampled != greedy


def test_yes_and_no_share_the_likelihood(restored: tuple[RunContext, Engine]) -> None:
    context, engine = restored
    encoder = build_encoder(context, 0)
    _, _, views = open_source(context, 0, "validate").read(0)
    rows = [encoder.encode_prompt("", question, views) for question in ("Is there cardiomegaly?", "Nodule?")]
    found = likelihoods(engine, encoder, rows, 1, evaluate.YES_NO, context.ranks)
    assert all(sum(shares) == pytest.approx(1) for shares in found)
    together = likelihoods(engine, encoder, rows, 2, evaluate.YES_NO, context.ranks)
    assert [yes for yes, _ in together] == pytest.approx([yes for yes, _ in found], abs=1e-5)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of a data set that asks questions."""
    from shards.build import BuildSettings, build

    folder = tmp_path_factory.mktemp("questions")
    lines = []
    for n in range(8):
        Image.linear_gradient("L").resize((64, 64 + n)).save(folder / f"{n}.png")
        lines.append(
            {"image": f"{n}.png", "patient": str(n), "question": "Is it large?", "answer": "yes", "split": "test"}
        )
    (folder / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = BuildSettings(workers=1, longest_side=56, max_skipped="100%")
    build("image_text", folder / "table.jsonl", str(folder / "shards"), {}, settings, lambda done, total: None)
    return folder / "shards"


def other_splits(out: Path) -> Path:
    """The phantoms of the run under another name, and in other splits: some of those it was trained on are tested."""
    from shards.build import BuildSettings, build

    settings = BuildSettings(workers=1, longest_side=56, ratios=(0.1, 0.1, 0.8))
    options = {"studies": "60", "size": "96", "name": "again", "people": "phantom"}
    build("phantom", None, str(out), options, settings)
    return out


def test_what_cannot_be_evaluated_is_refused_in_one_line(
    run: RunFolder, questions: Path, tmp_path: Path, launch: Callable[..., subprocess.CompletedProcess[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from typer.testing import CliRunner

    from radhpc.cli.main import app
    from radhpc.core.errors import UserError

    def refused(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
        assert isinstance(result.exception, UserError), result.output
        text = str(result.exception)
        assert "\n" not in text
        return text

    assert "allowed are train, validate, test" in refused(run.path, "--split", "tset")
    assert "unknown key 'beam' (did you mean 'beams'?)" in refused(run.path, "beam=2")
    assert "evaluation.scorers.chexbert" in refused(run.path, f"scorers.chexbert={tmp_path}/none")
    assert "no chexbert.pth there" in refused(run.path, f"scorers.chexbert={tmp_path}")
    for name in ("chexbert.pth", "vocab.txt"):
        (tmp_path / name).write_text("other")
    wrong = refused(run.path, f"scorers.chexbert={tmp_path}", "scorers.sha256={chexbert: abcd}")
    assert "weights of sha256" in wrong
    assert "wants abcd" in wrong
    assert "no evaluation of split 'train' there" in refused(run.path, "--split", "train", "--against", run.path)
    fresh = RunFolder.create(tmp_path / "fresh", run.recipe())
    assert "no checkpoint to evaluate" in refused(fresh.path)
    assert "patients who are in another split" in refused(run.path, "--shards", other_splits(tmp_path / "again"))
    text = refused(run.path, ONE, "--shards", questions)
    assert "asks questions, and no study of the stage's training data does" in text
    assert "'temperature' 1 samples one text" in refused(run.path, "beams=2", "temperature=1.0")

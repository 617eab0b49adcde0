"""Reports of training studies that look alike, before the prompt: whose, where, and that a resume finds the same."""

from pathlib import Path

import numpy as np
import pytest

from radhpc import worker
from radhpc.core.errors import UserError
from radhpc.core.recipe import load
from radhpc.core.run_folder import RunFolder
from radhpc.data.collate import IGNORE
from radhpc.data.retrieval import RetrievalIndex, encode_thumbnail
from radhpc.distributed.ranks import Ranks
from radhpc.training.context import RunContext, open_context
from radhpc.training.encoder_builder import build_encoder
from radhpc.training.retrieval_indexes import build_retrieval_indexes, retrieval_index_path
from radhpc.training.sources import open_source
from tests.conftest import TINY_MODEL

pytestmark = pytest.mark.timeout(120)

RECIPE = f"""
name: grounded
shards: [SHARDS]
model:
{TINY_MODEL.replace("max_position_embeddings: 512", "max_position_embeddings: 1024")}
text: {{neighbours: 2, max_tokens: 900}}
stages:
  - {{name: scratch, steps: 1, batch: 2, train: ['.*'], optimizer: {{learning_rate: 1.0e-3}}}}
evaluation: {{samples: 2, batch: 2, max_new_tokens: 2, images: 0, neighbours: 0, conventions: []}}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> RunFolder:
    folder = tmp_path_factory.mktemp("grounded")
    (folder / "tiny.yaml").write_text(RECIPE.replace("SHARDS", str(phantom_shards)))
    made = RunFolder.create(folder / "run", load(folder / "tiny.yaml"))
    assert worker.run(str(made.path)).state == "finished"
    return made


def opened(run: RunFolder) -> RunContext:
    return open_context(run, run.recipe(), Ranks())


def test_each_study_gets_the_nearest_reports_of_other_patients(run: RunFolder) -> None:
    context = opened(run)
    source, encoder = open_source(context, 0, "train"), build_encoder(context, 0)
    tokenizer = encoder.family.tokenizer
    every = [source.read(number) for number in range(len(source))]
    pixels = np.asarray([thumbnail_pixels(views) for _, _, views in every])
    for number in (0, 7, len(source) - 1):
        key, sample, views = every[number]
        row = encoder.read(next(source.read_raw(np.asarray([number]))))
        prompt = tokenizer.decode(row.input_ids[row.labels == IGNORE])
        similar = pixels @ pixels[number]
        others = [n for n in np.argsort(-similar, kind="stable") if every[n][1].patient != sample.patient]
        distances = sorted({round(float(similar[n]), 5) for n in others}, reverse=True)
        given = encoder.neighbour_texts(views, sample.patient)
        assert len(given) == 2
        for text, least in zip(given, (distances[0], distances[1]), strict=True):
            whose = [n for n in others if every[n][1].report.text() == text]
            assert max(similar[n] for n in whose) >= least - 1e-4
            assert f": {text}" in prompt
        assert prompt.index("Similar study 1: ") < prompt.index("Similar study 2: ") < prompt.index("Write the report")
        assert given[0] not in tokenizer.decode(row.input_ids[row.labels != IGNORE]) or given[0] == sample.report.text()
        asked = encoder.encode_prompt(key, None, views, sample)
        assert asked.input_ids.tolist() == row.input_ids[: len(asked.input_ids)].tolist(), "evaluation asks the same"
    assert "Similar study" not in tokenizer.decode(encoder.encode_prompt("", "Is it large?", views).input_ids)
    assert "Similar study" not in tokenizer.decode(encoder.empty().input_ids)


def thumbnail_pixels(views: object) -> "np.typing.NDArray[np.float64]":
    small = np.asarray(views[0].convert("L").resize((16, 16), 4), np.float64).ravel()  # type: ignore[index]
    small -= small.mean()
    return small / np.linalg.norm(small)  # type: ignore[no-any-return]


def test_a_resume_needs_the_same_library(run: RunFolder, tmp_path: Path) -> None:
    (event,) = run.events("neighbours")
    (path,) = (run.path / "neighbours" / "scratch").glob("neighbours-*.npz")
    kept, context = path.read_bytes(), opened(run)
    path.unlink()
    with pytest.raises(UserError, match="missing; without it the model does not get the reports"):
        build_encoder(context, 0)
    build_retrieval_indexes(context)
    assert path.read_bytes() == kept, "it follows from the data alone"
    assert len(run.events("neighbours")) == 1
    library = RetrievalIndex.load(path)
    library.texts[0] += " And more."
    library._save(path)
    with pytest.raises(UserError, match="changed since stage 'scratch' began"):
        build_retrieval_indexes(opened(run))
    path.write_bytes(kept)
    assert event["stage"] == "scratch"


def test_neighbours_of_questions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    with pytest.raises(UserError, match="'neighbours' 2 stand before the prompt of a report: no task"):
        load(tmp_path / "tiny.yaml", ["text.tasks={ask: {kind: question, prompt: '{question}'}}"])


def test_whoever_asks_sees_what_the_model_got(run: RunFolder) -> None:
    from radhpc.serving.inference import DecodingOptions
    from radhpc.serving.pipeline import Pipeline, StudyInput

    context = opened(run)
    pipeline = Pipeline(context, DecodingOptions.of(run.recipe().evaluation))
    _, _, views = open_source(context, 0, "test").read(0)
    (answer,) = pipeline.answer([StudyInput("one", views)])
    assert answer.retrieved_reports == build_encoder(context, 0).neighbour_texts(views)
    assert (
        answer.retrieved_reports[0]
        == RetrievalIndex.load(retrieval_index_path(context, 0)).most_similar(encode_thumbnail(views), 1, "")[0]
    )


def test_the_page_is_told_what_the_model_got(run: RunFolder) -> None:
    from radhpc.serving.demo import Demo
    from radhpc.serving.inference import DecodingOptions
    from radhpc.serving.pipeline import Pipeline

    context = opened(run)
    pipeline = Pipeline(context, DecodingOptions.of(run.recipe().evaluation))
    _, _, views = open_source(context, 0, "test").read(0)
    with Demo(pipeline, lambda data, name: (views[0], None)) as demo:
        told = list(demo.read([{"data": "", "name": "one.png"}], None))
    (given,) = [piece["given"] for piece in told if "given" in piece]
    assert given == build_encoder(context, 0).neighbour_texts(views[:1])
    assert told[-1] == {"end": True}

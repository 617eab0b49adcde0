"""How people meet a trained model: exported, asked, on a page, on the board. One small run, of two lives, for all."""

import http.client
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from radhpc.cli.main import app
from radhpc.cli.models import context_of, image_settings
from radhpc.core.errors import UserError
from radhpc.core.files import read_lines
from radhpc.core.run_folder import RunFolder
from radhpc.training.encoder_builder import build_encoder, build_family
from radhpc.training.engine_builder import restore_engine
from radhpc.training.sources import open_source
from tests.browser import Browser, chromium
from tests.conftest import ROOT, TINY_RECIPE, free_port
from tests.waiting import wait_for

pytestmark = [pytest.mark.heavy, pytest.mark.timeout(300)]


def call(*arguments: object) -> int:
    """launch.py in this process: its exit status. A mistake of the user raises UserError."""
    return app([*map(str, arguments)], standalone_mode=False) or 0


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> tuple[Path, dict[str, Any]]:
    """A finished run of two lives, and what `profile` said of its first."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "tiny.yaml").write_text(TINY_RECIPE.format(shards=phantom_shards))
    (folder / "here.yaml").write_text(
        "cluster: local\ntasks_per_node: 1\nthreads: 1\nminutes: 30\nenvironment: {GLOO_SOCKET_IFNAME: lo}\n"
    )
    run = folder / "run"
    changes = ["stages.scratch.steps=120", "stages.refine.steps=4", "evaluation.samples=6", "checkpoint.every=50"]
    call("train", folder / "tiny.yaml", "--on", folder / "here.yaml", "--run", run, *changes)
    from slurm.monitoring import profiling

    try:  # asked before the first step, so that the rest of the first life is short
        told = profiling.trace(RunFolder(run), steps=2, seconds=200)
    finally:
        call("stop", run)
    wait_for(lambda: RunFolder(run).events("stopped", "interrupted", "finished"))
    job = RunFolder(run).job()
    assert job is not None
    wait_for(lambda: not Path(f"/proc/{job['pid']}").exists() or "Z" in Path(f"/proc/{job['pid']}/stat").read_text())
    call("resume", run, "--watch")
    assert RunFolder(run).events("finished")
    return run, told


@pytest.fixture(scope="module")
def run(traced: tuple[Path, dict[str, Any]]) -> Path:
    return traced[0]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Call a verb with --json and parse its one line."""

    def ask(*arguments: object, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert call(*arguments, "--json") == status
        (line,) = capsys.readouterr().out.splitlines()
        result: dict[str, Any] = json.loads(line)
        return result

    return ask


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, phantom_shards: Path) -> Path:
    """A phantom that no training has seen, as a file."""
    from radhpc.data.source import Source

    _, _, views = Source((str(phantom_shards),), "test").read(0)
    path = tmp_path_factory.mktemp("study") / "phantom.png"
    views[0].save(path)
    return path


@pytest.fixture(scope="module")
def photograph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_sample_images

    path = tmp_path_factory.mktemp("photograph") / "china.jpg"
    Image.fromarray(load_sample_images().images[0]).save(path)
    return path


# The profiler's trace


def test_a_living_job_is_traced(traced: tuple[Path, dict[str, Any]]) -> None:
    import gzip

    run, told = traced
    assert told["last"] == told["first"] + 1
    trace = json.loads(gzip.decompress(Path(told["trace"]).read_bytes()))
    names = {event.get("name") for event in trace["traceEvents"]}
    assert {"aten::addmm", "Optimizer.step#AdamW.step"} <= names
    assert told["operators"][0]["milliseconds"] >= told["operators"][1]["milliseconds"] > 0
    assert not (run / "profile" / "request.json").exists()
    with pytest.raises(UserError, match="no running job to trace"):
        call("profile", run)


# Export


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "whole"])
def test_an_export_needs_no_radhpc(
    run: Path, tmp_path: Path, said: Callable[..., dict[str, Any]], study: Path, merge: bool
) -> None:
    """--check runs the exported example.py in a process that cannot import radhpc, and compares logits."""
    out = tmp_path / "out"
    result = said("export", run, "--out", out, "--check", *(["--merge"] if merge else []))
    assert result["difference"] < 1e-5
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "example.py", "processor_config.json", "tokenizer.json"} <= names
    assert ("model.safetensors" in names, "adapter_model.safetensors" in names) == (merge, not merge)
    card = (out / "README.md").read_text()
    for wanted in ("Not for clinical use", "phantom", "rank 4, alpha 8 (grow)", "token_f1", "learning_rate: 0.001"):
        assert wanted in card, wanted
    assert str(run.parent) not in card, "a path of this site"
    with pytest.raises(UserError, match="there is something already"):
        call("export", run, "--out", out)
    if merge:  # what the weights say is not all: another adapter must be noticed
        from safetensors.torch import load_file, save_file

        from radhpc.serving.export import Exported, check, export

        weights = load_file(out / "model.safetensors")
        name = next(name for name in weights if name.endswith("q_proj.weight") and "language_model" in name)
        save_file(weights | {name: weights[name] * 1.1}, out / "model.safetensors", {"format": "pt"})
        _, probe = export(context_of(run), tmp_path / "again", merge=True)
        with pytest.raises(UserError, match="its logits differ"):
            check(Exported(out, "model", None, 0, 0, "float32"), probe)


def test_an_adapter_on_given_weights_leaves_them_where_they_are(
    run: Path, tmp_path: Path, phantom_shards: Path, said: Callable[..., dict[str, Any]]
) -> None:
    """The usual case: weights of somebody else in a local folder, and an adapter trained on them."""
    from radhpc import worker
    from radhpc.core.recipe import load
    from radhpc.serving.export import export

    weights = tmp_path / "Tiny-Llama-Vision"
    export(context_of(run), weights, merge=True, dtype="bfloat16")
    (tmp_path / "adapt.yaml").write_text(
        f"name: adapt\nshards: ['{phantom_shards}']\nmodel: {{weights: {weights}}}\nstages:\n"
        "  - {name: adapt, steps: 2, batch: 4, lora: {rank: 2, alpha: 4, targets: '.*language_model.*q_proj'},\n"
        "     optimizer: {learning_rate: 1.0e-2}}\nevaluation: {samples: 2, max_new_tokens: 4}\n"
    )
    later = RunFolder.create(tmp_path / "later", load(tmp_path / "adapt.yaml"))
    assert worker.run(str(later.path)).state == "finished"
    result = said("export", later.path, "--out", tmp_path / "adapter", "--check")
    assert (result["kind"], result["base"]) == ("adapter", str(weights))
    assert result["difference"] < 1e-2
    assert not (tmp_path / "adapter" / "base").exists()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == weights.name
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "'Built with Llama' shown" in " ".join(card.split())
    assert str(tmp_path) not in card


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of modules that can be imported; they are gone afterwards."""
    (tmp_path / "source" / "travelling").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text('{"model_type": "llama"}')
    monkeypatch.syspath_prepend(tmp_path / "source")
    yield tmp_path / "source"
    for name in [name for name in sys.modules if name.partition(".")[0] in ("travelling", "whole")]:
        del sys.modules[name]


@pytest.mark.parametrize("package", ["", "travelling."])
def test_a_module_travels_with_its_weights(foreign: Path, tmp_path: Path, package: str) -> None:
    from radhpc.serving.export import copy_modules

    code = "import torch\nAUTO_MAP = {'AutoModel': 'Mine'}\nclass Mine(torch.nn.Module): ...\n"
    if package:
        code += "from .part import SIZE\nfrom . import part\n"
        (foreign / "travelling" / "part.py").write_text("SIZE = 3\n")
    module = f"{package}whole"
    (foreign / f"{module.replace('.', '/')}.py").write_text(code)
    copy_modules([module, *(["travelling.part"] if package else [])], tmp_path / "out")
    assert (tmp_path / "out" / "whole.py").read_text() == code
    assert (tmp_path / "out" / "part.py").exists() == bool(package)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == {"AutoModel": "whole.Mine"}


@pytest.mark.parametrize(
    ("statement", "culprit"),
    [
        ("from radhpc.core.recipe import ModelSettings", "radhpc.core.recipe"),
        ("import os, shards.salt as other", "shards.salt"),
        ("def late():\n    import radhpc", "radhpc"),
        (
            "class Late:\n    def late(self):\n        return [(lambda: __import__) for _ in ()]\n    import slurm",
            "slurm",
        ),
        ("from travelling import part", "travelling"),
        ("from .part import SIZE", "travelling.part"),
        ("from . import part", "travelling.part"),
    ],
)
def test_a_module_that_needs_more_than_is_exported_is_refused(
    foreign: Path, tmp_path: Path, statement: str, culprit: str
) -> None:
    from radhpc.serving.export import copy_modules

    (foreign / "travelling" / "part.py").write_text("SIZE = 3\n")
    (foreign / "travelling" / "clinging.py").write_text(statement + "\n")
    with pytest.raises(AssertionError, match=rf"clinging does not stand alone .* it imports {culprit}$"):
        copy_modules(["travelling.clinging"], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))


def test_weights_without_a_place_in_transformers_are_refused(run: Path, tmp_path: Path) -> None:
    from torch import nn

    from radhpc.serving.export import _check_class

    model = build_family(context_of(run)).build(0)
    _check_class(model, ())
    model.connector = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"2 of the model's tensors, 'connector.bias' first"):
        _check_class(model, ())


# Generate and index


def test_a_study_gets_a_report_and_its_neighbours(
    run: Path, study: Path, photograph: Path, said: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(UserError, match="no index; make one: radhpc index"):
        call("generate", run, "--image", study, "--retrieve", 2)
    assert said("index", run)["studies"] == 50
    result = said("generate", run, "--image", study, "--retrieve", 2)
    assert isinstance(result["text"], str)
    assert result["warnings"] == []
    assert [set(one) for one in result["neighbours"]] == [{"key", "number", "similarity", "text"}] * 2
    assert result["neighbours"][0]["similarity"] >= result["neighbours"][1]["similarity"]
    assert said("generate", run, "--image", study, "--beams", 2)["images"] == [str(study)]
    sampled = [said("generate", run, "--image", study, "--temperature", 1.5, "--seed", n)["text"] for n in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]
    warned = said("generate", run, "--image", photograph)["warnings"]
    assert any("it is in colour" in warning for warning in warned)


def test_a_training_study_is_its_own_nearest(run: Path, phantom_shards: Path) -> None:
    from radhpc.serving.feature_index import FeatureIndex, build, features

    context = context_of(run)
    engine, cursor = restore_engine(context)
    encoder = build_encoder(context, cursor.stage)
    build(context, engine, cursor)
    index = FeatureIndex.load(context, cursor)
    assert index is not None
    key, _, views = open_source(context, cursor.stage, "train").read(7)
    (vector,) = features(engine, encoder, [views])
    (nearest,) = index.nearest(vector, 1)
    assert (nearest.key, nearest.number) == (key, 7)
    assert nearest.similarity > 0.999
    assert index.describe_distance(vector) is None
    assert "times as far" in str(
        index.describe_distance(features(engine, encoder, [[Image.new("L", (56, 56), 255)]])[0])
    )


def test_a_stream_says_what_the_whole_says(
    run: Path, study: Path, said: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = said("generate", run, "--image", study)["text"]
    call("generate", run, "--image", study, "--stream")
    assert capsys.readouterr().out.strip().splitlines()[0].strip() == whole
    with pytest.raises(UserError, match="--stream: goes with --image alone"):
        call("generate", run, "--image", study, "--stream", "--json")


def test_a_folder_is_answered_study_by_study_and_once(
    run: Path, study: Path, tmp_path: Path, said: Callable[..., dict[str, Any]]
) -> None:
    cases, out = tmp_path / "cases", tmp_path / "answers.jsonl"
    (cases / "two views").mkdir(parents=True)
    for path in (cases / "one.png", cases / "two views" / "1.png", cases / "two views" / "2.png"):
        path.write_bytes(study.read_bytes())
    (cases / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    result = said("generate", run, "--folder", cases, "--out", out, status=1)
    assert result["broken"] == 1
    assert sorted(one["name"] for one in result["studies"]) == ["broken.png", "one.png", "two views"]
    assert [line["name"] for line in read_lines(out)] == ["one.png", "two views"]
    assert (out.stat().st_mode & 0o077) == 0
    (cases / "broken.png").unlink()
    with open(out, "a") as file:
        file.write('{"name": "cut by a ki')
    (cases / "three.png").write_bytes(study.read_bytes())
    result = said("generate", run, "--folder", cases, "--out", out)
    assert ([one["name"] for one in result["studies"]], result["told_before"]) == (["three.png"], 2)
    assert [line["name"] for line in read_lines(out)] == ["one.png", "two views", "three.png"]


def test_mistakes_are_named(run: Path, study: Path, tmp_path: Path) -> None:
    for wanted, *arguments in (
        ("give either --image", "generate", run),
        ("no question was learnt", "generate", run, "--image", study, "--question", "Is there an effusion?"),
        ("--top-p 0.9: goes with --temperature", "generate", run, "--image", study, "--top-p", 0.9),
        ("goes with one beam", "generate", run, "--image", study, "--beams", 2, "--temperature", 1),
        ("no image there", "generate", run, "--folder", tmp_path),
        ("--dtype float8", "export", run, "--out", tmp_path / "x", "--dtype", "float8"),
    ):
        with pytest.raises(UserError, match=wanted):
            call(*arguments)


# The page


@contextmanager
def demo(run: Path) -> Iterator[Any]:
    from radhpc.serving.demo import Demo
    from radhpc.serving.inference import DecodingOptions
    from radhpc.serving.pipeline import Pipeline
    from shards import views

    run_dir, target = image_settings(run)
    context = context_of(run_dir.path)
    pipeline = Pipeline(context, DecodingOptions.of(context.recipe.evaluation), neighbours=2)
    with Demo(pipeline, lambda data, name: views.load_view_bytes(data, name, target)) as page:
        thread = threading.Thread(target=page.serve)
        thread.start()
        try:
            yield page
        finally:
            page.stop()
            thread.join()


def test_the_page_reads_a_radiograph(run: Path, study: Path, photograph: Path, tmp_path: Path) -> None:
    chromium()
    call("index", run)
    with demo(run) as page, Browser(tmp_path) as browser:
        browser.open(page.url)
        browser.wait("document.body.dataset.state == 'ready'")
        assert "Research use only" in browser.text()
        assert browser.run("document.getElementById('question').disabled"), "no question was learnt"
        browser.choose("#files", study)
        browser.wait("document.body.dataset.state == 'done'")
        pipeline = page.pipeline
        from radhpc.serving.inference import answers
        from shards.views import load_study

        views, _ = load_study("", [study], image_settings(run)[1])
        (text,) = answers(pipeline.engine, pipeline.encoder, [views], None, pipeline.decoding)
        assert text.split()[-1] in browser.run("document.getElementById('text').textContent")
        assert browser.run("document.querySelectorAll('.neighbour img').length") == 2
        assert browser.run("document.querySelector('#views img').naturalWidth") == 56
        assert browser.run("document.querySelectorAll('.warning').length") == 0
        browser.screenshot(tmp_path / "demo.png")
        assert np.asarray(Image.open(tmp_path / "demo.png").convert("L")).std() > 10
        browser.run("document.body.dataset.state = 'ready'")
        browser.choose("#files", photograph)
        browser.wait("document.body.dataset.state == 'done'")
        assert "it is in colour" in browser.run("document.getElementById('warnings').textContent")
        (tmp_path / "words.png").write_text("no image")
        browser.choose("#files", tmp_path / "words.png")
        browser.wait("document.body.dataset.state == 'failed'")
        assert "neither JPEG, PNG nor DICOM" in browser.run("document.getElementById('text').textContent")
        assert browser.errors == []


def test_the_page_answers_its_own_visitors_alone(run: Path) -> None:
    call("index", run)
    with demo(run) as page:

        def status(method: str, path: str, body: bytes | None = None, **headers: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", page.port)
            connection.putrequest(method, path, skip_host=True)
            for name, value in {"Host": f"127.0.0.1:{page.port}", **headers}.items():
                connection.putheader(name, value)
            if "Content-Length" not in headers:
                connection.putheader("Content-Length", str(len(body or b"")))
            connection.endheaders(body)
            return connection.getresponse().status

        own = f"/{page.token}/"
        assert status("GET", own) == 200
        assert status("GET", "/") == status("GET", "/wrong/") == status("GET", own + "x") == 404
        assert status("GET", own, Host=f"evil.example:{page.port}") == 403
        assert status("POST", own + "read", b"{}", Origin="http://evil.example") == 403
        for wrong in (b"{}", b"[1]", b"\xff", b'{"views":' + b"[" * 100_000, b"[" * 1_000_000, b"9" * 10_000):
            assert status("POST", own + "read", wrong) == 400
        assert status("POST", own + "read", b"{}", **{"Content-Length": "9" * 5000}) == 413
        assert status("POST", "/wrong/read", b"{}") == 404


# The evaluation's page and the board


def test_the_evaluations_page_opens_without_a_network(run: Path, tmp_path: Path) -> None:
    chromium()
    (last,) = (run / "evaluation").glob("step-000133/report.html")
    assert (last.stat().st_mode & 0o077) == 0
    with Browser(tmp_path) as browser:
        browser.open(last.as_uri())
        assert browser.run("document.querySelectorAll('.case').length") == 6
        assert browser.run("[...document.images].every(image => image.naturalWidth == 56)")
        assert browser.run("document.querySelectorAll('.bar').length") > 10
        assert browser.run("document.querySelectorAll('del').length") > 0
        assert "Not for clinical use".lower() in browser.text().lower()
        assert browser.run("performance.getEntriesByType('resource').every(one => !one.name.startsWith('http'))")
        assert browser.errors == []


def test_the_board_shows_stages_restarts_and_groups(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()

    def steps(tag: str) -> list[int]:
        return [point.step for point in board.Scalars(tag)]

    assert steps("train/loss") == list(range(1, 134))
    assert steps("by_stage/scratch") == list(range(1, 121))
    assert steps("by_stage/refine") == list(range(130, 134))
    (restart,) = steps("by_stage/restart")
    lives = {point.step: point.value for point in board.Scalars("train/life")}
    assert (lives[restart - 1], lives[restart]) == (1, 2)
    whole = {point.step: point.value for point in board.Scalars("train/gradient_norm")}
    groups = [tag for tag in board.Tags()["scalars"] if tag.startswith("gradient_norm/")]
    assert any("lora_B" in tag for tag in groups), groups
    squares = dict.fromkeys(whole, 0.0)
    for tag in groups:
        for point in board.Scalars(tag):
            squares[point.step] += point.value**2
    assert all(abs(squares[step] ** 0.5 - whole[step]) < 1e-4 * whole[step] for step in whole)


def test_tensorboard_shows_it(run: Path, tmp_path: Path) -> None:
    """The real page: curves, and the chart of stages and restarts."""
    chromium()
    port = free_port()
    server = subprocess.Popen(
        command("board", run, "--port", port), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert re.fullmatch(rf"http://127\.0\.0\.1:{port}/[\w-]{{20,}}/", address)
        assert "ssh -N -L" in server.stdout.readline()
        wait_for(lambda: listens(port), 60)
        with Browser(tmp_path) as browser:
            browser.open(f"{address}#timeseries")
            wait_for(lambda: "train/loss" in browser.text() or "by_stage" in browser.text(), 60)
            browser.open(f"{address}?x#custom_scalars")
            wait_for(lambda: "loss by stage, restarts marked" in browser.text(), 60)
            browser.screenshot(tmp_path / "board.png")
            assert np.asarray(Image.open(tmp_path / "board.png").convert("L")).std() > 5
        with pytest.raises(UserError, match="something listens there already"):
            call("board", run, "--port", port)
    finally:
        subprocess.run(["kill", *children(server.pid), str(server.pid)], check=False)
        server.wait(20)


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def listens(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0

"""What the tests share: small phantom shards, a recipe of seconds, the command line as a user calls it, and servers.

The servers speak S3 and start when a test first asks for them: `moto`, which is quick and does what AWS documents, and
`ceph`, the gateway that many centres run. A test that takes `any_server` runs on both.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from tests.waiting import wait_for

if TYPE_CHECKING:
    from bench.gateway import Gateway
    from radhpc.core.recipe import Recipe
    from radhpc.models.family import ModelFamily

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for all that the tests start: there are as many of them as cores
ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "real" / "cxr_notes"

# Two blocks of each kind and sixteen patches: small enough that a step takes a few hundredths of a second.
TINY_MODEL = """
  gates: 0.7
  tokenizer: {train_vocabulary: 400}
  config:
    text: {hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1,
           cross_attention_layers: [1], max_position_embeddings: 512,
           rope_parameters: {rope_type: default, rope_theta: 10000.0}}
    vision: {hidden_size: 32, attention_heads: 2, intermediate_size: 64, num_hidden_layers: 2, num_global_layers: 1,
             image_size: 56, patch_size: 14, max_num_tiles: 1, supported_aspect_ratios: [[1, 1]],
             intermediate_layers_indices: [0], vision_output_dim: 64}
"""

TINY_RECIPE = (
    """
name: tiny
shards: ['{shards}']
model:
"""
    + TINY_MODEL.replace("{", "{{").replace("}", "}}")
    + """
stages:
  - {{name: scratch, steps: 6, batch: 6, micro_batch: 2, train: ['.*'], optimizer: {{learning_rate: 1.0e-3}}}}
  - name: adapt
    epochs: 1
    batch: 6
    lora: {{rank: 2, alpha: 4, dropout: 0.1, targets: '.*language_model.*(q|v)_proj'}}
    optimizer: {{learning_rate: 1.0e-3, schedule: linear, groups: [{{match: lora_B, scale: 2.0}}]}}
  - name: refine
    steps: 14
    batch: 6
    lora: {{rank: 4, alpha: 8, targets: '.*language_model.*(q|v)_proj'}}
    adapters: grow
    optimizer: {{learning_rate: 1.0e-3}}
checkpoint: {{every: 4, keep: 2}}
evaluation: {{samples: 4, batch: 2, max_new_tokens: 8, images: 1}}
"""
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with tests of minutes come first, so that the workers who share the suite end together."""
    long = {item.path for item in items if item.get_closest_marker("heavy") or item.get_closest_marker("box")}
    items.sort(key=lambda item: (item.path in long, item.path), reverse=True)  # within a file it stays as it was


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty phantom studies in several shards."""
    from shards.build import BuildSettings, build

    out = tmp_path_factory.mktemp("phantom") / "shards"
    settings = BuildSettings(workers=1, longest_side=56, shard_samples=16)
    build("phantom", None, str(out), {"studies": "60", "size": "96"}, settings, lambda done, total: None)
    return out


def tiny_family(recipe: "Recipe", folder: Path) -> "ModelFamily":
    """The model family of a recipe like TINY_RECIPE, with a tokenizer that is trained on its reports into `folder`."""
    from radhpc.data.source import Source
    from radhpc.models.family import family
    from radhpc.models.tokenizer import train

    train((sample.report.text() for sample in Source(recipe.shards, "train").samples()), 400, folder)
    return family(recipe.model, str(folder))


@pytest.fixture
def recipe_file(tmp_path: Path, phantom_shards: Path) -> Path:
    """A recipe of three stages over these shards."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_RECIPE.format(shards=phantom_shards))
    return path


@pytest.fixture
def launch() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Call launch.py as a user does; `status` is the wanted exit status."""

    def call(*arguments: object, status: int = 0, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, ROOT / "launch.py", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == status, f"{arguments}\n{done.stdout}\n{done.stderr}"
        return done

    return call


@pytest.fixture
def launch_json(launch: Callable[..., subprocess.CompletedProcess[str]]) -> Callable[..., dict[str, Any]]:
    """Call launch.py with --json and parse the last line; nothing else may stand on standard output."""

    def call(*arguments: object, **options: Any) -> dict[str, Any]:
        lines = launch(*arguments, "--json", **options).stdout.splitlines()
        assert len(lines) == 1, lines
        result: dict[str, Any] = json.loads(lines[0])
        return result

    return call


@pytest.fixture
def local_profile(tmp_path: Path) -> Callable[[int], Path]:
    """A profile that starts so many ranks on this machine."""

    def write(ranks: int) -> Path:
        path = tmp_path / f"local{ranks}.yaml"
        path.write_text(
            f"cluster: local\ntasks_per_node: {ranks}\nthreads: 1\nminutes: 30\n"
            "environment: {GLOO_SOCKET_IFNAME: lo}\n"
        )
        return path

    return write


@pytest.fixture(scope="session")
def real_notes() -> Path:
    """Real radiographs with notes, where they lie beside the project; they are never part of it."""
    if not REAL.exists():
        assert os.environ.get("CI") != "true", f"{REAL} is missing under CI"
        pytest.skip(f"no real radiographs at {REAL}")
    return REAL


class Server(Protocol):
    """A server that speaks S3: how it is reached, and a way to make a bucket, which returns its URL."""

    environment: dict[str, str]
    port: int

    def bucket(self, name: str) -> str: ...


class Moto:
    """moto's server in a process of its own; it takes any key and looks at no signature."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.environment = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }

    def bucket(self, name: str) -> str:
        import boto3  # type: ignore[import-untyped]

        client = boto3.client(
            "s3",
            endpoint_url=self.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id="key",
            aws_secret_access_key="secret",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)  # making one's own again is no error here
        return f"s3://{name}"


def free_port() -> int:
    from slurm.box_files import free_ports

    return free_ports("127.0.0.1", 1)[0]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def moto_server() -> Iterator[Moto]:
    """A server that is up in a second."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: is_listening(port) or server.poll() is not None, 60)
        assert server.poll() is None, "the object store did not start"
        yield Moto(port)
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="session")
def moto() -> Iterator[Moto]:
    with moto_server() as server:
        yield server


@pytest.fixture(scope="session")
def ceph_installed() -> None:
    """Skip what needs Ceph where there is none, but never in CI."""
    from bench.gateway import missing_daemons

    if missing := missing_daemons():
        reason = f"CEPH IS NOT INSTALLED (no {', '.join(missing)}): its tests say nothing; see `make ceph`"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@pytest.fixture(scope="session")
def ceph(ceph_installed: None, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Gateway]":
    """A real Ceph S3 gateway, up in ten seconds, for all the tests that use it."""
    from bench.gateway import Gateway

    with Gateway(tmp_path_factory.mktemp("ceph") / "gateway") as gateway:
        yield gateway


@pytest.fixture(params=["moto", pytest.param("ceph", marks=pytest.mark.ceph)])
def any_server(request: pytest.FixtureRequest) -> Server:
    """Each server in turn."""
    server: Server = request.getfixturevalue(request.param)
    return server


@pytest.fixture(scope="session")
def s3_port(moto: Moto) -> int:
    """The port of moto's server, which has a bucket called 'hospital'."""
    moto.bucket("hospital")
    return moto.port


@pytest.fixture
def s3(s3_port: int, moto: Moto, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A URL in moto's bucket, which nobody else uses; the environment says how to reach it."""
    reach(monkeypatch, moto.environment)
    return f"s3://hospital/{tmp_path.name}"


def reach(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    """Let this environment alone say how an object store is reached."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

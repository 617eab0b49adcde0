"""What the tests share: small phantom shards, a recipe of seconds, and the command line as a user calls it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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


@pytest.fixture(scope="session")
def phantom_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty phantom studies in several shards."""
    from shards.build import Settings, build

    out = tmp_path_factory.mktemp("phantom") / "shards"
    settings = Settings(workers=1, longest_side=56, shard_samples=16)
    build("phantom", None, str(out), {"studies": "60", "size": "96"}, settings, lambda done, total: None)
    return out


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

"""The data verbs as a user calls them."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.shards.helpers import notes

pytestmark = pytest.mark.timeout(180)
Launch = Callable[..., subprocess.CompletedProcess[str]]


def test_build_verify_repair_balance(
    launch: Launch, launch_json: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    raw, out = notes(tmp_path / "raw", 40), tmp_path / "out"
    made = launch_json("build", "image_text", "--raw", raw, "--out", out, "--shard-samples", 8, "--balance", "--cap", 4)
    assert (made["url"], made["samples"], made["skipped"]) == (str(out), 40, [])
    assert made["balanced"]["url"] == f"{out}#balanced"
    assert {"card.md", "contact_sheet.png", "balanced.png"} <= {path.name for path in out.iterdir()}
    assert launch_json("verify", out)["ok"]
    assert launch_json("verify", f"{out}#balanced")["ok"]
    with (out / "train-000000.tar").open("r+b") as file:
        file.seek(2000)
        file.write(b"?")
    found = launch_json("verify", out, status=1)
    assert not found["ok"]
    assert {fault["shard"] for fault in found["faults"]} == {"train-000000.tar"}
    assert "--raw is missing" in launch("verify", out, "--repair", status=2).stderr
    assert launch_json("verify", out, "--repair", "--raw", raw)["ok"]


def test_sixteen_bits_are_built_and_verified(launch_json: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    raw = notes(tmp_path / "raw", 12)
    for kind in ("png16", "jxl16"):
        assert (
            launch_json("build", "image_text", "--raw", raw, "--out", tmp_path / kind, "--format", kind)["samples"]
            == 12
        )
        assert launch_json("verify", tmp_path / kind)["ok"]


def test_mistakes_get_one_line(launch: Launch, tmp_path: Path) -> None:
    def refused(*arguments: object) -> str:
        done = launch("build", *arguments, status=2)
        (line,) = [line for line in done.stderr.splitlines() if line.strip()]
        return line

    out = ("--out", tmp_path / "out")
    assert "--format gif: allowed are jpeg, png16, jxl16" in refused("phantom", *out, "--format", "gif")
    assert "allowed are drop, report" in refused("phantom", *out, "--duplicates", "keep")
    assert "no such file or folder" in refused("padchest", *out, "--raw", tmp_path / "none")
    assert "no such profile" in refused("phantom", *out, "--on", "nowhere")
    assert "option 'studeis' is unknown (did you mean 'studies'?)" in refused("phantom", *out, "studeis=3")
    assert not (tmp_path / "out").exists()
    told = launch("build", "padchest", status=2).stderr
    assert "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv" in told
    assert "grounded" in told

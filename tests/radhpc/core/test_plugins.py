"""A package of somebody else's brings a model family and a reader, and a run keeps its version."""

from collections.abc import Callable
from pathlib import Path

import pytest

from radhpc.core import environment, families, plugins
from radhpc.core.errors import UserError
from radhpc.core.recipe import ModelSettings
from shards.datasets import registry
from shards.source import open_source

ENTRY_POINTS = """
[radhpc.families]
xray = xray_plugin.family:ENTRY
[radhpc.datasets]
xray_archive = xray_plugin.archive
"""
MODULES = {
    "__init__": "",
    "family": """
from radhpc.core.families import Component, FamilyEntry
ENTRY = FamilyEntry("xray_plugin.model:XrayFamily", {"model": Component(("xray",), "somebody/xray")})
""",
    "archive": "from shards.datasets.phantom import OPTIONS, SYNTHETIC, read",
    "broken": "import a_package_that_nobody_has",
}

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put a distribution on sys.path, as pip would: a package and its .dist-info."""

    def put(name: str = "xray_plugin", entry_points: str = ENTRY_POINTS, version: str = "1.2") -> None:
        folder = tmp_path / name
        package, info = folder / name, folder / f"{name}-{version}.dist-info"
        package.mkdir(parents=True)
        info.mkdir()
        for module, text in MODULES.items():
            (package / f"{module}.py").write_text(text)
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(folder)

    return put


def test_a_family_and_a_reader_are_found_and_loaded_by_name(install: Install) -> None:
    assert "xray" not in families.names()
    install()
    assert "xray" in families.names()
    assert families.entry("xray").components["model"].hub == "somebody/xray"
    assert ModelSettings.model_validate({"family": "xray", "weights": "/weights"}).family == "xray"
    assert "xray_archive" in registry.names()
    studies = open_source("xray_archive", {"studies": "300"}).reader.read
    assert studies.__module__ == "shards.datasets.phantom"


@pytest.mark.parametrize("value", ["xray_plugin.family:Nothing", "xray_plugin.model:XrayFamily", "not a module"])
def test_an_entry_without_its_class_is_refused_in_one_line(
    install: Install, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    from radhpc.models.family import family_class

    install()
    entry = families.FamilyEntry(value, families.entry("xray").components)
    monkeypatch.setattr(families, "entry", lambda name: entry)
    with pytest.raises(UserError, match=rf"^model.family: xray: no class {value} \(.*\); allowed is MODULE:CLASS$"):
        family_class("xray")


def test_its_version_stands_in_the_environment_of_a_run(install: Install) -> None:
    before = environment.versions()
    assert "xray-plugin" not in before["libraries"]
    install()
    now = environment.versions()
    assert now["libraries"]["xray-plugin"] == "1.2"
    assert environment.differences(before, now) == {"xray-plugin": [None, "1.2"]}


def test_a_name_that_is_announced_twice_is_refused_in_one_line(install: Install) -> None:
    install()
    install("other_plugin", "[radhpc.families]\nxray = other_plugin.family:ENTRY\n")
    with pytest.raises(UserError, match=r"^radhpc.families: 'xray' is announced twice, by \S+ and by \S+$"):
        families.names()
    with pytest.raises(ValueError, match="'xray' is announced twice"):
        ModelSettings.model_validate({"family": "llava", "weights": "/weights"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("xray_plugin.broken", r"cannot be imported: No module named 'a_package_that_nobody_has'"),
        ("xray_plugin.family:MISSING", r"cannot be imported: module .* has no attribute 'MISSING'"),
        ("xray_plugin.family:Component", r"is type; allowed is a FamilyEntry"),
    ],
)
def test_a_broken_family_is_one_line(install: Install, value: str, message: str) -> None:
    install(entry_points=f"[radhpc.families]\nxray = {value}\n")
    with pytest.raises(UserError, match=rf"^plugin 'xray' \({value}\) {message}$"):
        families.entry("xray")


def test_a_broken_reader_is_one_line(install: Install) -> None:
    install(entry_points="[radhpc.datasets]\nxray_archive = xray_plugin.family\n")
    with pytest.raises(UserError, match=r"^plugin 'xray_archive' \(xray_plugin.family\) has no OPTIONS"):
        registry.reader("xray_archive")


def test_a_plugin_cannot_take_the_name_of_a_built_in(install: Install) -> None:
    install(entry_points="[radhpc.families]\nllava = xray_plugin.family:ENTRY\n")
    assert families.entry("llava") is families.BUILT_IN["llava"]


def test_the_entry_points_have_the_documented_names() -> None:
    assert (plugins.FAMILIES, plugins.DATASETS) == ("radhpc.families", "radhpc.datasets")

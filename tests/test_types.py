"""Types are strict everywhere: the modules that are excepted in setup.cfg are a short list, and it only shrinks."""

import configparser
import re
import tokenize

from bench.imports import PACKAGES
from tests.conftest import ROOT

# Our own modules that setup.cfg excepts from anything. Take out what has become strict, and put nothing in.
EXCEPTED: set[str] = set()
# What a section may say of a library; all else weakens the checks of our own code.
OF_LIBRARIES = {"ignore_missing_imports", "follow_imports", "follow_untyped_imports"}


def sections() -> dict[str, dict[str, str]]:
    """What each section of mypy's configuration sets, by the modules that it names."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {
        name: dict(parser[section])
        for section in parser.sections()
        if section.startswith("mypy-")
        for name in section.removeprefix("mypy-").split(",")
    }


def test_all_of_the_product_is_checked_strictly() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    settings = parser["mypy"]
    assert {name.strip() for name in settings["files"].split(",")} == {"launch.py", *PACKAGES}
    assert settings.getboolean("strict")
    assert settings.getboolean("warn_unused_ignores")
    assert set(settings) == {"strict", "warn_unused_ignores", "files", "python_version"}, "nothing weakens it"


def test_the_exceptions_only_shrink() -> None:
    own = {name for name in sections() if name.split(".")[0] in (*PACKAGES, "launch")}
    assert own <= EXCEPTED, "type these modules instead"
    assert own >= EXCEPTED, "these are strict now: take them out of EXCEPTED"


def test_libraries_are_only_excused_for_having_no_types() -> None:
    for name, settings in sections().items():
        if name not in EXCEPTED:
            assert set(settings) <= OF_LIBRARIES, name


def test_each_package_says_that_it_is_typed() -> None:
    for package in PACKAGES:
        assert (ROOT / package / "py.typed").exists()


def test_ignores_name_what_they_ignore() -> None:
    """`# type: ignore[code]`, never all errors of a line or of a file."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            with tokenize.open(path) as file:
                for token in tokenize.generate_tokens(file.readline):
                    if token.type == tokenize.COMMENT and "type:" in token.string and "ignore" in token.string:
                        assert re.match(r"# type: ignore\[[a-z-]+(, ?[a-z-]+)*\]", token.string), (
                            f"{path}:{token.start}"
                        )

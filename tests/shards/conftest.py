"""Gives the tests of the build a salt and folders of their own."""

from collections.abc import Iterator

import pytest

from shards import salt


@pytest.fixture(scope="session", autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds of tests use a known salt, and leave nothing in the user's own folders."""
    home = tmp_path_factory.mktemp("home")
    (home / "salt").write_bytes(b"a salt for tests, of enough bytes")
    folders = {salt.VARIABLE: home / "salt", "XDG_CACHE_HOME": home / "cache", "XDG_STATE_HOME": home / "state"}
    with pytest.MonkeyPatch.context() as patch:
        for name, path in folders.items():
            patch.setenv(name, str(path))
        yield

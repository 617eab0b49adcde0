"""Pages for their owner: other accounts of the machine read none of them, and they end with their command."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from pathlib import Path

import numpy as np
import pytest

from radhpc.core.errors import UserError
from radhpc.serving import page_server
from radhpc.serving.page_server import PageGuard, PageServer
from tests.conftest import ROOT
from tests.waiting import wait_for

pytestmark = pytest.mark.timeout(120)

WORDS = "Right pleural effusion of Mrs Example"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As much of a run as the board looks at: a recipe, and event files with a picture and a text."""
    from torch.utils.tensorboard import SummaryWriter

    run = tmp_path_factory.mktemp("runs") / "chest, [red]: 1"
    writer = SummaryWriter(str(run / "tensorboard"))
    writer.add_scalar("train/loss", 0.5, 1)
    writer.add_image("study", np.full((8, 8, 3), 200, np.uint8), 1, dataformats="HWC")
    writer.add_text("report", WORDS, 1)
    writer.close()
    (run / "recipe.yaml").touch()
    return run


class Board:
    """The command `board` in a process of its own, as a terminal starts it."""

    def __init__(self, run: Path, folder: Path) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), "board", str(run), "--port", "0"],
            stdout=subprocess.PIPE,
            stderr=(folder / "stderr").open("wb"),
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # some shells start us with it ignored
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/[\w-]{20,}/)", self.url)
        assert found, (self.url, (folder / "stderr").read_text())
        self.port, self.path = int(found[1]), found[2]
        wait_for(lambda: b"chest" in get(self.port, f"{self.path}data/runs")[1], 60)

    def session(self) -> list[int]:
        """The processes that it started, itself among them."""
        found = subprocess.run(["ps", "-o", "pid=", "-s", str(self.process.pid)], capture_output=True, text=True)
        return [int(word) for word in found.stdout.split()]

    def ports(self) -> set[int]:
        """The ports on which one of them listens."""
        descriptors = [link for pid in self.session() for link in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = {os.readlink(link) for link in descriptors if link.is_symlink()}
        return {port for port, inode in listening().items() if f"socket:[{inode}]" in sockets}

    def end(self, number: int) -> None:
        os.kill(self.process.pid, number)
        self.process.wait(20)


@pytest.fixture
def board(run: Path, tmp_path: Path) -> Iterator[Board]:
    board = Board(run, tmp_path)
    try:
        yield board
    finally:
        board.process.kill()
        board.process.wait()


def listening() -> dict[int, str]:
    """Every TCP port of the machine on which somebody listens, and the inode of its socket."""
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {int(row[1].rpartition(":")[2], 16): row[9] for row in rows if row[3] == "0A"}


def get(port: int, path: str, method: str = "GET", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in {"Host": f"127.0.0.1:{port}", **headers}.items():
        if value:
            connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    return answer.status, answer.read()


def as_another_account(look: Callable[[], object]) -> object:
    """What `look` returns, as JSON, in a process of the account nobody; of our own where we may not change it."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
            os.write(write, json.dumps(look()).encode())
        except BaseException as error:
            os.write(write, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        text = file.read()
    os.waitpid(child, 0)
    return json.loads(text)


def test_the_owner_sees_the_board(board: Board) -> None:
    status, page = get(board.port, board.path)
    assert (status, b"<tb-webapp" in page or b"TensorBoard" in page) == (200, True)
    assert json.loads(get(board.port, f"{board.path}data/runs")[1]) == ["chest, [red]: 1"]
    query = "plugin/images/images?tag=study&run=chest%2C+%5Bred%5D%3A+1&sample=0"
    ((picture,),) = [json.loads(get(board.port, f"{board.path}data/{query}")[1])]
    image = get(board.port, f"{board.path}data/plugin/images/individualImage?{picture['query']}")
    assert (image[0], image[1][:4]) == (200, b"\x89PNG")


def test_another_account_reads_nothing_of_the_board(board: Board) -> None:
    assert board.ports() == {board.port}, "one port, and the guard stands before it"
    places = ["data/runs", "data/plugin/images/tags", "data/plugin/text/text?run=x&tag=report", "", "index.js"]
    visitor = {"Host": f"127.0.0.1:{board.port}"}
    tries: list[tuple[str, dict[str, str]]] = [
        *((f"/{place}", visitor) for place in places),
        *((f"/wrong/{place}", visitor) for place in places),
        *((board.path + place, {"Host": f"evil.example:{board.port}"}) for place in places),
        *((board.path + place, {"Host": ""}) for place in places),
        *((board.path + place, {**visitor, "Origin": "http://evil.example"}) for place in places),
        *((board.path + place, {**visitor, "Origin": "null"}) for place in places),
    ]

    def look() -> object:
        known = Path(f"/proc/{board.process.pid}/cmdline").read_text()
        return {
            "statuses": [get(board.port, path, **headers)[0] for path, headers in tries],
            "methods": [get(board.port, "/x/", method)[0] for method in ("HEAD", "POST", "PUT", "OPTIONS", "TRACE")],
            "told": board.path.strip("/") in known,
        }

    seen = as_another_account(look)
    assert isinstance(seen, dict), seen
    assert seen["statuses"] == [404] * 10 + [403] * 20
    assert seen["methods"] == [404] * 5
    assert seen["told"] is False


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_the_board_ends_with_its_command(board: Board, number: int) -> None:
    assert board.session() == [board.process.pid], "no process of another"
    board.end(number)
    assert board.session() == []
    assert board.port not in listening()
    assert list(board.temporary.iterdir()) == []


def test_a_closed_terminal_ends_the_board(run: Path, tmp_path: Path) -> None:
    import pty

    child, terminal = pty.fork()
    if not child:
        os.execv(sys.executable, [sys.executable, str(ROOT / "launch.py"), "board", str(run), "--port", "0"])
    printed = b""
    while b"Ctrl-C" not in printed:
        printed += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGHUP


def test_a_taken_port_is_named() -> None:
    class Silent(PageGuard):
        pass

    with PageServer(Silent) as first, pytest.raises(UserError, match="something listens there already; name another"):
        PageServer(Silent, first.port)


# Connections that say nothing

CROWDED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from http import HTTPStatus
from radhpc.serving.page_server import PageGuard, PageServer
class Page(PageGuard):
    def do_GET(self):
        self.answer_text(HTTPStatus.OK, "the page")
server = PageServer(Page)
print(server.url, flush=True)
server.serve_forever()
"""


def test_idle_connections_keep_the_owner_out_of_nothing() -> None:
    """Another account opens as many connections as the page's process may have files, and says nothing on them."""
    script = [sys.executable, "-c", CROWDED]
    with subprocess.Popen(script, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process, ExitStack() as stack:
        stack.callback(process.kill)
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        port, path = int(url.split(":")[2].split("/")[0]), "/" + url.split("/", 3)[3]
        for _ in range(254):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        for _ in range(3):
            started = time.monotonic()
            assert get(port, path) == (200, b"the page")
            assert time.monotonic() - started < 5
            for _ in range(20):
                stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))


@contextmanager
def page(answer: Callable[[PageGuard], None]) -> Iterator[PageServer]:
    class Page(PageGuard):
        def do_GET(self) -> None:
            answer(self)

    with PageServer(Page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_a_request_that_comes_letter_by_letter_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_server, "SECONDS_TO_ASK", 0.5)
    with page(lambda handler: None) as server, socket.create_connection(("127.0.0.1", server.port)) as slow:

        def dropped() -> bool:
            try:
                slow.send(b"G")
            except OSError:
                return True
            return False

        wait_for(dropped, 10)


def test_a_long_answer_is_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time to ask ends with the request: the model may think longer than that."""
    monkeypatch.setattr(page_server, "SECONDS_TO_ASK", 0.3)

    def answer(handler: PageGuard) -> None:
        time.sleep(1)
        handler.answer_text(HTTPStatus.OK, "thought over")

    with page(answer) as server:
        assert get(server.port, f"/{server.token}/") == (200, b"thought over")

"""A proxy before a store that speaks S3, which does on demand what networks and stores do to a long run.

    with Faults("127.0.0.1", port) as faults:
        faults.inject("503", times=5, retry_after=1, when=lambda method, path: method == "GET")
        faults.inject("flip", chance=0.01)
        ...                                   # use faults.url as the endpoint
        assert faults.done["503"] == 5

| kind | what the client sees |
|---|---|
| 429, 500, 503 | that status with S3's XML, and Retry-After where `retry_after` is given; the store sees nothing |
| reset | a connection reset instead of an answer; the store sees nothing |
| lost | the same, but the store has done what it was asked |
| delay | nothing for `seconds`, then the whole answer |
| stall | the header and half of the body, nothing for `seconds`, then the rest |
| break | the header and half of the body, then a reset |
| truncate | the header, which promises all of the body, and half of it; then the connection ends |
| shorten | half of the body under a header that promises no more: nothing looks wrong |
| flip | the whole body with one byte in the middle changed, each time otherwise: nothing looks wrong |

The last five wait for an answer with a body. Of several faults the first that fits is done. Besides them, `expire`
refuses keys until `renew`, and `cut` ends every connection until `mend`. Requests reach the store as the client sent
them, Host included, so their signatures stay valid. HTTP/1.1 with kept connections; one per connection of the client.
"""

import asyncio
import random
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

CODES = {"429": "SlowDown", "500": "InternalError", "503": "SlowDown"}
BEFORE = {*CODES, "reset", "delay"}  # decided before the store is asked, the others once it has answered
WITH_A_BODY = {"stall", "break", "truncate", "shorten", "flip"}
KINDS = {*BEFORE, "lost", *WITH_A_BODY}
PIECE = 1 << 16  # bytes copied at a time
Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Fault:
    """One that was asked for; `times` counts down, None means for ever."""

    kind: str
    times: int | None
    chance: float
    when: Callable[[str, str], bool]
    seconds: float
    retry_after: int | None


@dataclass(frozen=True)
class Request:
    """What the client asked for: the path with its query, and the Range header or an empty string."""

    method: str
    path: str
    range: str


class Reset(Exception):
    """Ends the client's connection with a reset."""


class Faults:
    """The proxy, running inside a `with`; its methods may be called from any thread at any time."""

    def __init__(self, host: str, port: int, seed: int = 0) -> None:
        self._target = host, port
        self._random = random.Random(seed)
        self._faults: list[Fault] = []
        self._expired: dict[str | None, int] = {}  # access key, or None for all -> status
        self._left: int | None = None  # bytes of requests that may still pass; None means any
        self._open = 0  # requests whose answer is under way
        self.connections = 0  # of clients
        self.most_open = 0  # at the same time
        self.requests: list[Request] = []
        self.done: Counter[str] = Counter()  # faults by kind, "expired" among them
        self.bytes_in = self.bytes_out = 0  # of bodies: from clients, and to them

    def __enter__(self) -> "Faults":
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # for all that it accepts
        self.port = int(self._listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()  # raises where it still runs

    def inject(
        self,
        kind: str,
        *,
        times: int | None = None,
        chance: float = 1.0,
        when: Callable[[str, str], bool] = lambda method, path: True,
        seconds: float = 0.0,
        retry_after: int | None = None,
    ) -> None:
        """Do this to the next so many requests that fit, or to each with a chance; `when` is asked (method, path)."""
        assert kind in KINDS, f"{kind}: allowed are {', '.join(sorted(KINDS))}"
        assert seconds > 0 or kind not in ("delay", "stall"), f"{kind}: needs seconds"
        self._faults = [*self._faults, Fault(kind, times, chance, when, seconds, retry_after)]

    def clear(self) -> None:
        """No more faults, expired keys or cuts; what was counted stays."""
        self._faults, self._expired, self._left = [], {}, None

    def expire(self, key: str | None = None, status: int = 403) -> None:
        """Answer ExpiredToken to every request that is signed with this access key, or to all. AWS's status is 400."""
        self._expired = {**self._expired, key: status}

    def renew(self, key: str | None = None) -> None:
        """Take that back."""
        self._expired = {one: status for one, status in self._expired.items() if one != key}

    def cut(self, after: int = 0) -> None:
        """Reset every connection that sends anything, once so many bytes more of requests have passed."""
        self._left = after

    def mend(self) -> None:
        """Let requests pass again."""
        self._left = None

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connection, sock=self._listener, limit=1 << 20)
        await self._stop.wait()
        server.close()
        connections = asyncio.all_tasks() - {asyncio.current_task()}
        for task in connections:
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a client until either side ends it."""
        writer.transport.set_write_buffer_limits(0)  # so what was drained has left
        self.connections += 1
        store: Stream | None = None
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self._spend(len(head))
                self._open += 1
                self.most_open = max(self.most_open, self._open)
                try:
                    if store is None or store[0].at_eof():
                        store = await asyncio.open_connection(*self._target, limit=1 << 20)
                    keep = await self._request(head, (reader, writer), store)
                finally:
                    self._open -= 1
                if not keep:
                    store[1].close()
                    store = None
                if _field(head, "Connection").lower() == "close":
                    return
        except Reset:
            linger = struct.pack("ii", 1, 0)  # closing then sends a reset
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
        except (asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
            pass  # one side has ended its connection, or all is to end
        finally:
            writer.close()
            if store:
                store[1].close()

    async def _request(self, head: bytes, client: Stream, store: Stream) -> bool:
        """Pass one request on and its answer back; return whether the store's connection can be used again."""
        method, path = head.decode("latin-1").split(" ")[:2]
        self.requests.append(Request(method, path, _field(head, "Range")))
        if _field(head, "Expect"):
            head = _without(head, "Expect")  # no signature covers it
            client[1].write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head, body, length = await _body(head, client[0])
        refusal, fault = self._refusal(head), None
        if not refusal and (fault := self._choose(BEFORE, method, path)) and fault.kind in CODES:
            refusal = _error(int(fault.kind), CODES[fault.kind], fault.retry_after)
        if refusal or (fault and fault.kind == "reset"):
            await self._copy(body, length, None)
            if not refusal:
                raise Reset
            client[1].write(refusal if method != "HEAD" else refusal.partition(b"<")[0])
            await client[1].drain()
            return True
        if fault:
            await asyncio.sleep(fault.seconds)
        store[1].write(head)
        await self._copy(body, length, store[1])

        head = await store[0].readuntil(b"\r\n\r\n")
        keep = head.startswith(b"HTTP/1.1") and _field(head, "Connection").lower() != "close"
        head = _without(head, "Connection").replace(b"HTTP/1.0", b"HTTP/1.1", 1)  # the client's own is kept
        body, length = store[0], 0
        if method != "HEAD" and head.split(b" ")[1] not in (b"204", b"304"):
            head, body, length = await _body(head, store[0], until_the_end=not keep)
        if self._choose({"lost"}, method, path):
            raise Reset
        fault = self._choose(WITH_A_BODY, method, path) if length else None
        return await self._answer(head, body, length, client[1], fault) and keep

    async def _answer(
        self, head: bytes, body: asyncio.StreamReader, length: int, to: asyncio.StreamWriter, fault: Fault | None
    ) -> bool:
        """Send an answer with what is to be wrong with it; return whether all of its body was read."""
        kind, half = fault and fault.kind, length // 2
        to.write(head if kind != "shorten" else _with_length(head, half))
        await self._copy(body, half, to, outgoing=True)
        if kind == "break":
            raise Reset
        if kind == "truncate":
            raise ConnectionError("as asked")
        if kind == "shorten":
            return False
        if fault and kind == "stall":
            await asyncio.sleep(fault.seconds)
        if kind == "flip":
            to.write(bytes([(await body.readexactly(1))[0] ^ self._random.randint(1, 255)]))
            self.bytes_out += 1
        await self._copy(body, length - half - (kind == "flip"), to, outgoing=True)
        return True

    def _choose(self, kinds: set[str], method: str, path: str) -> Fault | None:
        """Count and return the first fault of these kinds that fits and whose turn it is."""
        for fault in self._faults:
            if fault.kind not in kinds or fault.times == 0 or not fault.when(method, path):
                continue
            if fault.chance == 1 or self._random.random() < fault.chance:
                fault.times = None if fault.times is None else fault.times - 1
                self.done[fault.kind] += 1
                return fault
        return None

    def _refusal(self, head: bytes) -> bytes | None:
        signed = re.search(r"Credential=([^/]+)/", _field(head, "Authorization"))
        for key in (None, signed and signed[1]):
            if key in self._expired:
                self.done["expired"] += 1
                return _error(self._expired[key], "ExpiredToken")
        return None

    async def _copy(
        self, source: asyncio.StreamReader, length: int, to: asyncio.StreamWriter | None, outgoing: bool = False
    ) -> None:
        while length:
            if not (piece := await source.read(min(PIECE, length))):
                raise ConnectionError("ended in the middle of a body")
            length -= len(piece)
            if outgoing:
                self.bytes_out += len(piece)
            else:
                self.bytes_in += len(piece)
                self._spend(len(piece))
            if to:
                to.write(piece)
                await to.drain()
        if to:
            await to.drain()

    def _spend(self, size: int) -> None:
        """Count bytes towards the end of a cut line."""
        if self._left is not None:
            self._left -= size
            if self._left < 0:
                raise Reset


async def _body(
    head: bytes, reader: asyncio.StreamReader, until_the_end: bool = False
) -> tuple[bytes, asyncio.StreamReader, int]:
    """Where to read the body that follows, and its length. One of unknown length is read now, and given a length."""
    if _field(head, "Transfer-Encoding").lower() == "chunked":
        data = b""
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            data += (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # fields after the body
        head = _without(head, "Transfer-Encoding")
    elif _field(head, "Content-Length") or not until_the_end:
        return head, reader, int(_field(head, "Content-Length") or 0)
    else:
        data = await reader.read()
    whole = asyncio.StreamReader()
    whole.feed_data(data)
    whole.feed_eof()
    return _with_length(head, len(data)), whole, len(data)


def _field(head: bytes, name: str) -> str:
    found = re.search(rf"\r\n{name}:[ \t]*(.*?)[ \t]*\r\n".encode(), head, re.IGNORECASE)
    return found[1].decode("latin-1") if found else ""


def _without(head: bytes, name: str) -> bytes:
    return re.sub(rf"\r\n{name}:.*?(?=\r\n)".encode(), b"", head, flags=re.IGNORECASE)


def _with_length(head: bytes, length: int) -> bytes:
    return _without(head, "Content-Length")[:-2] + f"Content-Length: {length}\r\n\r\n".encode()


def _error(status: int, code: str, retry_after: int | None = None) -> bytes:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>as asked</Message></Error>"
    wait = "" if retry_after is None else f"Retry-After: {retry_after}\r\n"
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\n{wait}Content-Length: {len(body)}\r\n\r\n"
    return (head + body).encode()

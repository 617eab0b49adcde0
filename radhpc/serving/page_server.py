"""Serve a page on this machine to its owner alone: what `demo`, `board` and any page to come stand behind.

    server = PageServer(Handler, port=8765)      # Handler: a request handler that begins with PageGuard
    print(server.url)                            # http://127.0.0.1:8765/<token>/
    server.serve_forever()                       # until Ctrl-C; serve_pages(server) says so

It listens on loopback, in this process: no other one outlives the command. Every account of the machine can reach that,
so every path begins with a token that is new each time; the Host and Origin headers must be this server's own, so that
no foreign page reaches it under another name. Whoever has not shown the token yet gets a few seconds, and of many the
oldest is dropped: connections that say nothing keep nobody out.
"""

import contextlib
import errno
import logging
import resource
import secrets
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from radhpc.core.errors import UserError

log = logging.getLogger("radhpc")

SECONDS_TO_ASK = 10  # until the head of a request is there
MOST_WAITING = 64  # connections whose request is not there yet


class PageServer(ThreadingHTTPServer):
    """A thread for each connection; `url` is the page's address with its token."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handler: type[BaseHTTPRequestHandler], port: int = 0) -> None:
        """`port` 0: any that is free. Raises UserError where it is taken."""
        self._waiting: dict[socket.socket, float] = {}  # since when, the oldest first
        self._lock = threading.Lock()
        # A quarter of the descriptors at most, as what is asked for needs some, too.
        self._most_waiting = max(4, min(MOST_WAITING, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4))
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", port), handler)
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            reason = "something listens there already" if taken else error.strerror
            raise UserError(f"--port {port}: {reason}; name another one") from error
        self.port = self.server_address[1]
        self.hosts = (f"127.0.0.1:{self.port}", f"localhost:{self.port}")
        # Never "localhost": a browser tries ::1 first, where another account may listen and would be told the token.
        self.url = f"http://127.0.0.1:{self.port}/{self.token}/"

    def server_bind(self) -> None:
        """Bind without asking the name service what this machine is called, as the parent class does."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    # Who has not asked yet

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:  # no descriptor is left
            self._drop(keep=self._most_waiting // 2)
            time.sleep(0.05)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._lock:
            self._waiting[request] = time.monotonic()
        self._drop(keep=self._most_waiting)
        super().process_request(request, client_address)

    def service_actions(self) -> None:
        """Twice a second: end the connections that have not asked in time."""
        self._drop(keep=self._most_waiting, before=time.monotonic() - SECONDS_TO_ASK)

    def asked(self, request: socket.socket) -> None:
        """Take a connection off the list: its request is there and is the owner's, or it is answered and ends."""
        with self._lock:
            self._waiting.pop(request, None)

    def shutdown_request(self, request: Any) -> None:
        self.asked(request)
        super().shutdown_request(request)

    def _drop(self, keep: int, before: float = 0.0) -> None:
        """End the oldest waiting connections, all but `keep`, and those that came `before`; threads close them."""
        with self._lock:
            spare = len(self._waiting) - keep
            for request in [r for n, (r, since) in enumerate(self._waiting.items()) if n < spare or since < before]:
                del self._waiting[request]
                with contextlib.suppress(OSError):  # the other end was faster
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep silent about connections that broke; name what is ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            log.exception("a request could not be answered")


class PageGuard(BaseHTTPRequestHandler):
    """The first of a handler's classes: lets no request through that is not the owner's. HTTP/1.0, a request each."""

    server: PageServer
    timeout = 60  # of a single read or write

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if (refusal := self._refusal()) is not None:
            self.answer_text(*refusal)
            return False
        self.server.asked(self.connection)
        return True

    def _refusal(self) -> tuple[HTTPStatus, str] | None:
        """Return the answer to a request that does not come from our own page; None for one that does."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            return HTTPStatus.FORBIDDEN, "wrong host"
        origins = self.headers.get_all("Origin", [])
        if origins not in [[], *([f"http://{host}"] for host in self.server.hosts)]:
            return HTTPStatus.FORBIDDEN, "wrong origin"
        token = self.path.split("/")[1] if self.path.count("/") >= 2 else ""
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            return HTTPStatus.NOT_FOUND, "not found"
        return None

    def answer_text(self, status: HTTPStatus, text: str) -> None:
        self.start_answer(status, "text/plain; charset=utf-8")
        self.wfile.write(text.encode())

    def start_answer(self, status: HTTPStatus, kind: str, policy: str = "default-src 'none'") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")  # the token stands in the address
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Content-Security-Policy", policy)
        self.end_headers()

    def version_string(self) -> str:
        return "radhpc"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the paths hold the token."""

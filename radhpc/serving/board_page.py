"""Serve TensorBoard over some runs to their owner alone, inside this process.

    page = BoardPage({"run-1": Path("runs/run-1/tensorboard")}, port=6006)
    print(page.url)
    page.serve()               # until Ctrl-C

TensorBoard's own server asks nobody who they are, and its fast loader is a process of its own with an open port: so
its application runs here, behind PageGuard, and the event files are read in a thread. Nothing is written anywhere.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler

from radhpc.core.errors import first_line
from radhpc.core.untrusted import printable
from radhpc.serving.page_server import PageGuard, PageServer

log = logging.getLogger("radhpc")

RELOAD_SECONDS = 5

Environ = dict[str, Any]
Application = Callable[[Environ, Callable[..., Any]], Iterable[bytes]]


class BoardPage:
    """The server, with TensorBoard behind it."""

    def __init__(self, runs: Mapping[str, Path], port: int = 0) -> None:
        """`runs`: folders of event files by their titles. `port` 0: any that is free. Raises UserError if taken."""
        self._server = _BoardServer(_Handler, port)
        self.url, self.port = self._server.url, self._server.port
        self._server.set_app(_application(runs, f"/{self._server.token}"))

    def serve(self) -> None:
        self._server.serve_forever()

    def stop(self) -> None:
        """Called from another thread."""
        self._server.shutdown()

    def close(self) -> None:
        self._server.server_close()


class _BoardServer(PageServer):
    """Hold what wsgiref's handler asks its server for."""

    base_environ: Environ

    def set_app(self, application: Application) -> None:
        self._application = application
        self.base_environ = {
            "SERVER_NAME": self.server_name,
            "SERVER_PORT": str(self.port),
            "GATEWAY_INTERFACE": "CGI/1.1",
            "REMOTE_HOST": "",
            "CONTENT_LENGTH": "",
            "SCRIPT_NAME": "",
        }

    def get_app(self) -> Application:
        return self._application


class _Handler(PageGuard, WSGIRequestHandler):
    server: _BoardServer  # no WSGIServer, but all that is asked of one

    def address_string(self) -> str:
        return str(self.client_address[0])


def _application(runs: Mapping[str, Path], prefix: str) -> Application:
    """Return TensorBoard's application, whose paths begin with `prefix`, over runs that are read again and again."""
    from tensorboard import assets, default, program
    from tensorboard.backend.application import TensorBoardWSGIApp
    from tensorboard.backend.event_processing.data_ingester import DEFAULT_SIZE_GUIDANCE, DEFAULT_TENSOR_SIZE_GUIDANCE
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # else every reload of every run is a line
    plugins = default.get_static_plugins()
    flags = program.TensorBoard(plugins)
    flags.configure(logdir=", ".join(runs), path_prefix=prefix, window_title="radhpc board")
    multiplexer = EventMultiplexer(
        size_guidance=DEFAULT_SIZE_GUIDANCE, tensor_size_guidance=DEFAULT_TENSOR_SIZE_GUIDANCE
    )

    def read_again() -> None:
        while True:
            try:
                for title, folder in runs.items():
                    if folder.is_dir():
                        multiplexer.AddRun(str(folder), title)
                multiplexer.Reload()
            except Exception as error:  # of one file, for now: the next round tries again
                log.warning("an event file cannot be read: %s", printable(first_line(error)))
            time.sleep(RELOAD_SECONDS)

    threading.Thread(target=read_again, daemon=True).start()
    application: Application = TensorBoardWSGIApp(
        flags.flags,
        plugins,
        MultiplexerDataProvider(multiplexer, flags.flags.logdir),
        assets.get_default_assets_zip_provider(),
        multiplexer,
    )
    return _private(application)


def _private(application: Application) -> Application:
    """Let no browser keep what is read from runs, nor tell another page the address."""

    def answer(environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        def start(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            more = {"Referrer-Policy": "no-referrer", "X-Frame-Options": "SAMEORIGIN"}
            if "/data/" in environ["PATH_INFO"]:
                more["Cache-Control"] = "no-store"
            kept = [(name, value) for name, value in headers if name.title() not in more]
            return start_response(status, [*kept, *more.items()], *error)

        return application(environ, start)

    return answer

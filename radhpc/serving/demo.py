"""Serves a page on this machine alone: drop a radiograph, read the report as it is written, ask, see similar studies.

    with Demo(pipeline, read_image, port=8765) as demo:
        print(demo.url)            # http://127.0.0.1:8765/<token>/
        demo.serve()               # until Ctrl-C

It listens on loopback. On a shared machine others can reach that, too, so every path begins with a token that is new
each time; the Host header must be this server's own, so no foreign page reaches it under another name; nothing is kept.
"""

import base64
import binascii
import html
import json
import logging
import secrets
import string
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from typing import Any

from PIL import Image

from radhpc.core.errors import UserError
from radhpc.evaluation.report_page import data_url
from radhpc.serving.pipeline import Pipeline, StudyInput

log = logging.getLogger("radhpc")

MAX_BYTES = 256 << 20  # of a request: some large DICOM files
VIEWS = 16  # of a study

ReadImage = Callable[[bytes, str], tuple[Image.Image, str | None]]  # bytes, name -> picture, modality; or UserError


class Demo:
    """The server, with the model behind it."""

    def __init__(self, pipeline: Pipeline, read_image: ReadImage, port: int = 0) -> None:
        """`port` 0: any that is free. Raises UserError where it is taken."""
        self.pipeline, self.read_image = pipeline, read_image
        self.token = secrets.token_urlsafe(16)
        self.turn = threading.Lock()  # one study goes through the model at a time
        demo = self

        class Handler(_Handler):
            server_demo = demo

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; name another one") from error
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self.hosts = (f"127.0.0.1:{self.port}", f"localhost:{self.port}")
        self.url = f"http://127.0.0.1:{self.port}/{self.token}/"

    def __enter__(self) -> "Demo":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.server_close()

    def serve(self) -> None:
        self._server.serve_forever()

    def stop(self) -> None:
        """Called from another thread."""
        self._server.shutdown()

    def page(self) -> str:
        template = string.Template((files("radhpc.serving") / "demo.html").read_text(encoding="utf-8"))
        try:
            self.pipeline.check_question()
            placeholder, disabled = "Ask a question about this study", ""
        except UserError:
            placeholder, disabled = "This run has learnt no questions, only reports", "disabled"
        return template.substitute(
            name=html.escape(self.pipeline.context.recipe.name),
            step=self.pipeline.cursor.step,
            placeholder=html.escape(placeholder),
            disabled=disabled,
        )

    def read(self, views: list[dict[str, str]], question: str | None) -> Iterator[dict[str, Any]]:
        """Yield the page's messages one by one: views, warnings, neighbours, text, end."""
        pictures = [self.read_image(base64.b64decode(view["data"], validate=True), view["name"]) for view in views]
        study = StudyInput("", [picture for picture, _ in pictures], [modality for _, modality in pictures])
        yield {"views": [data_url(picture, 800) for picture in study.views]}
        unlearnt = self.pipeline.check_question() if question else None
        with self.turn:
            ((neighbours, far),) = self.pipeline.find_neighbours([study])
            yield {"warnings": [*self.pipeline.warnings(study), *far, *([unlearnt] if unlearnt else [])]}
            shown = [{**vars(one), "picture": self._picture(one.number)} for one in neighbours]
            yield {"neighbours": shown, "given": [] if question else self.pipeline.encoder.neighbour_texts(study.views)}
            for piece in self.pipeline.stream(study, question):
                yield {"text": piece}
        yield {"end": True}

    def _picture(self, number: int) -> str | None:
        from radhpc.data.source import BadSample

        try:
            _, _, views = self.pipeline.training.read(number)
        except BadSample:
            return None
        return data_url(views[0], 192)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.0: a response ends with its connection, so text can be sent while it is generated."""

    server_demo: Demo
    timeout = 60

    def _refuse_foreign(self) -> bool:
        """Answer a request that does not come from our own page with an error; return whether it did not."""
        demo = self.server_demo
        if self.headers.get("Host") not in demo.hosts:
            self._plain(HTTPStatus.FORBIDDEN, "wrong host")
            return True
        origin = self.headers.get("Origin")
        if origin is not None and origin not in tuple(f"http://{host}" for host in demo.hosts):
            self._plain(HTTPStatus.FORBIDDEN, "wrong origin")
            return True
        token = self.path.split("/")[1] if self.path.count("/") >= 2 else ""
        if not secrets.compare_digest(token.encode(), demo.token.encode()):
            self._plain(HTTPStatus.NOT_FOUND, "not found")
            return True
        return False

    def do_GET(self) -> None:
        if self._refuse_foreign():
            return
        if self.path != f"/{self.server_demo.token}/":
            self._plain(HTTPStatus.NOT_FOUND, "not found")
            return
        self._head(HTTPStatus.OK, "text/html; charset=utf-8")
        self.wfile.write(self.server_demo.page().encode())

    def do_POST(self) -> None:
        if self._refuse_foreign():
            return
        if self.path != f"/{self.server_demo.token}/read":
            self._plain(HTTPStatus.NOT_FOUND, "not found")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > MAX_BYTES:
            self._plain(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BYTES >> 20} MB")
            return
        try:
            request = json.loads(self.rfile.read(int(length)))
            views, question = request["views"], request.get("question")
            valid = isinstance(views, list) and 0 < len(views) <= VIEWS and isinstance(question, str | None)
            if not (valid and all(isinstance(v["data"], str) and isinstance(v["name"], str) for v in views)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            self._plain(HTTPStatus.BAD_REQUEST, f"1 to {VIEWS} views are expected, and at most one question")
            return
        self._head(HTTPStatus.OK, "application/x-ndjson")
        messages = self.server_demo.read(views, question)
        try:
            for message in messages:
                self._send(message)
        except (UserError, binascii.Error) as error:
            self._send({"error": str(error)})
        except ConnectionError:  # the page was closed, or asks something else
            pass
        except Exception as error:  # ours: the page says so, the terminal says where
            log.exception("the model could not answer")
            self._send({"error": f"the model could not answer: {error}"})
        finally:
            messages.close()  # type: ignore[attr-defined]  # a generator: ends the writing

    def _send(self, message: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(message).encode() + b"\n")
        self.wfile.flush()

    def _head(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")  # the token stands in the address
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
            "connect-src 'self'; form-action 'none'; frame-ancestors 'none'",
        )
        self.end_headers()

    def _plain(self, status: HTTPStatus, text: str) -> None:
        self._head(status, "text/plain; charset=utf-8")
        self.wfile.write(text.encode())

    def version_string(self) -> str:
        return "radhpc"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the paths hold the token."""

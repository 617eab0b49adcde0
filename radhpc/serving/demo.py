"""Serves a page on this machine alone: drop a radiograph, read the report as it is written, ask, see similar studies.

    with Demo(pipeline, read_image, port=8765) as demo:
        print(demo.url)            # http://127.0.0.1:8765/<token>/
        demo.serve()               # until Ctrl-C

Nothing is kept. Who may open it: radhpc/serving/page_server.py.
"""

import base64
import binascii
import html
import json
import logging
import string
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from importlib.resources import files
from typing import Any

from PIL import Image

from radhpc.core.errors import UserError
from radhpc.core.untrusted import parse_json
from radhpc.evaluation.report_page import data_url
from radhpc.serving.page_server import PageGuard, PageServer
from radhpc.serving.pipeline import Pipeline, StudyInput

log = logging.getLogger("radhpc")

MAX_BYTES = 256 << 20  # of a request: some large DICOM files
VIEWS = 16  # of a study

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; form-action 'none'; frame-ancestors 'none'"
)

ReadImage = Callable[[bytes, str], tuple[Image.Image, str | None]]  # bytes, name -> picture, modality; or UserError


class Demo:
    """The server, with the model behind it."""

    def __init__(self, pipeline: Pipeline, read_image: ReadImage, port: int = 0) -> None:
        """`port` 0: any that is free. Raises UserError where it is taken."""
        self.pipeline, self.read_image = pipeline, read_image
        self.turn = threading.Lock()  # one study goes through the model at a time
        demo = self

        class Handler(_Handler):
            server_demo = demo

        self._server = PageServer(Handler, port)
        self.port, self.token, self.url = self._server.port, self._server.token, self._server.url

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


class _Handler(PageGuard):
    """A response ends with its connection, so text can be sent while it is generated."""

    server_demo: Demo

    def do_GET(self) -> None:
        if self.path != f"/{self.server_demo.token}/":
            self.answer_text(HTTPStatus.NOT_FOUND, "not found")
            return
        self.start_answer(HTTPStatus.OK, "text/html; charset=utf-8", _POLICY)
        self.wfile.write(self.server_demo.page().encode())

    def do_POST(self) -> None:
        if self.path != f"/{self.server_demo.token}/read":
            self.answer_text(HTTPStatus.NOT_FOUND, "not found")
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 12 or int(length) > MAX_BYTES:
            self.answer_text(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"more than {MAX_BYTES >> 20} MB")
            return
        try:
            request = parse_json(self.rfile.read(int(length)))
            views, question = request["views"], request.get("question")
            valid = isinstance(views, list) and 0 < len(views) <= VIEWS and isinstance(question, str | None)
            if not (valid and all(isinstance(v["data"], str) and isinstance(v["name"], str) for v in views)):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            self.answer_text(HTTPStatus.BAD_REQUEST, f"1 to {VIEWS} views are expected, and at most one question")
            return
        self.start_answer(HTTPStatus.OK, "application/x-ndjson")
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

"""A headless Chromium for the tests, driven by its own protocol over two pipes: no driver, no port, no library.

with Browser(tmp_path) as browser:
    browser.open("http://127.0.0.1:8765/")
    browser.wait("document.body.dataset.state == 'done'")
    browser.screenshot(tmp_path / "page.png")
"""

import base64
import json
import os
import select
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_for

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def chromium() -> str:
    """The program's path; skips the test where there is none, but never in CI."""
    if PROGRAM is None:
        reason = "CHROMIUM IS NOT INSTALLED: the pages are looked at by nobody; see `make chromium`"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    return str(PROGRAM)


class Browser:
    """One page of one browser."""

    def __init__(self, folder: Path, width: int = 1200, height: int = 900) -> None:
        """`folder`: where its profile may lie."""
        program, profile = chromium(), folder / "chromium"
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The protocol wants the pipes as descriptors 3 and 4; bash puts them there, also from above 9.
        command = [
            "bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", program, "--headless", "--no-sandbox",
            "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", "--disable-extensions",
            f"--user-data-dir={profile}", f"--window-size={width},{height}", "--remote-debugging-pipe", "about:blank",
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command,
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(folder)},
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self._session, self._loaded = b"", 0, "", False
        self.errors: list[str] = []  # of scripts, and what the page's policy refused

    def __enter__(self) -> "Browser":
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self._call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # the browser ends with its pipe
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def open(self, url: str) -> None:
        """Go there and wait until the page is loaded."""
        self._loaded = False
        assert "errorText" not in self._call("Page.navigate", url=url)
        while not self._loaded:
            self._heard(self._next())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is awaited."""
        done = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait(self, script: str, seconds: float = 40) -> None:
        """Until an expression is true."""
        wait_for(lambda: self.run(script), seconds, lambda: f"for {script}\n{self.text()[:2000]}\n{self.errors}")

    def text(self) -> str:
        """What there is to read on the page, also inside of web components."""
        return str(self.run(_TEXT))

    def choose(self, selector: str, *files: Path) -> None:
        """Put files into an <input type=file>."""
        root = self._call("DOM.getDocument")["root"]["nodeId"]
        node = self._call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in files])

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self._heard(answer)

    def _heard(self, event: dict[str, Any]) -> None:
        method, told = event.get("method"), event.get("params", {})
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(str(told["exceptionDetails"].get("exception", {}).get("description")))
        elif method == "Log.entryAdded" and told["entry"].get("level") == "error":
            self.errors.append(f"{told['entry'].get('text')} {told['entry'].get('url', '')}")

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], 60)
            assert ready, "the browser says nothing"
            data = os.read(self._read, 1 << 20)
            assert data, "the browser has ended"
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        result: dict[str, Any] = json.loads(message)
        return result


_TEXT = """
(function read(node) {
  let text = "";
  for (const child of node.childNodes) {
    if (child.nodeType == 3) text += child.textContent;
    if (child.nodeType == 1 && !["SCRIPT", "STYLE"].includes(child.tagName)) text += " " + read(child);
  }
  return node.shadowRoot ? read(node.shadowRoot) + text : text;
})(document.body)
"""

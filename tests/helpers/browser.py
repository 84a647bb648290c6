"""A headless Chromium, driven by the DevTools protocol over two pipes: no package, no port."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# of a command on a busy machine
PATIENCE = 60.0
# where Chromium has the pipes of --remote-debugging-pipe
READS, WRITES = 3, 4
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
    *("--hide-scrollbars", "--force-color-profile=srgb", "--remote-debugging-pipe"),
)
# names of keys, what they type, and their codes in the protocol
KEYS = {"Tab": ("", 9), "Enter": ("\r", 13), "Space": (" ", 32)}


def browser_path() -> str | None:
    """Chromium or Chrome on PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One process with one tab; `events` holds what the tab told since the last `visit`."""

    def __init__(self, path: str) -> None:
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        profile = Path(self._folder.name)
        # numbers above 9, so that no dup2 below writes over one of the others
        their_in, self._to = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        self._from, their_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        words = [path, *OPTIONS, f"--user-data-dir={profile / 'profile'}"]
        log = str(profile / "log")
        actions = [
            (os.POSIX_SPAWN_DUP2, their_in, READS),
            (os.POSIX_SPAWN_DUP2, their_out, WRITES),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ]
        self._process = os.posix_spawn(path, words, os.environ, file_actions=actions, setpgroup=0)
        os.close(their_in)
        os.close(their_out)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        tab = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=tab, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        with contextlib.suppress(OSError):
            self._post("Browser.close", {})
        end = time.monotonic() + 5
        while not (ended := os.waitpid(self._process, os.WNOHANG)[0]) and time.monotonic() < end:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        if not ended:
            os.waitpid(self._process, 0)
        os.close(self._to)
        os.close(self._from)
        self._folder.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result; dialogs are closed meanwhile."""
        number = self._post(method, parameters)
        while True:
            message = self._receive()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]

    def visit(self, path: Path, width: int, height: int = 800) -> None:
        """Load a file into a window of this size, and wait until it is there."""
        self._load("about:blank")
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self._load(path.resolve().as_uri())

    def _load(self, address: str) -> None:
        self.events.clear()
        self.send("Page.navigate", url=address)
        while "Page.loadEventFired" not in (event["method"] for event in self.events):
            self._receive()

    def evaluate(self, script: str) -> Any:
        """The value of an expression in the page."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key of KEYS."""
        text, code = KEYS[key]
        word = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **word)
        self.send("Input.dispatchKeyEvent", type="keyUp", **word)

    def picture(self, **parameters: Any) -> bytes:
        """A PNG of what is visible, of a `clip`, or with captureBeyondViewport of more."""
        return base64.b64decode(
            self.send("Page.captureScreenshot", optimizeForSpeed=True, **parameters)["data"]
        )

    def _post(self, method: str, parameters: dict[str, Any]) -> int:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        content = json.dumps(message).encode() + b"\0"
        while content:
            content = content[os.write(self._to, content) :]
        return self._count

    def _receive(self) -> dict[str, Any]:
        """The next message; an event is noted, a dialog closed."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], PATIENCE)
            part = os.read(self._from, 1 << 20) if ready else b""
            if not part:
                log = (Path(self._folder.name) / "log").read_text(errors="replace")
                raise RuntimeError(f"the browser does not answer; its log: {log[-1000:]}")
            self._buffer += part
        content, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(content)
        if "method" in message:
            self.events.append(message)
            if message["method"] == "Page.javascriptDialogOpening":
                self._post("Page.handleJavaScriptDialog", {"accept": True})
        return message

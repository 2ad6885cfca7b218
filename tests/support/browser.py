"""A headless Chromium that tests look through, over its debugging port: open a page, ask it in JavaScript, take a picture.

Debian's `chromium-headless-shell` does, and any Chromium or Chrome on the path. It has a profile of its own in a temporary folder, and its
debugging port is on loopback.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import aiohttp

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
_ADDRESS = re.compile(r"DevTools listening on (ws://\S+)")
ResultT = TypeVar("ResultT")


def missing() -> str:
    """Why no page can be looked at on this machine, or nothing."""
    found = next((name for name in NAMES if shutil.which(name)), None)
    return "" if found else f"no browser on the path: install one of {', '.join(NAMES)}"


def obtain() -> str:
    """Fetch a browser where there is none and this machine lets it be fetched, as root with apt; why there is none then, or nothing."""
    if not missing() or os.geteuid() != 0 or shutil.which("apt-get") is None:
        return missing()
    install = ["install", "-y", "-qq", "--no-install-recommends", NAMES[0]]
    for words in (["update", "-qq"], install):
        try:
            done = subprocess.run(
                ["apt-get", "-o", "DPkg::Lock::Timeout=120", *words], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
                capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=300,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"{missing()}; apt-get {words[0]} took more than 300 s"
        if done.returncode != 0:
            return f"{missing()}; apt-get {words[0]} failed: {done.stderr.strip()[-300:]}"
    return missing()


class Browser:
    """One page of a headless browser; a context manager that ends it.

    Args:
        width: of the window, in pixels.
        height: of the window, in pixels.
    """

    def __init__(self, *, width: int = 1600, height: int = 1000) -> None:
        self._size = (width, height)
        self._loop = asyncio.new_event_loop()
        self._number = 0

    def __enter__(self) -> Browser:
        program = next(found for name in NAMES if (found := shutil.which(name)))
        self._folder = tempfile.TemporaryDirectory(prefix="dstrain-browser-", ignore_cleanup_errors=True)
        self._log = Path(self._folder.name) / "log"
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
            "--disable-background-networking", "--disable-extensions", "--remote-debugging-port=0",
            f"--user-data-dir={self._folder.name}/profile", f"--window-size={self._size[0]},{self._size[1]}", "about:blank",
        ]  # fmt: skip
        with self._log.open("wb") as log:
            # A session of its own: Debian's command is a shell that waits for the browser, and would die alone.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )
        self._run(self._attach())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._run(self._session.close())
        self._loop.close()
        self._folder.cleanup()

    def open(self, address: str) -> None:
        """Go to a page, from an empty one: a change of what stands behind # alone would not load it."""
        self._call("Page.navigate", url="about:blank")
        self._call("Page.navigate", url=address)

    def ask(self, script: str) -> Any:
        """The JSON-able value of a JavaScript expression; a promise is waited for.

        Raises:
            AssertionError: it threw.
        """
        answer = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str, *, what: str, timeout_s: float = 60) -> Any:
        """Poll until an expression is true; returns it."""
        deadline = time.monotonic() + timeout_s
        while not (found := self.ask(script)):
            assert time.monotonic() < deadline, f"not seen in {timeout_s} s: {what}"
            time.sleep(0.2)
        return found

    def picture(self, path: Path) -> None:
        """A PNG of what is to be seen."""
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def resize(self, width: int, height: int) -> None:
        """Another size of the page, in pixels."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    async def _attach(self) -> None:
        deadline = time.monotonic() + 60
        while (found := _ADDRESS.search(self._log.read_text(errors="replace"))) is None:
            assert self._process.poll() is None, f"the browser ended: {self._log.read_text(errors='replace')[-2000:]}"
            assert time.monotonic() < deadline, "the browser does not open its debugging port"
            await asyncio.sleep(0.1)
        self._session = aiohttp.ClientSession()
        self._socket = await self._session.ws_connect(found[1], max_msg_size=0)
        self._page: dict[str, str] = {}
        targets = (await self._send("Target.getTargets"))["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = await self._send("Target.attachToTarget", targetId=page, flatten=True)
        self._page = {"sessionId": attached["sessionId"]}
        await self._send("Page.enable")

    async def _send(self, method: str, **parameters: Any) -> Any:
        self._number += 1
        await self._socket.send_str(
            json.dumps({"id": self._number, "method": method, "params": parameters, **self._page})
        )
        while True:
            answer = json.loads(await asyncio.wait_for(self._socket.receive_str(), 60))
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _call(self, method: str, **parameters: Any) -> Any:
        return self._run(self._send(method, **parameters))

    def _run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return self._loop.run_until_complete(work)

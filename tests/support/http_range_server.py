"""A web server over a folder that answers byte ranges, counts what it sends, and can be told to ignore ranges or to answer nothing."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class RangeServer:
    """Counts of one server."""

    def __init__(self, folder: Path, *, ranges: bool) -> None:
        self.folder, self.ranges = folder, ranges
        self.bytes_sent = 0
        self.requests: list[tuple[str, str, str]] = []
        """Method, path with query, Range."""
        self.lock = threading.Lock()
        self.port = 0
        self.waiting = 0
        """Requests that are being held."""
        self._held = ""
        self._let_go = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @contextmanager
    def hold(self, part: str) -> Iterator[None]:
        """While the block runs, answer no request whose path has this in it."""
        self._let_go.clear()
        self._held, self.waiting = part, 0
        try:
            yield
        finally:
            self._held = ""
            self._let_go.set()

    def wait_if_held(self, path: str) -> None:
        if self._held and self._held in path:
            with self.lock:
                self.waiting += 1
            self._let_go.wait()


@contextmanager
def serve_ranges(folder: Path, *, ranges: bool = True) -> Iterator[RangeServer]:
    """Serve `folder` on a free port of this machine."""
    state = RangeServer(folder, ranges=ranges)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            wanted = self.headers.get("Range", "")
            state.wait_if_held(self.path)
            with state.lock:
                state.requests.append((self.command, self.path, wanted))
            path = (folder / self.path.partition("?")[0].lstrip("/")).resolve()
            if not path.is_relative_to(folder.resolve()) or not path.is_file():
                self.send(404, b"<html>404</html>", {}, body=body)
                return
            data = path.read_bytes()
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
            if not found or not state.ranges:
                self.send(200, data, {"Accept-Ranges": "bytes" if state.ranges else "none"}, body=body)
                return
            first, last = int(found[1]), min(int(found[2]), len(data) - 1)
            if first >= len(data):
                self.send(416, b"", {"Content-Range": f"bytes */{len(data)}"}, body=body)
                return
            self.send(206, data[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"}, body=body)

        def send(self, status: int, data: bytes, headers: dict[str, str], *, body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                try:
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True
                    return
                with state.lock:
                    state.bytes_sent += len(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()

"""A TCP proxy for HTTP that misbehaves on purpose: 5xx, stalls, truncation, resets, slow drips and wrong ranges.

Which request meets which fault follows from the seed, the request and how often it came, never from timing: the first
`faults_per_request` tries of some requests fail, the next succeeds. `broken` fails everything.
"""

from __future__ import annotations

import hashlib
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

FAULTS = ("503", "stall", "truncate", "reset", "drip", "whole", "shifted")
"""whole: the Range header is lost; shifted: it asks for other bytes of the same number."""


class FaultProxy:
    """What one proxy does and did."""

    def __init__(self, upstream_port: int, *, seed: int, faults: Sequence[str], share: float) -> None:
        self.upstream_port, self.seed, self.faults, self.share = upstream_port, seed, tuple(faults), share
        self.met: Counter[str] = Counter()
        self.broken: str | None = None
        self.stopping = threading.Event()
        self.port = 0
        self._tries: Counter[bytes] = Counter()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fault_of(self, head: bytes) -> str | None:
        line = head.split(b"\r\n", 1)[0]
        asked = re.search(rb"(?im)^range:.*$", head)
        identity = line + (asked.group().strip() if asked else b"")
        with self._lock:
            self._tries[identity] += 1
            if self.broken is not None:
                return self.broken
            if self._tries[identity] > 1:
                return None
            draw = hashlib.sha256(f"{self.seed}|".encode() + identity).digest()
            if int.from_bytes(draw[:4], "little") / 2**32 >= self.share:
                return None
            fault = self.faults[draw[4] % len(self.faults)]
            self.met[fault] += 1
            return fault


@contextmanager
def fault_proxy(
    upstream_port: int, *, seed: int = 0, faults: Sequence[str] = FAULTS, share: float = 0.5
) -> Iterator[FaultProxy]:
    """Stand in front of a local port."""
    proxy = FaultProxy(upstream_port, seed=seed, faults=faults, share=share)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    proxy.port = listener.getsockname()[1]

    def accept() -> None:
        while not proxy.stopping.is_set():
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=_serve, args=(proxy, client), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.stopping.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _serve(proxy: FaultProxy, client: socket.socket) -> None:
    """One request per connection: `Connection: close` both ways keeps the framing simple."""
    with client:
        try:
            head, body = _request(client)
            if head:
                _answer(proxy, client, head, body)
        except OSError:
            pass


def _request(client: socket.socket) -> tuple[bytes, bytes]:
    data = b""
    while b"\r\n\r\n" not in data:
        piece = client.recv(65536)
        if not piece:
            return b"", b""
        data += piece
    head, _, body = data.partition(b"\r\n\r\n")
    length = re.search(rb"(?im)^content-length:\s*(\d+)", head)
    while length and len(body) < int(length[1]):
        body += client.recv(65536)
    return head, body


def _answer(proxy: FaultProxy, client: socket.socket, head: bytes, body: bytes) -> None:
    fault = proxy.fault_of(head)
    if fault == "503":
        client.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        return
    if fault == "stall":
        proxy.stopping.wait(30)
        return
    if fault == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return
    if fault == "whole":
        head = re.sub(rb"(?im)^range:.*\r?\n", b"", head)
    if fault == "shifted":
        head = re.sub(rb"(?im)^(range:\s*bytes=)(\d+)-(\d+)", _shift, head)
    reply = _upstream(proxy.upstream_port, head, body)
    if fault == "truncate":
        end = reply.find(b"\r\n\r\n") + 4
        client.sendall(reply[: end + (len(reply) - end) // 2])
    elif fault == "drip":
        step = max(1, len(reply) // 20)
        for at in range(0, len(reply), step):
            client.sendall(reply[at : at + step])
            proxy.stopping.wait(0.002)
    else:
        client.sendall(reply)


def _shift(found: re.Match[bytes]) -> bytes:
    first, last = int(found[2]), int(found[3])
    by = -min(first, 512) or 1
    return found[1] + b"%d-%d" % (first + by, last + by)


def _upstream(port: int, head: bytes, body: bytes) -> bytes:
    head = re.sub(rb"(?im)^connection:.*\r?\n", b"", head) + b"\r\nConnection: close"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as server:
        server.sendall(head + b"\r\n\r\n" + body)
        pieces = []
        while piece := server.recv(1 << 16):
            pieces.append(piece)
    reply = b"".join(pieces)
    reply = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", reply, count=1)
    return reply.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)

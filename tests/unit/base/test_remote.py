"""One try: exactly the bytes asked for, or a fault of the right kind that tells no secret."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path

import fsspec
import pytest

from dstrain.base import remote
from dstrain.base.errors import ConfigError, DataError
from dstrain.base.locations import RemoteUrl, parse_location
from dstrain.base.protocols import Interrupted
from dstrain.base.remote import RemoteFolder, TransientRemoteError
from tests.support.fault_proxy import fault_proxy
from tests.support.http_range_server import serve_ranges

pytest.importorskip("aiohttp")
DATA = bytes(range(256)) * 64


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "a.tar").write_bytes(DATA)
    return tmp_path


def opened(url: str, **options) -> RemoteFolder:
    location = parse_location(url)
    assert isinstance(location, RemoteUrl)
    return RemoteFolder(location, **options)


def test_a_range_and_a_size_come_exactly(folder):
    with serve_ranges(folder) as server:
        files = opened(server.url)
        assert files.size("a.tar", timeout_s=5) == len(DATA)
        for offset, length in ((0, 1), (5, 1000), (len(DATA) - 1, 1), (7, 0), (0, len(DATA))):
            assert files.read_range("a.tar", offset, length, timeout_s=5) == DATA[offset : offset + length]
        files.close()


def test_access_signatures_reach_the_server_and_no_message(folder):
    with serve_ranges(folder) as server:
        files = opened(server.url + "/sub?sig=topsecret")
        with pytest.raises(DataError, match=r"sub/a\.tar: no such file in the store") as refusal:
            files.read_range("a.tar", 0, 10, timeout_s=5)
        assert server.requests[-1][1] == "/sub/a.tar?sig=topsecret"
    assert "topsecret" not in str(refusal.value)
    with pytest.raises(TransientRemoteError) as refusal:
        opened(server.url + "?sig=topsecret").read_range("a.tar", 0, 10, timeout_s=2)
    assert "topsecret" not in str(refusal.value)


def test_a_server_that_ignores_ranges_is_named_and_not_read_to_its_end(folder):
    with serve_ranges(folder, ranges=False) as server:
        for offset in (0, 10):
            with pytest.raises(
                DataError, match=r"http://.*: the server does not answer byte ranges.*Serve the shards by"
            ):
                opened(server.url).read_range("a.tar", offset, 10, timeout_s=5)
        assert opened(server.url).read_range("a.tar", 0, len(DATA), timeout_s=5) == DATA


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "status 503"),
        ("stall", "no whole reply within"),
        ("truncate", "ContentLengthError|Payload|bytes instead of"),
        ("reset", "Disconnected|reset"),
        ("whole", "status 200: the whole file came"),
        ("shifted", "Content-Range 'bytes "),
    ],
)
def test_each_fault_is_one_worth_another_try(folder, fault, message):
    with serve_ranges(folder) as server, fault_proxy(server.port, faults=[fault], share=1.0) as proxy:
        files = opened(proxy.url)
        proxy.broken = fault  # every time: aiohttp tries once more by itself after a reset
        with pytest.raises(TransientRemoteError, match=message):
            files.read_range("a.tar", 1000, 500, timeout_s=0.5)
        proxy.broken = None
        assert files.read_range("a.tar", 1000, 500, timeout_s=5) == DATA[1000:1500]


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"needs the package s3fs: pip install 'dstrain\[s3\]'"):
        opened("s3://bucket/x")


def test_stores_without_an_event_loop_have_a_time_limit_too(monkeypatch):
    memory = fsspec.filesystem("memory", skip_instance_cache=True)
    memory.pipe_file("/bucket/x/a.tar", DATA)
    monkeypatch.setattr(remote.fsspec, "filesystem", lambda *_, **__: memory)
    files = opened("hf://bucket/x")
    monkeypatch.setattr(memory, "_strip_protocol", lambda path: path.removeprefix("hf:/"))
    assert files.read_range("a.tar", 100, 50, timeout_s=5) == DATA[100:150]
    assert files.size("a.tar", timeout_s=5) == len(DATA)
    with pytest.raises(TransientRemoteError, match="bytes instead of"):
        files.read_range("a.tar", len(DATA) - 5, 10, timeout_s=5)
    with pytest.raises(DataError, match="no such file"):
        files.read_range("b.tar", 0, 10, timeout_s=5)
    monkeypatch.setattr(memory, "cat_file", lambda *_, **__: time.sleep(30))
    with pytest.raises(TransientRemoteError, match=r"within 0\.1 s"):
        files.read_range("a.tar", 0, 10, timeout_s=0.1)


@pytest.mark.parametrize("has_loop", [True, False])
def test_who_is_asked_to_stop_does_not_wait_for_a_store_that_does_not_answer(folder, monkeypatch, has_loop):
    asked = threading.Event()
    with serve_ranges(folder) as server:
        files = opened(server.url, should_leave=asked.is_set)
        if not has_loop:
            monkeypatch.setattr(files, "_is_http", False)
            monkeypatch.setattr(files, "_files", fsspec.filesystem("memory", skip_instance_cache=True))
            monkeypatch.setattr(
                files._files, "cat_file", lambda *_, **__: server.lock.acquire() and server.lock.release()
            )
        with server.lock:  # every request waits for it
            begin = time.monotonic()
            threading.Timer(0.1, asked.set).start()
            with pytest.raises(Interrupted, match="asked to stop"):
                files.read_range("a.tar", 0, 10, timeout_s=600)
            assert 0.1 <= time.monotonic() - begin < 10
        files.close()


def test_refusals_of_access_say_where_to_look():
    class DeniedError(Exception):
        status = 403

    class Files:
        async_impl = False

        def cat_file(self, *_, **__):
            raise DeniedError("no access for https://user:hush@host/x?sig=quiet")

        def _strip_protocol(self, path):
            return path

    files = opened("https://host/x?sig=quiet")
    files._files, files._is_http = Files(), False
    with pytest.raises(DataError, match=r"refuses access .*docs/remote-data\.md") as refusal:
        files.read_range("a.tar", 0, 10, timeout_s=5)
    assert "hush" not in str(refusal.value)
    assert "quiet" not in str(refusal.value)

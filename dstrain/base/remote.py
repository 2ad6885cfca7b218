"""The one door to remote stores, through fsspec: one ranged read, one size, with a time limit, and faults told apart.

A reply is taken only when it is exactly the bytes that were asked for; on HTTP also its status and Content-Range are
checked, and no body is read beyond the range. Whoever was asked to stop need not wait for a store that does not answer.
Here is one try: retries and deadlines are `data.remote_store`'s. Writes nothing anywhere and logs nothing.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import importlib
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import fsspec
import fsspec.asyn

from dstrain.base.errors import ConfigError, DataError, DstrainError
from dstrain.base.locations import RemoteUrl, scrub
from dstrain.base.protocols import Interrupted, ShouldLeave, never

_PACKAGES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "gcs": ("gcsfs", "gcs"),
    "az": ("adlfs", "azure"),
    "abfs": ("adlfs", "azure"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "hf": ("huggingface_hub", ""),
}
LOOK_S = 0.25
"""Between two looks at whether to leave, in seconds."""
_MISSING = (404, 410)
_DENIED = (401, 403)
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class TransientRemoteError(Exception):
    """One try failed in a way another may not: server errors, resets, timeouts, wrong or cut replies."""


class RemoteFolder:
    """A folder of files in a remote store. Any thread may call it; the work runs on fsspec's own event loop."""

    def __init__(
        self, url: RemoteUrl, *, connect_timeout_s: float = 20, anonymous: bool = False, should_leave: ShouldLeave = never
    ) -> None:  # fmt: skip
        """Make a client; nothing is asked of the store yet.

        Args:
            url: the folder.
            connect_timeout_s: until a connection must stand, in seconds.
            anonymous: send no credentials (public buckets).
            should_leave: asked in any thread while a reply is waited for: whether to raise `Interrupted` instead.

        Raises:
            ConfigError: the package for this kind of store is not installed.
        """
        self.url, self._should_leave = url, should_leave
        package, extra = _PACKAGES[url.scheme]
        try:
            importlib.import_module(package)
        except ImportError:
            mend = f"pip install 'dstrain[{extra}]'" if extra else f"pip install {package}"
            raise ConfigError(f"{url}: reading {url.scheme}:// needs the package {package}: {mend}") from None
        # The Hub's client asks for a file's facts before every range; others need no listings.
        options = _client_options(url.scheme, connect_timeout_s, anonymous)
        try:
            self._files: Any = fsspec.filesystem(
                url.scheme, skip_instance_cache=True, use_listings_cache=url.scheme == "hf", **options
            )
        except Exception as error:  # noqa: BLE001  (each library has faults of its own; told without their secrets)
            raise ConfigError(f"{url}: no client for this store: {self._told(error)}") from None
        self._is_http = url.scheme in ("http", "https")

    def read_range(self, name: str, offset: int, length: int, *, timeout_s: float) -> bytes:
        """Exactly `length` bytes of a file from `offset` on.

        Raises:
            TransientRemoteError: worth another try.
            DataError: the file is not there or may not be read.
            Interrupted: asked to stop while waiting.
        """
        url = self.url.file(name)
        if length == 0:
            return b""
        if self._is_http:
            data = self._run(name, timeout_s, self._http_range, url, offset, length)
        else:
            data = self._run(name, timeout_s, self._store_range, url, offset, length)
        if len(data) != length:
            raise TransientRemoteError(f"{len(data)} bytes instead of {length}")
        return bytes(data)

    def size(self, name: str, *, timeout_s: float) -> int:
        """Size of a file in bytes.

        Raises:
            TransientRemoteError: worth another try.
            DataError: the file is not there or may not be read.
            Interrupted: asked to stop while waiting.
        """
        url = self.url.file(name)
        if self._is_http:
            return int(self._run(name, timeout_s, self._http_size, url))
        found = self._run(name, timeout_s, self._store_size, url)
        if not isinstance(found, int) or found < 0:
            raise TransientRemoteError("the store does not tell the size")
        return found

    def close(self) -> None:
        """Close the connections."""
        session = getattr(self._files, "_session", None)
        loop = getattr(self._files, "loop", None)
        if self._is_http and session is not None and loop is not None and loop.is_running():
            asyncio.run_coroutine_threadsafe(session.close(), loop)

    def _run(self, name: str, timeout_s: float, function: Callable[..., Any], *arguments: Any) -> Any:
        shown = f"{self.url}/{name}"
        try:
            if getattr(self._files, "async_impl", False):
                return self._on_the_loop(function, *arguments, timeout_s=timeout_s)
            return self._in_thread(function, *arguments, timeout_s=timeout_s)
        except (DstrainError, TransientRemoteError, Interrupted):
            raise
        except (TimeoutError, fsspec.FSTimeoutError, asyncio.TimeoutError):
            raise TransientRemoteError(f"no whole reply within {timeout_s:.3g} s") from None
        except Exception as error:  # noqa: BLE001  (each library has faults of its own; told apart by status)
            status = _status(error)
            if isinstance(error, FileNotFoundError) or status in _MISSING:
                raise DataError(
                    f"{shown}: no such file in the store. Check the URL, or copy the dataset again"
                ) from None
            if status in _DENIED or (isinstance(error, PermissionError) and status is None) or _no_keys(error):
                raise DataError(
                    f"{shown}: the store refuses access ({self._told(error)}). Check the credentials "
                    "(docs/remote-data.md), or set data.storage.anonymous for a public bucket"
                ) from None
            raise TransientRemoteError(self._told(error)) from None

    def _on_the_loop(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """Run a coroutine of the client on fsspec's event loop; it is cancelled when this leaves without it."""
        limited = asyncio.wait_for(function(*arguments), timeout_s)
        reply = asyncio.run_coroutine_threadsafe(limited, self._files.loop)
        while not concurrent.futures.wait([reply], timeout=LOOK_S).done:
            if self._should_leave():
                reply.cancel()
                raise Interrupted("asked to stop while waiting for a remote store")
        return reply.result()

    def _in_thread(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> Any:
        """Run a blocking call that knows no timeout; one that is late is left behind in a daemon thread."""
        result: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.append(function(*arguments))
            except BaseException as error:  # noqa: BLE001  (raised again in the caller's thread)
                failure.append(error)

        thread = threading.Thread(target=work, name="dstrain-remote", daemon=True)
        thread.start()
        end = time.monotonic() + timeout_s
        while thread.is_alive() and (left := end - time.monotonic()) > 0:
            thread.join(min(LOOK_S, left))
            if thread.is_alive() and self._should_leave():
                raise Interrupted("asked to stop while waiting for a remote store")
        if failure:
            raise failure[0]
        if not result:
            raise TimeoutError
        return result[0]

    def _told(self, error: BaseException) -> str:
        text = scrub(str(error), self.url.secrets)
        return f"{type(error).__name__}: {text}" if text else type(error).__name__

    def _store_range(self, url: str, offset: int, length: int) -> Any:
        path = self._files._strip_protocol(url)
        if getattr(self._files, "async_impl", False):
            return self._files._cat_file(path, start=offset, end=offset + length)
        return self._files.cat_file(path, start=offset, end=offset + length, cache_type="none")

    def _store_size(self, url: str) -> Any:
        path = self._files._strip_protocol(url)
        if getattr(self._files, "async_impl", False):
            return self._async_size(path)
        return self._files.info(path)["size"]

    async def _async_size(self, path: str) -> Any:
        return (await self._files._info(path))["size"]

    async def _http_range(self, url: str, offset: int, length: int) -> bytes:
        session = await self._files.set_session()
        # Compressed bodies would have other lengths than the range.
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        async with session.get(self._files.encode_url(url), headers=headers) as reply:
            if reply.status != 206:
                if reply.status == 200 and offset == 0 and reply.content_length == length:
                    return await _body(reply, length)
                if reply.status == 200 and reply.headers.get("Accept-Ranges", "").lower() != "bytes":
                    raise DataError(
                        f"{self.url}: the server does not answer byte ranges: it sends the whole file for a part of it. "
                        "Serve the shards by one that does (nginx, Apache, any object store), or copy them to a local folder"
                    )
                raise _HttpStatusError(reply.status)  # one that offers ranges lost the question: worth another try
            found = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
            if found is None or (int(found[1]), int(found[2])) != (offset, offset + length - 1):
                raise TransientRemoteError(
                    f"Content-Range {reply.headers.get('Content-Range', '')[:80]!r} is not what was asked for"
                )
            return await _body(reply, length)

    async def _http_size(self, url: str) -> int:
        session = await self._files.set_session()
        headers = {"Accept-Encoding": "identity"}
        async with session.head(self._files.encode_url(url), headers=headers, allow_redirects=True) as reply:
            if reply.status != 200:
                raise _HttpStatusError(reply.status)
            size = reply.headers.get("Content-Length", "")
            if not size.isdigit():
                raise TransientRemoteError("the server does not tell the size")
            return int(size)


class _HttpStatusError(Exception):
    def __init__(self, status: int) -> None:
        hint = ": the whole file came instead of a range" if status == 200 else ""
        super().__init__(f"HTTP status {status}{hint}")
        self.status = status


async def _body(reply: Any, length: int) -> bytes:
    """At most one byte more than asked for, so that an endless body ends."""
    data = bytearray()
    async for piece in reply.content.iter_chunked(1 << 18):
        data += piece
        if len(data) > length:
            raise TransientRemoteError(f"more than the {length} bytes that were asked for")
    return bytes(data)


def _client_options(scheme: str, connect_timeout_s: float, anonymous: bool) -> dict[str, Any]:
    """Settings of each library's client: no retries of its own where they can be turned off, as ours has a deadline."""
    if scheme == "s3":
        config = {"connect_timeout": connect_timeout_s, "retries": {"max_attempts": 1}, "max_pool_connections": 64}
        return {"anon": anonymous, "config_kwargs": config}
    if scheme in ("gs", "gcs"):
        return {"token": "anon"} if anonymous else {}
    if scheme in ("az", "abfs"):
        return {"anon": anonymous}
    if scheme in ("http", "https"):
        return {"client_kwargs": {"trust_env": True}}
    return {"token": False} if anonymous else {}


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an exception of any of the libraries, where there is one."""
    seen: BaseException | None = error
    for _ in range(4):
        if seen is None:
            return None
        response = getattr(seen, "response", None)
        meta = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for found in (
            meta.get("HTTPStatusCode"),
            *(getattr(seen, name, None) for name in ("status", "status_code", "code")),
        ):
            if isinstance(found, int) and 100 <= found < 600:
                return found
        seen = seen.__cause__ or seen.__context__
    return None


def _no_keys(error: BaseException) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "CredentialRetrievalError", "DefaultCredentialsError")

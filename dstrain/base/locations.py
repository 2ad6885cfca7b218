"""Where data lies: a local folder or the URL of one, refused unless its scheme is known and its text means only itself.

No shell pipe, no brace, glob or environment expansion, no chained file systems, no way upwards. What is shown to people
(`clean`) never holds a password, key or query. Opens nothing.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dstrain.base.errors import DataError

REMOTE_SCHEMES = ("s3", "gs", "gcs", "az", "abfs", "http", "https", "hf")
"""What can be read over a network; `file` names a local folder."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")
_COLLAPSED = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/[^/]")  # what pathlib makes of a URL
_EXPANDED = re.compile(r"[\x00-\x20\x7f{}$*`|<>\"\\^]")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_ALLOWED = "a local folder, file:///folder, s3://, gs://, az://, abfs://, https://, http:// and hf://"


@dataclass(frozen=True)
class RemoteUrl:
    """A folder in an object store or on a web server."""

    scheme: str
    path: str = field(repr=False)
    """The URL up to its query, without a slash at the end; may hold userinfo."""
    query: str = field(default="", repr=False)
    """What follows `?`, e.g. an access signature; added to each file's URL again."""

    @property
    def clean(self) -> str:
        """The URL for people: without password and query."""
        head, _, tail = self.path.partition("://")
        authority, slash, rest = tail.partition("/")
        user, at, host = authority.rpartition("@")
        # abfs://CONTAINER@ACCOUNT: there it is a place, not a person.
        shown = authority if at and self.scheme == "abfs" and ":" not in user else host
        return f"{head}://{shown}{slash}{rest}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """Texts that no message may repeat."""
        authority = self.path.partition("://")[2].partition("/")[0]
        user = authority.rpartition("@")[0] if self.scheme != "abfs" else ""
        parts = [user, *user.split(":"), self.query, *(p.partition("=")[2] for p in self.query.split("&"))]
        texts = {text for part in parts for text in (part, unquote(part)) if len(text) > 3}
        return tuple(sorted(texts, key=len, reverse=True))

    def file(self, name: str) -> str:
        """The full URL of a file of the folder.

        Raises:
            DataError: the name is no plain file name.
        """
        checked = plain_name(name, source=self.clean)
        return f"{self.path}/{checked}" + (f"?{self.query}" if self.query else "")

    def child(self, name: str) -> RemoteUrl:
        """A folder inside this one, e.g. `train`."""
        return RemoteUrl(self.scheme, f"{self.path}/{plain_name(name, source=self.clean)}", self.query)

    def text(self) -> str:
        """The whole URL, secrets included: for opening, never for showing."""
        return self.path + (f"?{self.query}" if self.query else "")

    def __str__(self) -> str:
        return self.clean


Location = Path | RemoteUrl


def parse_location(text: str | Path | RemoteUrl) -> Location:
    """A local folder or a checked URL.

    Raises:
        DataError: the scheme is not allowed, or the URL holds something that would have to be expanded or goes upwards.
    """
    if isinstance(text, RemoteUrl):
        return text
    shown = _redacted(str(text))
    if isinstance(text, Path) or not (found := _SCHEME.match(text)):
        if _COLLAPSED.match(str(text)) and not Path(text).exists():
            raise DataError(
                f"{shown}: a URL needs two slashes and must not pass through pathlib, e.g. s3://bucket/shards"
            )
        return Path(text)
    scheme = found.group(1).lower()
    if scheme not in (*REMOTE_SCHEMES, "file") or not found.group(2):
        if not found.group(2) and Path(text).exists():
            return Path(text)  # a local name with a colon in it
        raise DataError(f"{shown}: refused: {scheme + ':'!r} is not a place data is read from. Allowed are {_ALLOWED}")
    if bad := _EXPANDED.search(text):
        raise DataError(f"{shown}: refused: {bad.group()!r} in a URL; write each folder out, nothing is expanded")
    if "::" in text:
        raise DataError(f"{shown}: refused: chained URLs ('::') are not opened. Allowed are {_ALLOWED}")
    if scheme == "file":
        return _local(text, shown)
    return _remote(text, scheme, shown)


def child_location(location: Location, name: str) -> Location:
    """A folder or file inside a location, e.g. `train`."""
    return location.child(name) if isinstance(location, RemoteUrl) else location / name


def plain_name(name: str, *, source: str) -> str:
    """`name`, if it is a plain file name.

    Raises:
        DataError: it has slashes, control characters or begins with a dot.
    """
    if not _NAME.fullmatch(name):
        raise DataError(f"{source}: {name!r} is not a plain file name")
    return name


def scrub(text: str, secrets: tuple[str, ...]) -> str:
    """`text` without the secrets, without userinfo and query of any URL in it, and of bounded length."""
    for secret in secrets:
        text = text.replace(secret, "***")
    text = re.sub(r"://[^\s/@'\"]+@", "://", text)
    text = re.sub(r"(://[^\s?'\"]*)\?[^\s'\")]*", r"\1", text)
    return " ".join(text.split())[:300]


def _redacted(text: str) -> str:
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://?", text)
    return scrub(text, ()) if found else text[:200].partition("?")[0] if _SCHEME.match(text) else text


def _local(text: str, shown: str) -> Path:
    parts = urlsplit(text)
    path = unquote(parts.path)
    if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
        raise DataError(
            f"{shown}: refused: a file URL is file:/// and an absolute path, without host, query or fragment"
        )
    if ".." in path.split("/") or "\x00" in path:
        raise DataError(f"{shown}: refused: '..' in a file URL")
    return Path(os.path.normpath(path))


def _remote(text: str, scheme: str, shown: str) -> RemoteUrl:
    if "#" in text:
        raise DataError(f"{shown}: refused: a fragment ('#') in a URL")
    body, _, query = text.partition("?")
    rest = body.partition("://")[2]
    authority, _, path = rest.partition("/")
    decoded = unquote(unquote(path))
    if not authority or ".." in decoded.split("/") or "." in decoded.split("/") or "//" in f"/{decoded}":
        raise DataError(
            f"{shown}: refused: a URL names a host or bucket and a folder, without '..', '.' or empty parts"
        )
    if scheme not in ("http", "https"):
        if query:
            raise DataError(f"{shown}: refused: a query ('?') means nothing in a {scheme}:// URL")
        if "@" in authority and (scheme != "abfs" or ":" in authority.rpartition("@")[0]):
            raise DataError(
                f"{shown}: refused: keys do not belong into a URL. Give them to the {scheme} library in its own way "
                "(environment, profile or credentials file; docs/remote-data.md)"
            )
    return RemoteUrl(scheme, f"{scheme}://{rest.rstrip('/')}", query)

"""Why a tar may be refused, by name, and the error that says so."""

from __future__ import annotations

from typing import Any

from dstrain.base.errors import DataError

REASONS = {
    "empty-file": "the file is empty",
    "html": "the file is a web page, mostly an error page saved in place of the shard",
    "git-lfs": "the file is a Git LFS pointer, not the data",
    "compressed": "the whole tar is compressed, which rules out random access",
    "cut": "the file ends early",
    "checksum": "a header checksum does not match",
    "zeroed-header": "an empty header stands where members go on",
    "no-end": "the end-of-archive mark is missing",
    "trailing-data": "bytes follow the end-of-archive mark",
    "link": "a link",
    "special": "a device, fifo or other special file",
    "sparse": "a sparse file",
    "unknown-type": "a member of unknown type",
    "oversized": "a member larger than the limit",
    "too-many": "more members than the limit",
    "size-field": "a size that is no number",
    "size-override": "two sizes that disagree",
    "extension": "an extended header that is damaged, repeated or not understood",
    "name": "a name that is empty or holds control characters",
    "duplicate-member": "one name, or one extension of one sample, twice",
    "split-sample": "members of one sample that are not side by side",
    "traversal": "a name that is absolute or goes up with '..'",
}
"""Why a tar may be refused."""


class TarRefusedError(DataError):
    """A tar is damaged, hostile or of a kind that is not read.

    Attributes:
        reason: a key of `REASONS`.
    """

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (str(self), self.reason)


def _rebuild(message: str, reason: str) -> TarRefusedError:
    return TarRefusedError(message, reason=reason)

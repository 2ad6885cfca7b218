"""Members of one tar grouped into samples just as webdataset 1.x groups them, or a named refusal.

A key is the path up to the first dot of its last part; what follows is the extension, in lower case, dots included.
Members without a dot and those of webdataset's metadata (`__x__`, `__x__/...`) belong to no sample. Where webdataset
would split a sample in two (its members are not side by side) or stop (one extension twice), this refuses.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dstrain.foreign.refusal import TarRefusedError
from dstrain.foreign.tar_walk import Members

# Both patterns are webdataset 1.0.2's own (tariterators.py: base_plus_ext and skip_meta): they define the format.
_KEY = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_METADATA = re.compile(r"__[^/]*__($|/)")
_HINT = "Write the tar again with the members of a sample side by side, e.g. `tar --sort=name`"


@dataclass
class Samples:
    """The samples of one tar, in order."""

    keys: list[str] = field(default_factory=list)
    """Key of each sample."""
    parts: list[dict[str, int]] = field(default_factory=list)
    """For each sample, extension to number of the member in `Members`."""

    @property
    def extensions(self) -> dict[str, int]:
        """How many samples have each extension, most common first."""
        counts: dict[str, int] = {}
        for part in self.parts:
            for name in part:
                counts[name] = counts.get(name, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def split_name(name: str) -> tuple[str, str] | None:
    """Key and lower-case extension of a member, or None where webdataset leaves it out."""
    slash = name.rfind("/") + 1
    dot = name.find(".", slash)
    if dot > slash:
        key, extension = name[:dot], name[dot + 1 :]
    else:  # no dot, or a name that begins with one: rare, and webdataset's pattern decides
        match = _KEY.match(name)
        if match is None:
            return None
        key, extension = match.group(1), match.group(2)
    if name.startswith("__") and (_METADATA.match(name) or ("/" not in name and name.endswith("__"))):
        return None
    return key, extension.lower()


def group_samples(members: Members, *, source: str) -> Samples:
    """Samples of the members of one tar.

    Args:
        members: what `walk_tar` returned.
        source: the tar's name, for messages.

    Raises:
        TarRefusedError: reason "duplicate-member" or "split-sample".
    """
    samples = Samples()
    keys, parts = samples.keys, samples.parts
    current: str | None = None
    part: dict[str, int] = {}
    for number, name in enumerate(members.names):
        found = split_name(name)
        if found is None:
            continue
        key, extension = found
        if key != current:
            part = {extension: number}
            keys.append(key)
            parts.append(part)
            current = key
        elif extension in part:
            raise TarRefusedError(
                f"{source}: refused (duplicate-member): {name!r} stands twice, or differs from another only in case",
                reason="duplicate-member",
            )
        else:
            part[extension] = number
    if len(set(keys)) != len(keys):
        seen: set[str] = set()
        twice = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise TarRefusedError(
            f"{source}: refused (split-sample): the members of sample {twice!r} are not side by side. {_HINT}",
            reason="split-sample",
        )
    return samples

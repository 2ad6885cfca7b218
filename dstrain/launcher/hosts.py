"""Hosts of a job: names that are safe in an argument list, hostfiles read and written, bad hosts left out.

Asks no host anything: reachability is the business of the checks before the first step.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dstrain.base.errors import ConfigError
from dstrain.base.rank_hosts import same_host

_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
_LINE = re.compile(r"(\S+)\s+slots=(\d{1,6})")
_LIMIT_BYTES = 1 << 20


@dataclass(frozen=True)
class Host:
    """A machine and how many ranks it takes."""

    name: str
    slots: int


def check_host(name: str) -> str:
    """Return a host name that is safe as a word of a command.

    Raises:
        ConfigError: it is not a plain DNS name or IPv4 address.
    """
    if _NAME.fullmatch(name) is None:
        raise ConfigError(f"host {name!r}: write letters, digits, dots and hyphens, beginning with a letter or digit")
    return name


def parse_hostfile(text: str, *, source: str) -> tuple[Host, ...]:
    """Read `host slots=N` lines; `#` begins a comment.

    Raises:
        ConfigError: a line of another form, a host twice, unequal or no slots, or no host at all.
    """
    hosts: list[Host] = []
    for number, line in enumerate(text.splitlines(), start=1):
        content = line.partition("#")[0].strip()
        if not content:
            continue
        match = _LINE.fullmatch(content)
        if match is None:
            raise ConfigError(f"{source}, line {number}: {content[:80]!r}: write `host slots=N`")
        hosts.append(Host(check_host(match[1]), int(match[2])))
    names = [host.name for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not hosts or twice:
        raise ConfigError(f"{source}: {'host ' + twice[0] + ' stands twice' if twice else 'names no host'}")
    if len({host.slots for host in hosts}) > 1 or hosts[0].slots < 1:
        # DeepSpeed's launcher computes LOCAL_RANK as rank modulo slots, which is wrong where slots differ.
        raise ConfigError(f"{source}: give every host the same number of slots, at least 1")
    return tuple(hosts)


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read a hostfile.

    Raises:
        ConfigError: see `parse_hostfile`; or the file is missing, too large or not UTF-8.
    """
    try:
        if path.stat().st_size > _LIMIT_BYTES:
            raise ConfigError(f"{path}: larger than {_LIMIT_BYTES} bytes, refused as a hostfile")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        # `deepspeed` itself would go on silently with this machine only.
        raise ConfigError(f"--hostfile {path}: cannot be read: {error}") from None
    return parse_hostfile(text, source=str(path))


def render_hostfile(hosts: Iterable[Host]) -> str:
    """Hosts in the form that `deepspeed --hostfile` reads."""
    return "".join(f"{host.name} slots={host.slots}\n" for host in hosts)


def without(hosts: Sequence[Host], bad: Iterable[str]) -> tuple[Host, ...]:
    """The hosts that are not named, in their order; `node1` and `node1.cluster` are one host, two full names are not."""
    names = list(bad)
    return tuple(host for host in hosts if not any(same_host(host.name, name) for name in names))


def is_this_machine(name: str) -> bool:
    """Whether a host's name is this machine's."""
    return same_host(name, socket.gethostname())


def num_processes(hosts: Iterable[Host]) -> int:
    """Ranks on all hosts together."""
    return sum(host.slots for host in hosts)

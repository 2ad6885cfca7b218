"""What this host can tell of its network when ranks wait for each other: links that went down, and the meeting point.

A collective that waits looks alike on both sides of a cut cable; a link that had a carrier when the rank began and has none
now does not, nor does a host that alone cannot reach where all ranks have met. Links are those of network cards and the one
that leads to the meeting point; those of containers come and go. Sends no data. Judges nothing: that is
`health.hang_report`'s. Standard library only.
"""

from __future__ import annotations

import fcntl
import socket
import struct
from pathlib import Path
from typing import Any

REACH_S = 1.5
"""Seconds to wait for an answer of the meeting point; on a network that works it takes milliseconds."""
_INTERFACES = Path("/sys/class/net")
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15


class NetworkView:
    """One host's view, for a job on several hosts."""

    def __init__(self, meeting_point: tuple[str, int] | None, *, interfaces: Path = _INTERFACES) -> None:
        """Note which links are up, and look up the meeting point's address now: later there may be no name server.

        Args:
            meeting_point: host and port where all ranks have met; None for a job on one host, which has nothing to lose.
            interfaces: where the kernel shows them.
        """
        self._interfaces = interfaces
        self._address = None if meeting_point is None else _address(*meeting_point)
        self._up: list[str] = []
        if meeting_point is not None:
            self._up = [name for name in self._names() if self._has_carrier(name)]

    def facts(self, *, timeout_s: float = REACH_S) -> dict[str, Any]:
        """Links that have gone down since, and whether the meeting point answers (None: not asked, or not known)."""
        lost = [name for name in self._up if not self._has_carrier(name)]
        reaches = None if self._address is None else _answers(self._address, timeout_s=timeout_s)
        return {"lost_links": lost, "reaches_meeting_point": reaches}

    def _names(self) -> list[str]:
        try:
            found = sorted(path for path in self._interfaces.iterdir() if path.name != "lo")
        except OSError:  # not shown in this container
            return []
        own = _own_address(self._address)
        return [path.name for path in found if (path / "device").exists() or own in _addresses(path.name)]

    def _has_carrier(self, name: str) -> bool:
        try:
            return (self._interfaces / name / "carrier").read_text(encoding="ascii").strip() == "1"
        except (OSError, ValueError):  # gone, or switched off by an administrator
            return False


def _address(host: str, port: int) -> tuple[str, int] | None:
    try:
        return socket.gethostbyname(host), port
    except OSError:
        return None


def _answers(address: tuple[str, int], *, timeout_s: float) -> bool:
    """Whether somebody is there, be it with a refusal."""
    try:
        socket.create_connection(address, timeout=timeout_s).close()
    except ConnectionRefusedError:  # the host is there, and nobody listens any more
        return True
    except OSError:
        return False
    return True


def _own_address(peer: tuple[str, int] | None) -> str:
    """This host's address on the way to a peer; nothing is sent."""
    if peer is None:
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(peer)
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def _addresses(interface: str) -> list[str]:
    """An interface's IPv4 address, if it has one."""
    request = struct.pack("256s", interface.encode()[:_NAME_BYTES])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            return [socket.inet_ntoa(fcntl.ioctl(probe, _SIOCGIFADDR, request)[20:24])]
        except OSError:
            return []

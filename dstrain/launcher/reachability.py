"""Does each host of a hostfile answer over ssh, without a password and without a question: asked of all at once, with a short deadline.

What `deepspeed --hostfile` needs before it can start anything. Host names are checked before they become words of a command,
and nothing is read by a shell but the one that ssh starts for `true`.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dstrain.launcher.hosts import Host, check_host

CONNECT_S = 5
_ALL_IN_ALL_S = 15.0
_AT_ONCE = 64


@dataclass(frozen=True)
class Answer:
    """Of one host."""

    host: str
    reached: bool
    why: str = ""
    fix: str = ""


def command_for(host: str) -> list[str]:
    """The question to one host, as an argument list.

    Raises:
        ConfigError: the name is none.
    """
    return [
        "ssh",
        "-o",
        "BatchMode=yes",
        "-o",
        f"ConnectTimeout={CONNECT_S}",
        "-o",
        "ConnectionAttempts=1",
        "--",
        check_host(host),
        "true",
    ]


def ask_hosts(hosts: Sequence[Host]) -> list[Answer]:
    """All answers, in the hosts' order; takes as long as the slowest, at most a quarter of a minute.

    Raises:
        ConfigError: a host's name is none.
    """
    commands = [command_for(host.name) for host in hosts]
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(hosts) or 1)) as pool:
        return list(pool.map(lambda pair: _ask(pair[0].name, pair[1]), zip(hosts, commands)))


def _ask(host: str, command: list[str]) -> Answer:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ALL_IN_ALL_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        return Answer(host, False, "ssh is not installed on this machine", "install openssh-client, or start with srun")
    except subprocess.TimeoutExpired:
        return Answer(
            host, False, f"no answer within {_ALL_IN_ALL_S:g} s", "its shell's start files may wait for something"
        )
    return Answer(host, True) if done.returncode == 0 else meaning(host, done.returncode, done.stderr)


def meaning(host: str, code: int, said: str) -> Answer:
    """What a failed ssh says, and what to do. Pure.

    Args:
        host: the one asked.
        code: ssh's exit code: 255 for its own faults.
        said: on its standard error.
    """
    text = " ".join(said.split())
    known = (
        ("Could not resolve", "its name is not known here", "check the hostfile, /etc/hosts and the name server"),
        (
            "timed out",
            "it does not answer: off, cut off, or behind a firewall",
            "check that the host is up and port 22 is open",
        ),
        ("No route to host", "there is no way to it", "check that the host is up and its cable"),
        ("Network is unreachable", "this machine has no way to its network", "check this machine's network and routes"),
        ("Connection refused", "the host is there, but no ssh server", "start sshd there"),
        (
            "Host key verification failed",
            "its key is not known here or has changed",
            "ssh to it once by hand and accept the key, on every host",
        ),
        ("Permission denied", "it wants a password", "put this user's public key into ~/.ssh/authorized_keys there"),
    )
    for mark, why, fix in known:
        if mark in text:
            return Answer(host, False, why, fix)
    shown = f": {text[:200]}" if text else ""
    if code != 255:
        return Answer(
            host, False, f"`true` ended with {code} there{shown}", "look at the shell's start files of that account"
        )
    return Answer(host, False, f"ssh failed{shown}", f"try `ssh {host} true` by hand")

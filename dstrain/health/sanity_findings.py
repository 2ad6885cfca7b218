"""What a check before the first step found: a level, a sentence, the fix in plain words, and whose machine it is about.

Pure but for `refuse`, which raises. Collects nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dstrain.base.errors import ConfigError, DstrainError, ExitCode, MachineError, PeerError, StorageError

Level = Literal["ok", "skipped", "warning", "failed"]
_ORDER: tuple[Level, ...] = ("ok", "skipped", "warning", "failed")
_SHOWN = 8


@dataclass(frozen=True)
class Finding:
    """One line of a report."""

    check: str
    """clock, disk, ..."""
    level: Level
    text: str
    """What was seen, with the number."""
    fix: str = ""
    """What to do about it; empty when there is nothing to do."""
    ranks: tuple[int, ...] = ()
    """Whose machine it is about; empty when it is about none in particular."""
    hosts: tuple[str, ...] = ()
    """Of each of `ranks`."""
    code: int = int(ExitCode.UNHEALTHY_NODE)
    """The exit code when it failed: 77 a machine's, 78 the configuration's, 76 storage's."""

    def line(self) -> str:
        """One line for people."""
        return f"{self.check}: {self.text}" + (
            f": {self.fix}" if self.fix and self.level in ("warning", "failed") else ""
        )

    def to_json(self) -> dict[str, Any]:
        """For events and `--json`."""
        return {name: value for name, value in asdict(self).items() if value not in ("", ())}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        """The inverse of `to_json`."""
        return cls(**{**data, "ranks": tuple(data.get("ranks", ())), "hosts": tuple(data.get("hosts", ()))})


def about(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Name ranks and where they are: `ranks 2, 3 on node2`.

    Args:
        ranks: at least one.
        hosts: of rank 0, 1, ...
    """
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (", ..." if len(ranks) > _SHOWN else "")
    places = list(dict.fromkeys(hosts[rank] for rank in ranks))
    where = ", ".join(places[:_SHOWN]) + (", ..." if len(places) > _SHOWN else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown} on {where}"


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level of all."""
    return max((finding.level for finding in findings), key=_ORDER.index, default="ok")


def summary(findings: Sequence[Finding]) -> str:
    """All that is well in one line; what is not has lines of its own."""
    good = "; ".join(f"{finding.check} {finding.text}" for finding in findings if finding.level == "ok")
    bad = [finding.check for finding in findings if finding.level in ("warning", "failed")]
    return (good or "nothing was checked") + (f"; see {', '.join(dict.fromkeys(bad))}" if bad else "")


def refuse(findings: Sequence[Finding], *, rank: int) -> None:
    """Leave when something failed; every rank with the same code, the first rank of each machine at fault with the message.

    The configuration's faults come first: they are the likelier ones and the easier mend.

    Raises:
        ConfigError, StorageError, MachineError: on the ranks whose machine it is, or on rank 0 when it is nobody's.
        PeerError: on all others.
    """
    failed = sorted((f for f in findings if f.level == "failed"), key=lambda f: f.code != ExitCode.BAD_INPUT)
    if not failed:
        return
    first = failed[0]
    if rank in _speakers(first):
        raise _error(first)
    raise PeerError(first.line(), exit_code=first.code)


def _speakers(finding: Finding) -> set[int]:
    """The first rank of each host at fault: one message a host, and an exit file that names each."""
    first: dict[str, int] = {}
    for rank, host in zip(finding.ranks, finding.hosts):
        first.setdefault(host, rank)
    return set(first.values()) or {0}


def _error(finding: Finding) -> DstrainError:
    kinds = {ExitCode.BAD_INPUT: ConfigError, ExitCode.RETRY_HERE: StorageError}
    return kinds.get(ExitCode(finding.code), MachineError)(finding.line())

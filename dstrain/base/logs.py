"""Log lines for people on stderr, rank 0 unless asked. Numbers for tools go through `monitor`, not here.

Secrets are replaced in every line and in the traceback of an unexpected error (`base.secrets`).
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from types import TracebackType

from dstrain.base.secrets import redact
from dstrain.base.world import World


def get_logger(name: str) -> logging.Logger:
    """The logger of a module, under the `dstrain` root."""
    return logging.getLogger(name if name.startswith("dstrain") else f"dstrain.{name}")


def configure_logs(world: World, *, level: str | None = None) -> None:
    """Send dstrain's log lines to stderr; ranks above 0 speak from WARNING up and say who they are.

    Args:
        world: whose voice this is.
        level: overrides the default, also through DSTRAIN_LOG_LEVEL.
    """
    chosen = (level or os.environ.get("DSTRAIN_LOG_LEVEL") or ("INFO" if world.is_first else "WARNING")).upper()
    prefix = "" if world.size == 1 else f"[rank {world.rank}] " if not world.is_first else ""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(RedactingFormatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("dstrain")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(chosen)
    sys.excepthook = _print_redacted


class RedactingFormatter(logging.Formatter):
    """A formatter whose finished line, traceback included, holds no secret that can be recognised."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for people."""
        return redact(super().format(record))


def _print_redacted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if sys.stderr is not None:
        sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))
        sys.stderr.flush()

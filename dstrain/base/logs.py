"""Log lines for people on stderr, rank 0 unless asked. Numbers for tools go through `monitor`, not here."""

from __future__ import annotations

import logging
import os
import sys

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
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger("dstrain")
    root.handlers[:] = [handler]
    root.propagate = False
    root.setLevel(chosen)

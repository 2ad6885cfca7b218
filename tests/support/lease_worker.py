"""A job without training for lease tests: owns a run folder, publishes folders as fast as it can, and says how that went.

Commands on stdin, answers on stdout, one line each: `own FOLDER` takes the lease as a job on another machine would,
removes what others left in staging and answers with what it found published; `go` publishes until it is refused; `check`
asks for the lease; `try FOLDER` takes a lease once, at once; `leave` gives it back. With `--naive` it does not ask before
it publishes and is stopped by no fault.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dstrain.base.errors import DstrainError
from dstrain.base.storage import make_directory, publish_directory, remove_directory, write_text
from dstrain.health import lease as lease_module
from dstrain.health.lease import RunLease


def published(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.glob("step-*"))


def own(folder: Path) -> RunLease:
    lease = RunLease(folder, patient=True).__enter__()
    for staging in folder.glob(".staging-*"):
        remove_directory(staging)
    return lease


def publish_until_refused(folder: Path, lease: RunLease, *, naive: bool) -> str:
    number = len(published(folder))
    while True:
        number += 1
        staging = folder / f".staging-{number}-{os.getpid()}"
        try:
            make_directory(staging)
            write_text(staging / "owner", str(os.getpid()))
            if not naive:
                lease.check()
            publish_directory(staging, folder / f"step-{number:08d}")
        except DstrainError as error:
            if not naive:
                return f"{type(error).__name__}: {error}"


def main(naive: bool) -> None:
    lease: RunLease | None = None
    folder = Path()
    for line in sys.stdin:
        command, _, rest = line.strip().partition(" ")
        answer = "done"
        try:
            if command in ("own", "try"):
                folder = Path(rest)
                lease = own(folder) if command == "own" else RunLease(folder).__enter__()
                answer = json.dumps({"epoch": lease.epoch, "published": published(folder)})
            elif command == "go":
                assert lease is not None
                answer = publish_until_refused(folder, lease, naive=naive)
                lease.__exit__(None, None, None)
            elif command == "check":
                assert lease is not None
                lease.check()
            elif command == "leave" and lease is not None:
                lease.__exit__(None, None, None)
                lease = None
        except DstrainError as error:
            answer = f"{type(error).__name__}: {error}"
        print(answer, flush=True)


if __name__ == "__main__":
    if sys.argv[1]:  # as if on a machine of its own, where silence is short
        lease_module.this_machine = lambda: sys.argv[1]  # type: ignore[assignment]
        lease_module.SILENT_AFTER_S, lease_module.HEARTBEAT_S, lease_module.LOOK_EVERY_S = 0.1, 0.01, 0.005
    main("--naive" in sys.argv)

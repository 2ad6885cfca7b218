"""One attempt alone: its code, its log, and nothing left, also after an error of ours."""

from __future__ import annotations

import os
import sys
import uuid
from pathlib import Path

import pytest

from dstrain.base.errors import ExitCode, StorageError
from dstrain.base.world import World
from dstrain.health.outcomes import write_exit
from dstrain.launcher.attempt import Attempt
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.process_group import ProcessGroup
from dstrain.launcher.starters import TOKEN
from dstrain.launcher.stop_signals import StopSignals


def _attempt(folder: Path, code: str, token: str, *, log: str = "log") -> Attempt:
    return Attempt(
        (sys.executable, "-c", code), {**os.environ, TOKEN: token}, token=token, log=folder / log,
        policy=RestartPolicy(grace_s=0.1), run_folder=folder, local_ranks=0, say=lambda text: None,
    )  # fmt: skip


def test_code_and_output_come_back_and_children_left_behind_are_ended(tmp_path: Path) -> None:
    leaves = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("out"); print("err", file=sys.stderr); sys.exit(5)
"""
    token = uuid.uuid4().hex
    with StopSignals() as stop, _attempt(tmp_path, leaves, token) as attempt:
        end = attempt.run(stop)
    assert (end.launcher_code, end.unkillable) == (5, ())
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["err", "out"]
    assert ProcessGroup(token).members() == []


def test_an_error_of_the_supervisor_ends_the_attempt(tmp_path: Path) -> None:
    token = uuid.uuid4().hex

    def fail() -> None:
        with _attempt(tmp_path, "import time; time.sleep(600)", token) as attempt:
            while not attempt.group.members():
                pass
            raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        fail()
    assert ProcessGroup(token).members() == []


@pytest.mark.parametrize(("code", "launcher_code"), [(ExitCode.RETRY_HERE, 137), (ExitCode.SAVED_REQUEUE, 3)])
def test_a_launcher_that_waits_for_a_lost_machine_is_ended_once_a_rank_elsewhere_has_failed(
    tmp_path: Path, code: ExitCode, launcher_code: int
) -> None:
    token, said = uuid.uuid4().hex, list[str]()
    wait = 600 if code is ExitCode.RETRY_HERE else 3  # long enough for two looks
    attempt = Attempt(
        (sys.executable, "-c", f"import sys, time; time.sleep({wait}); sys.exit(3)"), {**os.environ, TOKEN: token}, token=token,
        log=tmp_path / "log", policy=RestartPolicy(grace_s=0.1, peer_grace_s=0.1), run_folder=tmp_path, local_ranks=0,
        say=said.append, ranks_elsewhere=True,
    )  # fmt: skip
    write_exit(tmp_path, World(rank=1, size=2), code=code, cause="the cable", step=3)
    with StopSignals() as stop, attempt:
        assert attempt.run(stop).launcher_code == launcher_code
    assert [line.startswith("rank 1 is gone, what is left did not follow") for line in said] == [True] * (wait == 600)
    assert ProcessGroup(token).members() == []


def test_a_log_that_cannot_be_written_starts_nothing(tmp_path: Path) -> None:
    token = uuid.uuid4().hex
    with pytest.raises(StorageError, match="nowhere"):
        _attempt(tmp_path, "pass", token, log="nowhere/log")
    assert ProcessGroup(token).members() == []

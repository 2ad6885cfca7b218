"""Secrets and ports stay closed (promise P16): no secret in anything a run leaves, files private, only loopback listens."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import psutil
import pytest
import yaml

from dstrain.base.secrets import REDACTED
from tests.support.runs import build_tiny_shards, pretrain_job, pretrain_settings, step_events, wait_for, write_config
from tests.support.secret_formats import secret_formats

pytestmark = pytest.mark.fault

CANARY = "canary-value-of-the-environment-41"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def _environment() -> dict[str, str]:
    """Every known form of a secret, and one value without any form, in variables that nobody asked for."""
    hidden = {f"SECRET_{n}": text for n, (text, _) in enumerate(secret_formats().values()) if "\0" not in text}
    return {**hidden, "PLAIN_VARIABLE": CANARY}


def _secrets_in(folder: Path) -> list[tuple[str, str]]:
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            found += [(path.name, name) for name, (_, secret) in secret_formats().items() if secret.encode() in data]
            found += [(path.name, "canary")] if CANARY.encode() in data else []
    return found


def test_nothing_that_a_run_leaves_holds_a_secret_and_all_of_it_is_private(tmp_path: Path, shards: Path) -> None:
    """Secrets stand in the environment and in the configuration, under a key whose texts are free."""
    run = tmp_path / "run"
    typed = {"enabled": False, "prof_ops": [text for text, _ in secret_formats().values()]}
    sections = {"monitor": {"tensorboard": True}, "train": {"max_steps": 2}, "deepspeed": {"comms_logger": typed}}
    config = write_config(tmp_path / "settings" / "run.yaml", pretrain_settings(shards, run, **sections))
    with pretrain_job(config, world_size=2, environment=_environment()) as job:
        job.succeed()
    left = tmp_path / "left"
    left.mkdir()
    for log in job.logs:
        (left / log.name).write_bytes(log.read_bytes())
    expected = (
        "config.yaml",
        "environment.json",
        "events.jsonl",
        "exit/rank-00000.json",
        "attempts/0001.json",
        "deepspeed.json",
    )
    for name in expected:
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").iterdir()) != []
    assert _secrets_in(left) == []
    assert _secrets_in(run) == []
    kept = yaml.safe_load((run / "config.yaml").read_text())
    assert REDACTED in str(kept["deepspeed"]["comms_logger"])
    assert kept["data"]["path"] == str(shards)
    modes = {str(path.relative_to(run)): stat.S_IMODE(path.stat().st_mode) for path in [run, *run.rglob("*")]}
    assert {name: oct(mode) for name, mode in modes.items() if mode & 0o077} == {}


def test_a_secret_in_a_wrong_configuration_is_not_repeated_in_the_message(tmp_path: Path, shards: Path) -> None:
    text, secret = secret_formats()["url password"]
    settings = pretrain_settings(
        shards, tmp_path / "run", data={"path": f"{text}?sig=abcdefgh12345678"}, train={"max_stepss": 5}
    )
    with pretrain_job(
        write_config(tmp_path / "run.yaml", settings), f"data.sequence_length=password={secret}", world_size=1
    ) as job:
        assert job.wait() == [78]
        output = job.output()
    assert "max_stepss" in output
    assert secret not in output
    assert "abcdefgh12345678" not in output


def _listening(pids: list[int]) -> set[tuple[str, int]]:
    """Address and port of every listening TCP socket of these processes, read from /proc/net/tcp and tcp6 by psutil."""
    found = set()
    for pid in pids:
        for connection in psutil.Process(pid).net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN or (connection.type == 2 and not connection.raddr):
                found.add((connection.laddr.ip, connection.laddr.port))
    return found


def _family(pid: int) -> list[int]:
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def test_the_ranks_of_one_host_listen_on_the_loopback_interface_only(tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    settings = pretrain_settings(shards, run, train={"max_steps": 100_000}, checkpoint={"every_steps": None})
    with pretrain_job(write_config(tmp_path / "run.yaml", settings), world_size=2) as job:
        wait_for(lambda: max(step_events(run), default=0) >= 2, job=job)
        bound = _listening([pid for process in job.processes for pid in _family(process.pid)])
    assert bound != set()
    assert {address for address, _ in bound} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, bound


def test_a_place_where_everybody_may_write_is_refused(tmp_path: Path, shards: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, tmp_path / "open" / "run"))
    with pretrain_job(config, world_size=1) as job:
        assert job.wait() == [78]
        assert "every user of this machine may write into" in job.output()
    assert not os.path.exists(tmp_path / "open" / "run")

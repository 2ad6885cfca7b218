"""Faults that can be seen before anything is started."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError, MachineError
from dstrain.launcher.start_checks import (
    check_batch,
    check_deepspeed_environment,
    check_gpus,
    check_port,
    check_shared,
)

MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
23 22 0:21 / /dev/shm rw - tmpfs tmpfs rw
30 22 0:40 / /home rw - nfs4 server:/home rw
"""


def test_a_port_in_use_is_refused_and_a_free_one_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"--port {port}: cannot be listened on.*leave it out"):
            check_port(port, listens_here=True)
        check_port(port, listens_here=False)
    check_port(port, listens_here=True)


@pytest.mark.parametrize("port", [-1, 0, 80, 65536])
def test_what_is_no_port_is_refused(port: int) -> None:
    with pytest.raises(ConfigError, match="1024 to 65535"):
        check_port(port, listens_here=False)


def test_more_ranks_than_gpus_are_refused() -> None:
    check_gpus(4, gpus=4, wants_gpus=True)
    check_gpus(4, gpus=0, wants_gpus=False)
    with pytest.raises(ConfigError, match="8 ranks on this machine, which shows 4 GPUs: give --num-processes 4"):
        check_gpus(8, gpus=4, wants_gpus=True)
    with pytest.raises(MachineError, match="shows no GPU"):
        check_gpus(1, gpus=0, wants_gpus=True)


def test_more_ranks_than_rows_are_refused_and_unequal_shares_remarked() -> None:
    assert check_batch(4, global_batch=12) is None
    remark = check_batch(8, global_batch=12)
    assert remark is not None
    assert "8 or 16" in remark
    with pytest.raises(ConfigError, match=r"16 ranks and train.global_batch=12.*at most 12 ranks.*multiple of 16"):
        check_batch(16, global_batch=12)


@given(world=st.integers(1, 300), batch=st.integers(1, 5000))
def test_a_remark_names_two_batches_that_divide(world: int, batch: int) -> None:
    if world > batch:
        return
    remark = check_batch(world, global_batch=batch)
    assert (remark is None) == (batch % world == 0)
    if remark is not None:
        low, high = (int(word) for word in remark.split("others; ")[1].removesuffix(" would").split(" or "))
        assert low % world == high % world == 0
        assert low < batch < high


def test_a_run_folder_in_memory_is_refused_for_several_hosts() -> None:
    check_shared(Path("/dev/shm/run"), hosts=1, mounts=MOUNTS)
    check_shared(Path("/home/me/run"), hosts=8, mounts=MOUNTS)
    with pytest.raises(ConfigError, match=r"run_folder /dev/shm/run: /dev/shm is tmpfs.*other 7"):
        check_shared(Path("/dev/shm/run"), hosts=8, mounts=MOUNTS)


@pytest.mark.parametrize("place", ["home", "here"])
@pytest.mark.parametrize(("line", "number"), [("", 2), ("# why", 2), ("export A=1", 2), ("A", 2)])
def test_a_deepspeed_env_that_its_launcher_would_end_on_is_refused(
    tmp_path: Path, place: str, line: str, number: int
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "DS_ENV_FILE": "my_env"}
    check_deepspeed_environment(environment, folder=tmp_path / "here")
    (tmp_path / place / "my_env").write_text(f"NCCL_DEBUG=INFO\n{line}\nB=a=b\n")
    with pytest.raises(ConfigError, match=rf"{place}/my_env, line {number}: "):
        check_deepspeed_environment(environment, folder=tmp_path / "here")
    (tmp_path / place / "my_env").write_text("NCCL_DEBUG=INFO\nB=a=b\n")
    check_deepspeed_environment(environment, folder=tmp_path / "here")

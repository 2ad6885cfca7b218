"""Stop requests, leases and launchers with real processes: what is asked to stop saves and says so; nothing is shared."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dstrain.checkpoint.reader import newest_valid
from tests.support.runs import (
    ROOT,
    build_tiny_shards,
    free_port,
    pretrain_settings,
    step_events,
    wait_for,
    write_config,
)  # fmt: skip
from tests.support.zygote import Zygote

pytestmark = pytest.mark.fault

LONG = {"train": {"max_steps": 100_000}, "checkpoint": {"every_steps": None}}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


def test_one_signal_to_one_rank_stops_all_ranks_at_one_saved_step_and_a_second_job_is_refused_meanwhile(
    tmp_path: Path, shards: Path, zygote: Zygote
) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, run, **LONG))
    with zygote.start_ranks(config, world_size=2) as job:
        wait_for(lambda: max(step_events(run), default=0) >= 3, job=job)
        with zygote.start_ranks(config, world_size=1) as second:
            assert second.wait() == [80]
            assert "in use by process" in second.output()
            assert "Traceback" not in second.output()
        job.signal(signal.SIGTERM, ranks=[1])
        assert job.wait() == [75, 75], job.output()
    last = max(step_events(run))
    found = newest_valid(run / "checkpoints")
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == last
    exits = [json.loads(p.read_text()) for p in sorted((run / "exit").glob("*.json"))]
    assert [(e["code"], e["step"]) for e in exits] == [(75, last)] * 2
    assert {e["cause"] for e in exits} >= {"SIGTERM"}
    assert not (run / "lease.json").exists()

    again = ["train.max_steps=" + str(last + 2)]
    with zygote.start_ranks(config, *again, world_size=1) as resumed:
        resumed.succeed()
    assert max(step_events(run)) == last + 2
    started = time.monotonic()
    with zygote.start_ranks(config, *again, world_size=1) as complete:
        complete.succeed()
        assert "already complete" in complete.output()
    assert time.monotonic() - started < 60


def test_the_deepspeed_launcher_passes_the_exit_code_on_and_no_compiler_or_op_cache_is_needed(
    tmp_path: Path, shards: Path
) -> None:
    """A lock left by a killed build is planted where torch would wait for it, and no compiler is on the PATH."""
    cache = tmp_path / "extensions"
    lock = cache / "py_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (time.time() - 7200, time.time() - 7200))
    run = tmp_path / "run"
    config = write_config(
        tmp_path / "run.yaml", pretrain_settings(shards, run, engine={"precision": "auto"}, train={"max_steps": 3})
    )
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for tool in ("env", "bash", "sh", "uname"):
        real = next((Path(d) / tool for d in ("/bin", "/usr/bin") if (Path(d) / tool).exists()), None)
        if real is not None:
            (bin_folder / tool).symlink_to(real)
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        sys.executable, str(launcher), "--num_accelerators", "2", "--master_port", str(free_port()),
        str(ROOT / "launch" / "pretrain.py"), "--config", str(config),
    ]  # fmt: skip
    environment = {**os.environ, "PATH": str(bin_folder), "TORCH_EXTENSIONS_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert sorted(step_events(run)) == [1, 2, 3]
    assert not lock.exists()
    assert re.search(r"left 12\d minutes ago by a killed build", done.stdout + done.stderr)

    command[-2:] = ["--config", str(config), "train.global_batch=1000000"]
    failed = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False
    )
    assert failed.returncode == 78, failed.stderr[-2000:]
    assert "Traceback" not in failed.stderr
    assert "train.global_batch" in failed.stderr


def test_torchrun_starts_the_same_script(tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, run, train={"max_steps": 2}))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()),
        str(ROOT / "launch" / "pretrain.py"), "--config", str(config),
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["launcher"], environment["world_size"]) == ("torchrun", 2)


def test_ranks_whose_launcher_is_killed_save_and_leave_by_themselves(tmp_path: Path, shards: Path) -> None:
    run = tmp_path / "run"
    config = write_config(tmp_path / "run.yaml", pretrain_settings(shards, run, **LONG))
    launcher = Path(sys.executable).parent / "deepspeed"
    command = [
        sys.executable, str(launcher), "--num_accelerators", "2", "--master_port", str(free_port()),
        str(ROOT / "launch" / "pretrain.py"), "--config", str(config),
    ]  # fmt: skip
    log = (tmp_path / "log").open("wb")
    launched = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while max(step_events(run), default=0) < 3:
            assert launched.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        middle = _children(launched.pid)  # launch.py, the parent of the ranks
        for pid in middle:
            os.kill(pid, signal.SIGKILL)
        launched.kill()
        while not (run / "exit" / "rank-00001.json").exists() or not (run / "exit" / "rank-00000.json").exists():
            assert time.monotonic() < deadline, "the orphans went on"
            time.sleep(0.05)
    finally:
        os.killpg(launched.pid, signal.SIGKILL)
        launched.wait()
        log.close()
    exits = [json.loads(p.read_text()) for p in sorted((run / "exit").glob("*.json"))]
    assert [e["code"] for e in exits] == [75, 75]
    assert "the launcher is gone" in {e["cause"] for e in exits}
    found = newest_valid(run / "checkpoints")
    assert found.checkpoint is not None
    assert found.checkpoint.manifest.step == exits[0]["step"]


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found

"""`dstrain launch`: which launcher is chosen, golden texts of --dry-run, and faults that are one line."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import launch
from dstrain.cli.main import main
from dstrain.launcher.history import AttemptRecord, History
from tests.support.runs import pretrain_settings, write_config


@pytest.fixture(autouse=True)
def _no_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NTASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    """The command makes what it writes private, for the rest of its process."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", pretrain_settings(tmp_path / "shards", tmp_path / "run"))


def _dry(config: Path, *arguments: str, capsys: pytest.CaptureFixture[str], stage: str = "pretrain") -> str:
    assert main(["launch", stage, str(config), "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    text = text.replace(sys.executable, "PYTHON").replace(str(config.parent), "HERE")
    return re.sub(r"(port[ =]|PORT=)\d+", r"\1PORT", text)


_TAIL = "# restarts: at most 10; given up after 3 ends without progress\n"
_UNSET = "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE CROSS_RANK CROSS_SIZE MASTER_ADDR MASTER_PORT DSTRAIN_ATTEMPT"
_SLURM = " SLURM_NTASKS SLURM_PROCID SLURM_STEP_ID"


def test_one_process_is_plain_python(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _dry(config, "train.max_steps=3", capsys=capsys) == (
        f"export DS_ACCELERATOR=cpu\n{_UNSET}{_SLURM}\n"
        f"PYTHON -u -m dstrain.cli.main pretrain --config HERE/run.yaml train.max_steps=3\n{_TAIL}"
    )
    assert not (config.parent / "run").exists()


def test_several_processes_are_deepspeed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _dry(config, "--num-processes", "2", "seed=1", capsys=capsys) == (
        f"export DS_ACCELERATOR=cpu\n{_UNSET}{_SLURM}\n"
        "PYTHON -m deepspeed.launcher.runner --hostfile /dev/null --num_accelerators 2 --master_port PORT --no_local_rank "
        f"--log_level critical --module dstrain.cli.main pretrain --config HERE/run.yaml seed=1\n{_TAIL}"
    )


def test_torchrun_when_asked_for(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _dry(config, "--with", "torchrun", "--num-processes", "2", "--max-restarts", "4", capsys=capsys)
    assert "PYTHON -m torch.distributed.run --nnodes 1 --nproc-per-node 2" in text
    assert text.endswith("# restarts: at most 4; given up after 3 ends without progress\n")


def test_a_hostfile_is_deepspeed_over_its_hosts(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("n1 slots=4\nn2 slots=4\n")
    assert "--hostfile HERE/run/logs/hosts-0001 --force_multi --launcher pdsh --master_addr n1" in _dry(
        config, "--hostfile", str(tmp_path / "hosts"), capsys=capsys
    )


def test_an_allocation_of_several_nodes_is_srun(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "3")
    assert _dry(config, capsys=capsys) == (
        f"export DS_ACCELERATOR=cpu\nexport MASTER_PORT=PORT\n{_UNSET}\n"
        "srun --nodes=2 --ntasks=6 --ntasks-per-node=3 --nodelist=n1,n2 --kill-on-bad-exit=1 --export=ALL "
        f"PYTHON -u -m dstrain.cli.main pretrain --config HERE/run.yaml\n{_TAIL}"
    )
    assert main(["launch", "pretrain", str(config), "--num-processes", "3", "--dry-run"]) == 78
    assert "not a multiple of the 2 nodes" in capsys.readouterr().err


def test_an_evaluation_takes_the_run_folder(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config.parent / "run"
    run.mkdir()
    (run / "config.yaml").write_text("stage: pretrain\n" + config.read_text())
    text = _dry(run, "train.evaluate_rows=8", capsys=capsys, stage="evaluate")
    assert "-m dstrain.cli.main evaluate HERE/run train.evaluate_rows=8\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.max_step=3"], "max_step"),
        (["--num-processes", "2", "--with", "python"], "--with python starts one process"),
        (["--with", "srun"], "SLURM_JOB_NODELIST is not set"),
        (["--hostfile", "/nowhere"], "/nowhere"),
        (["--hostfile", "/nowhere", "--with", "torchrun"], "leave one of the two out"),
        (["--num-processes", "-1"], "--num-processes -1"),
        (["--max-restarts", "-1"], "max_restarts"),
        (["--grace", "nan"], "grace_s"),
        (["other.yaml"], "'other.yaml'"),
        (["seed=1\n#SBATCH"], "argument"),
    ],
)
def test_a_fault_is_one_line_before_anything_is_started(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", str(config), *arguments]) == 78
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert not (config.parent / "run").exists()


def test_the_supervisor_gets_the_job_and_the_policy(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dstrain.launcher import supervisor

    seen: dict[str, Any] = {}

    class Looks:
        def __init__(self, job: Any, policy: Any, **_: Any) -> None:
            seen.update(job=job, policy=policy)

        def run(self) -> int:
            return 75

    monkeypatch.setattr(supervisor, "Supervisor", Looks)
    arguments = ["--num-processes", "2", "--max-restarts", "5", "--min-processes", "1", "--grace", "9", "seed=4"]
    assert main(["launch", "pretrain", str(config), *arguments]) == 75
    assert (seen["job"].run_folder, seen["job"].seed, seen["job"].stage) == (config.parent / "run", 4, "pretrain")
    assert seen["job"].layout.processes == 2
    assert os.umask(0o022) == 0o077
    assert (seen["policy"].max_restarts, seen["policy"].min_processes, seen["policy"].grace_s) == (5, 1, 9.0)


@pytest.mark.parametrize(("code", "written"), [(77, "n1,n2\n"), (76, "\n"), (0, "\n")])
def test_hosts_that_are_unhealthy_are_written_where_a_script_wants_them(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, written: str
) -> None:
    from dstrain.launcher import supervisor

    record = AttemptRecord(
        number=1, stage="pretrain", mark="m", argv=(), processes=2, hosts=("n1", "n2"), log="", started=0.0,
        checkpoint_before=-1, reached_before=-1,
    )  # fmt: skip

    class Ends:
        def __init__(self, job: Any, policy: Any, **_: Any) -> None:
            self.run_folder = job.run_folder

        def run(self) -> int:
            self.run_folder.mkdir(exist_ok=True)
            history = History(self.run_folder, say=print)
            history.begin(record)
            history.close(code=code, hosts_at_fault=("n1", "n2"))
            return code

    monkeypatch.setattr(supervisor, "Supervisor", Ends)
    arguments = ["--with", "python", "--unhealthy-hosts", str(tmp_path / "bad")]
    assert main(["launch", "pretrain", str(config), *arguments]) == code
    assert (tmp_path / "bad").read_text() == written


def test_a_closed_terminal_does_not_stop_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = None

    monkeypatch.setattr(sys, "stderr", Closed())
    launch._say("text")

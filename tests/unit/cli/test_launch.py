"""`dstrain launch`: what reaches the supervisor, and faults that are one line. Texts of --dry-run: tests/golden/test_golden_launch.py."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli import launch
from dstrain.cli.launch_stages import say
from dstrain.cli.main import main
from dstrain.launcher.history import AttemptRecord, History
from tests.support.runs import pretrain_settings, write_config


@pytest.fixture(autouse=True)
def _a_machine_without_slurm_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("SLURM")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(launch.shutil, "which", lambda name: None)
    monkeypatch.setattr(launch, "_gpus", lambda: 0)


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


def test_nothing_is_started_or_made_by_a_dry_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _dry(config, "train.max_steps=3", capsys=capsys)
    assert "PYTHON -u -m dstrain.cli.main pretrain --config HERE/run.yaml train.max_steps=3\n" in text
    assert not (config.parent / "run").exists()


def test_overrides_may_stand_behind_options(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = _dry(config, "--max-restarts", "4", "seed=1", "--bind", "none", capsys=capsys)
    assert "run.yaml seed=1 engine.bind=none\n" in text
    assert "at most 4;" in text


def test_ranks_must_share_an_allocation_evenly(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    assert main(["launch", "pretrain", str(config), "--num-processes", "3", "--dry-run"]) == 78
    assert "not a multiple of the 2 nodes" in capsys.readouterr().err


def test_an_evaluation_and_an_export_need_a_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in ("evaluate", "export"):
        assert main(["launch", stage, str(config.parent), "--dry-run"]) == 78
        assert "not a run folder" in capsys.readouterr().err


def test_a_remark_about_unequal_shares_does_not_hold_the_run_up(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", str(config), "--num-processes", "8", "--dry-run"]) == 0
    assert "does not divide by 8 ranks" in capsys.readouterr().err


def test_saves_that_were_measured_decide_what_a_grace_must_be(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = config.parent / "run"
    run.mkdir()
    (run / "events.jsonl").write_text('{"event": "saved", "step": 4, "seconds": 200.0}\n')
    assert main(["launch", "pretrain", str(config), "--dry-run"]) == 78
    assert "--grace 120: saves of this run take up to 200 s" in capsys.readouterr().err
    assert main(["launch", "pretrain", str(config), "--grace", "300", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.max_step=3"], "max_step"),
        (["--num-processes", "2", "--with", "python"], "--with python starts one process"),
        (["--with", "srun"], "SLURM_JOB_NODELIST is not set"),
        (["--hostfile", "/nowhere"], "/nowhere"),
        (["--hostfile", "/nowhere", "--with", "torchrun"], "leave one of the two out"),
        (["--num-processes", "-1"], "--num-processes: must be 1 or more, got -1"),
        (["--num-processes", "16"], "16 ranks and train.global_batch=12"),
        (["--interface", "nowhere0"], "engine.interface: 'nowhere0' does not exist"),
        (["--interface", "^lo"], "no interface name"),
        (["engine.bind=tight"], "engine.bind"),
        (["--port", "80"], "1024 to 65535"),
        (["--forward", "A=1"], "--forward 'A=1'"),
        (["--time", "10"], "sbatch is not on PATH"),
        (["--with", "python", "--nodes", "2"], "--nodes is an option of --with sbatch"),
        (["engine.device=cuda"], "shows no GPU"),
        (["--max-restarts", "-1"], "max_restarts"),
        (["--grace", "nan"], "grace_s"),
        (["other.yaml"], "'other.yaml'"),
        (["seed=1\n#SBATCH"], "argument"),
    ],
)
def test_a_fault_is_one_line_before_anything_is_started(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", str(config), *arguments]) == (77 if "engine.device=cuda" in arguments else 78)
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


@pytest.mark.parametrize(("stage", "mask"), [("shards", 0o022), ("pretrain", 0o077)])
def test_runs_are_private_and_shards_are_not(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, mask: int
) -> None:
    from dstrain.launcher import supervisor

    class Ends:
        def __init__(self, job: Any, policy: Any, **_: Any) -> None:
            assert job.run_folder == tmp_path / (".launch-out" if stage == "shards" else "run")

        def run(self) -> int:
            return 0

    monkeypatch.setattr(supervisor, "Supervisor", Ends)
    build = ["--input", "a", "--tokenizer", "t", "--out", str(tmp_path / "out")]
    assert main(["launch", stage, *(build if stage == "shards" else [str(config)])]) == 0
    assert os.umask(0o022) == mask


def test_a_closed_terminal_does_not_stop_the_supervisor(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = None

    monkeypatch.setattr(sys, "stderr", Closed())
    say("text")

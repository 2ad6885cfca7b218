"""`dstrain launch --with sbatch` around a stand-in sbatch: what is submitted, and what is refused before."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from dstrain.cli import launch
from dstrain.cli.main import main
from tests.support.runs import pretrain_settings, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_config(tmp_path / "run.yaml", pretrain_settings(tmp_path / "shards", tmp_path / "run"))


@pytest.fixture(autouse=True)
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A login node: what its sbatch was called with."""
    program, seen = tmp_path / "bin/sbatch", tmp_path / "calls"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"print(json.dumps([sys.argv[1:], dict(os.environ)]), file=open({str(seen)!r}, 'a'))\nprint(4711)\n"
    )
    program.chmod(0o755)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_QOS", "long")
    monkeypatch.setenv("MY_TOKEN", "hush")
    monkeypatch.setattr(launch, "_gpus", lambda: 0)
    return seen


def submitted(calls: Path) -> tuple[list[str], dict[str, str]]:
    (line,) = calls.read_text().splitlines()
    words, environment = json.loads(line)
    return words, environment


def test_a_job_is_submitted_with_the_options_the_run_and_the_listed_environment(
    config: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--nodes", "2", "--gpus-per-node", "3", "--time", "1:00:00", "--singleton", "--job-name", "bert", "seed=4",
                 "--interface", "ib0",                 "--grace", "50", "--max-restarts", "2"]  # fmt: skip
    assert main(["launch", "pretrain", str(config), *arguments]) == 0
    out, said = capsys.readouterr()
    assert out == "4711\n"
    assert "sbatch: --nodes is for a job of its own" in said
    words, environment = submitted(calls)
    assert words[:7] == ["--parsable", "--nodes=2", "--gpus-per-node=3", "--ntasks-per-node=3", "--time=1:00:00", "--job-name=bert",
                         "--dependency=singleton"]  # fmt: skip
    assert Path(words[7]).name == "pretrain.sbatch"
    assert words[8:] == [str(config), "seed=4", "engine.interface=ib0", "--max-restarts=2", "--grace=50.0"]
    assert environment["SBATCH_QOS"] == "long"
    assert "MY_TOKEN" not in environment
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))


def test_what_the_script_gets_is_what_dstrain_launch_takes(
    config: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", str(config), "--nodes", "2", "--grace", "50", "--port", "4000", "seed=4"]) == 0
    words, _ = submitted(calls)
    inside = words[words.index(str(config)) :]
    assert main(["launch", "pretrain", *inside, "--with", "python", "--dry-run"]) == 0
    assert "seed=4" in capsys.readouterr().out


def test_forward_adds_a_variable_to_the_job_and_to_the_launch_inside_it(config: Path, calls: Path) -> None:
    assert main(["launch", "pretrain", str(config), "--nodes", "1", "--forward", "MY_TOKEN"]) == 0
    words, environment = submitted(calls)
    assert environment["MY_TOKEN"] == "hush"
    assert words[-1] == "--forward=MY_TOKEN"


def test_an_array_of_shards_takes_its_processes_as_cpus(calls: Path) -> None:
    arguments = ["--input", "a.jsonl", "--tokenizer", "tok", "--out", "out", "--workers", "4", "--array", "0-7"]
    assert main(["launch", "shards", *arguments]) == 0
    words, _ = submitted(calls)
    assert words[:3] == ["--parsable", "--cpus-per-task=4", "--array=0-7"]
    assert words[4:] == ["--input=a.jsonl", "--tokenizer=tok", "--out=out"]


def test_a_login_node_without_gpus_submits_a_run_that_wants_some(
    config: Path, calls: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", str(config), "engine.device=cuda"]) == 0
    assert "sbatch: engine.device is cuda, this machine shows no GPU, and sbatch is here" in capsys.readouterr().err
    assert not any(word.startswith("--gpus-per-node") for word in submitted(calls)[0])


def test_a_limit_in_sbatchs_own_variable_is_checked_too(
    config: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SBATCH_TIMELIMIT", "1")
    assert main(["launch", "pretrain", str(config), "--nodes", "1"]) == 78
    assert "--time 1 (60 s)" in capsys.readouterr().err
    assert main(["launch", "pretrain", str(config), "--nodes", "1", "--time", "60"]) == 0
    assert "--time=60" in submitted(calls)[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--time", "1"], "--time 1 (60 s): the run leaves stop.margin_s"),
        (["--time", "soon"], "--time 'soon'"),
        (["--nodes", "4", "--gpus-per-node", "8"], "32 ranks and train.global_batch=12"),
        (["--gpus-per-node", "a100:1,v100:1"], "one type"),
        (["--job-name", "a b"], "--job-name 'a b'"),
        (["--nodes", "1", "--num-processes", "2"], "--num-processes is for a start at once"),
        (["--nodes", "1", "--script", "/nowhere"], "--script /nowhere: cannot be read"),
        (["--nodes", "2", "run_folder=/dev/shm/run"], "tmpfs"),
        (["--nodes", "2", "seed=1\n#SBATCH --wrap=id"], "argument"),
    ],
)
def test_a_fault_is_one_line_and_nothing_is_submitted(
    config: Path, calls: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "pretrain", str(config), *arguments]) == 78
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not calls.exists()


def test_a_dry_run_needs_no_sbatch_and_a_submission_does(
    config: Path, calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    assert main(["launch", "pretrain", str(config), "--nodes", "2", "--dry-run"]) == 0
    out, said = capsys.readouterr()
    assert "--nodes=2" in out
    assert "#SBATCH" in out
    assert "sbatch is not on PATH here; this is what a login node would submit" in said
    assert main(["launch", "pretrain", str(config), "--nodes", "2"]) == 78
    assert "sbatch is not on PATH" in capsys.readouterr().err
    assert not calls.exists()

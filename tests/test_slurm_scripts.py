"""The batch scripts by themselves: what follows from each exit code, and that no argument passes through a shell.

`dstrain` and SLURM's commands are stand-ins that write down how they are called; the real ones are in tests/cluster.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.suffix in (".sbatch", ".sh"))
_MARK = "# ---- the same in pretrain.sbatch and finetune.sbatch"
_STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
here = pathlib.Path(sys.argv[0]).parent
name = pathlib.Path(sys.argv[0]).name
with (here / "calls").open("a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
answers = json.loads((here / "answers").read_text())
if name == "dstrain" and "--unhealthy-hosts" in sys.argv:
    pathlib.Path(sys.argv[sys.argv.index("--unhealthy-hosts") + 1]).write_text(answers["hosts"] + "\\n")
if name == "sbatch":
    print(f"{{len((here / 'calls').read_text().splitlines())}};cluster")
if name == "tensorboard":
    print(answers["says"], file=sys.stderr)
if name == "squeue":
    print(answers["waiting"] if "--me" in sys.argv else answers["excluded"])
sys.exit(answers["code"] if name in ("dstrain", "tensorboard") else 0)
"""


def _run(
    folder: Path, script: str, *arguments: str, environment: dict[str, str], **answers: object
) -> tuple[int, list[list[str]]]:
    """Exit code and calls of a script whose commands are stand-ins; what it prints is left in `folder`/printed."""
    for name in ("dstrain", "sbatch", "scontrol", "squeue", "scancel", "srun", "tensorboard"):
        (folder / name).write_text(_STAND_IN)
        (folder / name).chmod(0o755)
    given = {"code": 0, "hosts": "", "excluded": "", "waiting": "", "says": ""} | answers
    (folder / "answers").write_text(json.dumps(given))
    (folder / "calls").touch()
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / script), *arguments], capture_output=True, text=True, check=False, cwd=folder,
        env={"PATH": f"{folder}:{os.environ['PATH']}", **environment},
    )  # fmt: skip
    assert done.stderr == ""
    (folder / "printed").write_text(done.stdout)
    return done.returncode, [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def _end(folder: Path, code: int, *, stage: str = "pretrain", **answers: object) -> tuple[int, list[list[str]]]:
    """How a job's script ends after `dstrain launch` has ended with a code."""
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NAME": "bert"}
    status, calls = _run(
        folder, f"{stage}.sbatch", "run.yaml", "a=$(touch x) b", environment=environment, code=code, **answers
    )
    assert calls[0][:4] == ["dstrain", "launch", stage, "run.yaml"]
    assert calls[0][4:7] == ["a=$(touch x) b", "--with", "srun"]
    return status, calls[1:]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_sound_and_says_first_how_it_is_used(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "slurm/" in script.read_text().split("\n\n")[0]


def test_both_training_scripts_end_alike() -> None:
    pretrain, finetune = ((ROOT / "slurm" / f"{stage}.sbatch").read_text() for stage in ("pretrain", "finetune"))
    assert pretrain.split(_MARK)[1] == finetune.split(_MARK)[1]


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("code", [75, 76])
def test_what_was_saved_or_failed_in_passing_goes_back_into_the_queue(tmp_path: Path, code: int, stage: str) -> None:
    assert _end(tmp_path, code, stage=stage) == (0, [["scontrol", "requeue", "7"]])


@pytest.mark.parametrize("code", [0, 1, 2, 78, 80, 81, 82])
def test_what_starting_again_would_not_help_ends_with_its_code(tmp_path: Path, code: int) -> None:
    assert _end(tmp_path, code) == (code, [])


@pytest.mark.parametrize(("excluded", "then"), [("", "n2"), ("(null)", "n2"), ("n9", "n9,n2")])
def test_an_unhealthy_node_is_excluded_besides_those_that_were_before(tmp_path: Path, excluded: str, then: str) -> None:
    status, calls = _end(tmp_path, 77, hosts="n2", excluded=excluded)
    assert status == 0
    assert calls[1:] == [
        ["scontrol", "requeuehold", "7"], ["scontrol", "update", "JobId=7", f"ExcNodeList={then}"], ["scontrol", "release", "7"],
    ]  # fmt: skip


def test_an_unhealthy_job_without_a_name_of_a_host_is_left_to_people(tmp_path: Path) -> None:
    assert _end(tmp_path, 77) == (77, [])


def test_a_crash_loop_cancels_what_waits_for_this_job_and_nothing_else(tmp_path: Path) -> None:
    waiting = "8 singleton(unfulfilled)\n9 (null)\n10 afterok:3(unfulfilled)\n11 singleton(unfulfilled)"
    status, calls = _end(tmp_path, 79, waiting=waiting)
    assert status == 79
    assert [call for call in calls if call[0] == "scancel"] == [["scancel", "8"], ["scancel", "11"]]
    assert "--name=bert" in calls[0]


def test_the_pipeline_queues_every_stage_behind_the_one_before_and_passes_names_as_they_are(tmp_path: Path) -> None:
    corpus, run = "/data/my corpus/*.jsonl", "runs/a$(touch x);b"
    names = {
        "CORPUS": corpus,
        "TOKENIZER": "tok",
        "SHARDS": "sh ards",
        "PRETRAIN": "p.yaml",
        "RUN": run,
        "EXPORT": "h f",
        "FINETUNE": "f.yaml",
        "PRETRAIN_OPTIONS": "--nodes=8  --comment=$(touch${IFS}x)",
    }
    status, calls = _run(tmp_path, "pipeline.sh", environment=names)
    assert status == 0
    assert [[word for word in call if word.startswith("--dependency")] for call in calls] == [
        [], *([f"--dependency=afterok:{number}"] for number in range(1, 5)),
    ]  # fmt: skip
    assert [call[2] for call in calls] == [
        f"--job-name={n}" for n in ("shards", "pretrain", "export", "finetune", "evaluate")
    ]
    assert calls[0][-6:] == ["--input", corpus, "--tokenizer", "tok", "--out", "sh ards"]
    assert calls[1][-3:] == ["p.yaml", f"run_folder={run}", "data.path=sh ards"]
    assert calls[1][4:6] == ["--nodes=8", "--comment=$(touch${IFS}x)"]
    assert calls[2][-4:] == [run, "--out", "h f", "--overwrite"]
    assert calls[3][-2:] == ["f.yaml", f"model.init_from={run}"]
    assert calls[4][-1] == run
    assert not (tmp_path / "x").exists()


def test_stages_that_are_not_wanted_are_left_out(tmp_path: Path) -> None:
    status, calls = _run(tmp_path, "pipeline.sh", environment={"PRETRAIN": "p.yaml", "RUN": "r"})
    assert status == 0
    assert [call[-1] for call in calls] == ["run_folder=r", "r"]


def test_an_evaluation_is_one_step_of_srun(tmp_path: Path) -> None:
    status, calls = _run(
        tmp_path, "evaluate.sbatch", "runs/a b", "--step", "3", environment={"SLURM_CPUS_PER_TASK": "4"}
    )
    assert (status, calls) == (0, [["srun", "--kill-on-bad-exit=1", "dstrain", "evaluate", "runs/a b", "--step", "3"]])


def test_an_export_is_one_process(tmp_path: Path) -> None:
    status, calls = _run(tmp_path, "export.sbatch", "runs/a b", "--out", "h;f", environment={})
    assert (status, calls) == (0, [["srun", "--ntasks=1", "dstrain", "export", "runs/a b", "--out", "h;f"]])


_NODE = {"USER": "ann", "SLURM_SUBMIT_HOST": "login1", "SLURM_JOB_ID": "7"}
_UP = "TensorBoard 2.21.0 at http://127.0.0.1:43215/ (Press CTRL+C to quit)"


@pytest.mark.parametrize(
    ("environment", "login"), [({}, "login1"), ({"LOGIN": "gate.example.org"}, "gate.example.org")]
)
def test_tensorboard_listens_on_loopback_and_its_log_says_the_way_in(
    tmp_path: Path, environment: dict[str, str], login: str
) -> None:
    status, calls = _run(
        tmp_path, "tensorboard.sbatch", "runs/a b", "--tag=$(touch x)", environment=_NODE | environment, says=_UP
    )
    assert status == 0
    assert calls == [
        ["tensorboard", "--logdir", "runs/a b", "--host", "127.0.0.1", "--port", "0", "--tag=$(touch x)"]
    ]  # fmt: skip
    printed = (tmp_path / "printed").read_text()
    assert _UP in printed
    assert f"  ssh -N -L 6006:127.0.0.1:43215 -J ann@{login} ann@{os.uname().nodename}\n" in printed
    assert "http://127.0.0.1:6006/" in printed
    assert not (tmp_path / "x").exists()


def test_a_tensorboard_that_fails_says_why_and_names_no_way_in(tmp_path: Path) -> None:
    status, _ = _run(tmp_path, "tensorboard.sbatch", "runs", environment=_NODE, says="no such option", code=2)
    assert status == 2
    assert (tmp_path / "printed").read_text() == "no such option\n"


def test_tensorboard_without_a_folder_says_how_it_is_used(tmp_path: Path) -> None:
    status, calls = _run(tmp_path, "tensorboard.sbatch", environment=_NODE)
    assert (status, calls) == (78, [])
    assert "sbatch slurm/tensorboard.sbatch runs/" in (tmp_path / "printed").read_text()


def test_scripts_here_are_those_that_dstrain_launch_submits() -> None:
    packaged = ROOT / "dstrain/launcher/batch_scripts"
    names = [path.name for path in packaged.iterdir()]
    assert len(names) == 5
    assert [(ROOT / "slurm" / name).resolve() for name in names] == [packaged / name for name in names]

"""Every form of `dstrain launch --dry-run` gives the text of a file in `launch/`: commands, environment, ranks, batch script.

After a change that is meant to move them: DSTRAIN_UPDATE_GOLDEN=1 pytest tests/golden/test_golden_launch.py. Paths, ports and versions of
this machine are replaced by words; the machine whose cores are shared out is a made-up one.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from dstrain.cli import launch, launch_here
from dstrain.cli.main import main
from dstrain.launcher.batch import SCRIPTS
from dstrain.launcher.node_view import Cpu, NodeView
from tests.support.runs import BERT, pretrain_settings, write_config

FOLDER = Path(__file__).with_name("launch")
UPDATE = os.environ.get("DSTRAIN_UPDATE_GOLDEN") == "1"

_CPUS = sorted(Cpu(core // 4, core // 4, core, core + 8 * thread) for core in range(8) for thread in range(2))
NODE = NodeView(tuple(_CPUS), (), ("eth0", "ib0", "lo"), Path("/scratch/dstrain-USER/python-torch"))
"""Two sockets of four cores with two threads each."""
SHELL = {
    "HOME": "/home/me",
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "NCCL_DEBUG": "WARN",
    "SBATCH_QOS": "long",
    "EDITOR": "vi",
}
ALLOCATION = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS_PER_NODE": "3",
    "SLURM_JOB_CPUS_PER_NODE": "24(x2)",
}
JOB = ("--nodes", "2", "--gpus-per-node", "a100:3", "--time", "12:00:00", "--partition", "gpu", "--account", "lab", "--job-name", "bert",
       "--singleton")  # fmt: skip
BUILD = ("--input", "corpus/*.jsonl", "more data.txt", "--tokenizer", "tok", "--out", "shards", "--workers", "4")

FORMS: dict[str, tuple[str, ...]] = {
    "python": (),
    "deepspeed": ("--num-processes", "2", "--bind", "cores", "--port", "29999"),
    "hostfile": ("--hostfile", "hosts", "--interface", "ib0"),
    "torchrun": ("--with", "torchrun", "--num-processes", "4", "--bind", "numa", "--max-restarts", "4"),
    "srun": ("--num-processes", "6"),
    "sbatch": JOB,
}
"""Of stages with ranks."""
CASES = [(stage, form) for stage in ("pretrain", "finetune", "evaluate") for form in FORMS]
CASES += [(stage, form) for stage in ("shards", "export") for form in ("python", "sbatch")]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of each stage, and a shell that knows only what every machine may know."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launch.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(launch_here, "look_at_node", lambda environment: NODE)
    monkeypatch.setattr(launch_here, "interfaces", lambda: NODE.interfaces)
    settings = pretrain_settings(tmp_path / "shards", tmp_path / "run", engine={"threads": None})
    write_config(tmp_path / "pretrain.yaml", settings)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text("stage: pretrain\n" + (tmp_path / "pretrain.yaml").read_text())
    tune = {key: settings[key] for key in ("seed", "engine", "checkpoint", "monitor")}
    tune |= {"run_folder": str(tmp_path / "tuned"), "tokenizer": str(tmp_path / "tok"), "model": {"config": BERT},
             "train": {"global_batch": 12, "micro_batch": 4},
             "task": {"kind": "classification", "train": "train.tsv", "text": "sentence"}}  # fmt: skip
    write_config(tmp_path / "finetune.yaml", tune)
    (tmp_path / "hosts").write_text("n1 slots=3\nn2 slots=3\n")
    return tmp_path


def words(home: Path, stage: str, form: str) -> list[str]:
    """The command line of a case."""
    if stage == "shards":
        return [*BUILD, *(("--array", "0-15%4", "--partition", "cpu") if form == "sbatch" else ())]
    if stage == "export":
        return [
            str(home / "run"),
            "--out",
            str(home / "hf"),
            "--average",
            "last:3",
            *(("--time", "30") if form == "sbatch" else ()),
        ]
    subject = home / "run" if stage == "evaluate" else home / f"{stage}.yaml"
    return [str(subject), *FORMS[form], *(("--step", "8") if stage == "evaluate" else ("seed=5",))]


def normalised(text: str, home: Path) -> str:
    """What this machine has put in, replaced."""
    for path, word in (
        (SCRIPTS, "SCRIPTS"),
        (home, "HERE"),
        (sys.executable, "PYTHON"),
        (Path(sys.executable).parent, "BIN"),
    ):
        text = text.replace(str(path), word)
    text = text.replace(" PYTEST_CURRENT_TEST", "")
    return re.sub(r"((?:--master[-_]port|MASTER_PORT)[ =])(?!29999)\d+", r"\1PORT", text)


@pytest.mark.parametrize(("stage", "form"), CASES)
def test_a_dry_run_prints_its_golden_text(
    stage: str, form: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ALLOCATION if form == "srun" else {}).items():
        monkeypatch.setenv(name, value)
    before = sorted(path.relative_to(home) for path in home.rglob("*"))
    assert main(["launch", stage, *words(home, stage, form), "--dry-run"]) == 0, capsys.readouterr().err
    text = normalised(capsys.readouterr().out, home)
    golden = FOLDER / f"{stage}-{form}.txt"
    if UPDATE:
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")
    assert sorted(path.relative_to(home) for path in home.rglob("*")) == before, "a dry run leaves nothing"


def test_every_golden_text_has_its_case() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {f"{stage}-{form}" for stage, form in CASES}

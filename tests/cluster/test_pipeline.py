"""`slurm/pipeline.sh` under a real SLURM: from text to a classifier and its score, disturbed on the way."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from tests.support.cluster import Lab, wait_until
from tests.support.cluster_page import page_command, page_line
from tests.support.cluster_runs import ClusterRun, Result
from tests.support.runs import ROOT, write_config
from tests.support.slurm_runs import BIN, ENDED, EXPORT

pytestmark = [pytest.mark.cluster, pytest.mark.fault, pytest.mark.timeout(600)]

STAGES = ("shards", "pretrain", "export", "finetune", "evaluate")


def test_the_whole_line_runs_by_itself_and_comes_to_what_one_machine_comes_to(
    lab: Lab, tmp_path: Path, shards_by_default: Path, undisturbed_by_default: Result
) -> None:
    home, run = shards_by_default.parent, ClusterRun.prepare(tmp_path, shards_by_default)
    told = {
        "CORPUS": home / "corpus.jsonl", "TOKENIZER": home / "tok", "SHARDS": tmp_path / "shards", "RUN": run.folder,
        "PRETRAIN": run.config, "EXPORT": tmp_path / "hf", "FINETUNE": _finetune(tmp_path),
    }  # fmt: skip
    jobs = _submit(lab, tmp_path, told)
    wait_until(lambda: run.step >= 20, what="step 20", tell=lambda: _logs(tmp_path))
    lab.on("ctl", "scancel", "--signal=TERM", jobs["pretrain"])  # saves and requeues itself; the others wait on
    _complete(lab, jobs, tmp_path)

    assert lab.job(jobs["pretrain"]).restarts >= 1
    assert run.result() == undisturbed_by_default
    assert _tars(tmp_path / "shards") == _tars(shards_by_default), "an array of three wrote the bytes of one process"
    assert (tmp_path / "hf/model.safetensors").is_file()
    assert "logits differ by at most" in (tmp_path / "export.log").read_text()
    assert json.loads((tmp_path / "tuned/metrics.json").read_text())["validation"]["metrics"]["accuracy"] > 0.9
    assert f'"loss": {_last_evaluation(run.folder)["loss"]}' in (tmp_path / "evaluate.log").read_text()

    again = _submit(lab, tmp_path, told)  # started once more, everything finds that it is done
    _complete(lab, again, tmp_path)
    assert run.result() == undisturbed_by_default


def test_the_pages_way_to_shards(lab: Lab, tmp_path: Path, shards: Path) -> None:
    corpus, tok, out = shards.parent / "corpus.jsonl", tmp_path / "tok", tmp_path / "shards"
    names = {"corpus/*.jsonl.gz": corpus, "tok/": tok, "shards/": out, "dstrain": BIN / "dstrain"}
    lab.on(
        "ctl",
        *page_command(
            "dstrain tokenizer train", {**_of(names, "dstrain", "corpus/*.jsonl.gz", "tok/"), "32768": "400"}
        ),
    )
    words = page_command("sbatch --array=0-15", {
        **_of(names, "corpus/*.jsonl.gz", "tok/", "shards/"), "--array=0-15": "--array=0-1",
        "slurm/build_shards.sbatch": ROOT / "slurm/build_shards.sbatch",
    })  # fmt: skip
    array = lab.submit("--cpus-per-task=1", "--mem-per-cpu=0", f"--output={tmp_path}/%a.log", EXPORT, *words[1:])
    wait_until(lambda: lab.on("ctl", "squeue", "--noheader", f"--jobs={array}") == "", what="the array's end",
               tell=lambda: _logs(tmp_path))  # fmt: skip
    lab.on("ctl", *page_command("dstrain shards verify", _of(names, "dstrain", "shards/")))
    assert _tars(out)


def _of(names: dict[str, Path], *chosen: str) -> dict[str, Path]:
    return {name: names[name] for name in chosen}


def _submit(lab: Lab, folder: Path, told: dict[str, Path]) -> dict[str, str]:
    """Run the page's line on the login node, with other values for its variables; returns the jobs' numbers."""
    *settings, script = shlex.split(page_line("CORPUS="))
    names = [word.partition("=")[0] for word in settings]
    assert sorted(names) == sorted(told)
    assert script == "slurm/pipeline.sh"
    small = {
        "SHARDS_OPTIONS": "--array=0-2 --cpus-per-task=1 --mem-per-cpu=0",
        "PRETRAIN_OPTIONS": "--nodes=2 --ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1",
        **{f"{stage.upper()}_OPTIONS": "--cpus-per-task=1 --mem-per-cpu=0" for stage in ("export", "finetune", "evaluate")},
    }  # fmt: skip
    for stage in STAGES:
        key = f"{stage.upper()}_OPTIONS"
        small[key] += f" --output={folder}/{stage}{'-%a' if stage == 'shards' else ''}.log"
    environment = {"PATH": f"{BIN}:{os.environ['PATH']}", **{k: str(v) for k, v in told.items()}, **small}
    words = [f"{name}={value}" for name, value in environment.items()]
    printed = lab.on("ctl", "env", *words, ROOT / script)
    jobs = dict(re.findall(r"^(\w+): job (\d+)$", printed, re.MULTILINE))
    assert tuple(jobs) == STAGES, printed
    return jobs


def _complete(lab: Lab, jobs: dict[str, str], folder: Path) -> None:
    """Wait for the end of every job, which must be good."""
    for stage, job in jobs.items():
        wait_until(lambda: lab.job(job).state in ENDED, what=f"the end of {stage}", tell=lambda: _logs(folder))  # noqa: B023
        assert (lab.job(job).state, lab.job(job).exit_code) == ("COMPLETED", "0:0"), f"{stage}\n{_logs(folder)}"


def _finetune(folder: Path) -> Path:
    """A task that four dozen tiny steps learn: which of two words a sentence holds."""
    lines = ["text\tlabel"]
    for i in range(240):
        word, label = ("wretched", "negative") if i % 2 else ("happy", "positive")
        lines.append(f"number {i} was a {word} evening at the house\t{label}")
    (folder / "task.tsv").write_text("\n".join(lines) + "\n")
    return write_config(
        folder / "tuned.yaml",
        {
            "run_folder": str(folder / "tuned"),
            "model": {"init_from": str(folder / "run")},
            "task": {
                "kind": "classification", "train": str(folder / "task.tsv"), "max_length": 32, "validation_fraction": 0.3,
            },
            "optimizer": {"learning_rate": 2e-3},
            "engine": {"precision": "fp32", "device": "cpu", "threads": 1},
            "train": {"global_batch": 16, "micro_batch": 16, "max_steps": 100, "evaluate_every": 50},
        },
    )  # fmt: skip


def _last_evaluation(run: Path) -> dict[str, float]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    found: dict[str, float] = [e for e in lines if e["event"] == "evaluated"][-1]["metrics"]
    return found


def _logs(folder: Path) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in folder.glob("*.log"))


def _tars(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}
    assert found
    return found

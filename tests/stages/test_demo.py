"""`dstrain demo --quick` from a folder outside the repository: interrupted, gone on with, and then nothing left to do.

One demo serves all tests: it is stopped while it resumes pretraining, started again, and started once more.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstrain.monitor.events import read_events

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

RESUMING = "[4/8]"


@dataclass(frozen=True)
class Played:
    """What three starts of one demo said and left."""

    folder: Path
    codes: list[int]
    texts: list[str]
    before_third: dict[str, int]
    after_third: dict[str, int]


def _start(folder: Path, elsewhere: Path) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    return subprocess.Popen(
        [sys.executable, "-m", "dstrain.cli.main", "demo", "--quick", "--folder", str(folder)],
        cwd=elsewhere, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def _finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate()
    return process.returncode, text


def _interrupted(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Stop the demo with SIGTERM as soon as it begins to resume its pretraining."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(RESUMING):
            process.send_signal(signal.SIGTERM)
            break
    code, rest = _finish(process)
    return code, "".join(lines) + rest


def _training_files(folder: Path) -> dict[str, int]:
    files = [*folder.rglob("events.jsonl"), *folder.rglob("*.safetensors")]
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Played:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    folder = elsewhere / "a demo"  # a name with a space, which no command may trip over
    ends = [_interrupted(_start(folder, elsewhere)), _finish(_start(folder, elsewhere))]
    before = _training_files(folder)
    ends.append(_finish(_start(folder, elsewhere)))
    return Played(folder, [c for c, _ in ends], [t for _, t in ends], before, _training_files(folder))


def test_an_interrupted_demo_keeps_its_work_and_says_how_to_go_on(played: Played) -> None:
    assert played.codes[0] == 75, played.texts[0]
    assert "Go on with: dstrain demo --folder" in played.texts[0]
    assert "Traceback" not in "".join(played.texts)


def test_the_second_start_goes_on_to_the_end(played: Played) -> None:
    assert played.codes[1] == 0, played.texts[1]
    done = [line for line in played.texts[1].splitlines() if line.endswith("already done")]
    assert [line[:5] for line in done] == ["[1/8]", "[2/8]", "[3/8]"]


def test_pretraining_was_stopped_at_two_processes_and_ended_at_one(played: Played) -> None:
    events = read_events(played.folder / "pretrain" / "events.jsonl")
    worlds = [event["world"] for event in events if event["event"] in ("started", "resumed")]
    assert worlds[0] == 2
    assert worlds[-1] == 1
    assert [event["step"] for event in events if event["event"] == "ended"][-1] == 90
    resumed = [event["step"] for event in events if event["event"] == "resumed"]
    assert 60 <= resumed[0] < 90


def test_the_summary_has_every_row(played: Played) -> None:
    numbers = json.loads((played.folder / "summary.json").read_text())["numbers"]
    table = [line for line in (played.folder / "summary.md").read_text().splitlines() if line.startswith("| ")]
    assert len(table) == 8
    assert "–" not in "".join(table)
    assert numbers["loss_after"] < numbers["loss_before"]
    assert numbers["tokens_per_second_2_processes"] > 0
    assert numbers["tokens_per_second_1_process"] > 0
    assert 0 <= numbers["padding_percent"] < 10
    assert "tensorboard --logdir" in played.texts[1]


def test_the_exported_encoder_filled_the_masks(played: Played) -> None:
    filled = json.loads((played.folder / "fill_mask.json").read_text())
    assert len(filled) == 3
    assert all(len(entry["tokens"]) == 3 for entry in filled)


def test_the_third_start_finds_everything_done_and_trains_nothing(played: Played) -> None:
    assert played.codes[2] == 0, played.texts[2]
    assert played.texts[2].count("already done") == 7
    assert "step " not in played.texts[2].partition("[1/8]")[2].partition("[8/8]")[0].replace("at step 60", "")
    assert played.after_third == played.before_third

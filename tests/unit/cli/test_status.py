"""`dstrain status` and `dstrain runs` as people and programs read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.base.errors import ExitCode
from dstrain.base.world import World
from dstrain.cli.main import main
from dstrain.health.lease import RunLease
from dstrain.health.outcomes import write_exit
from dstrain.stages.run_status import find_runs
from tests.support.run_folders import beat, begin


def test_the_command_prints_what_people_and_programs_want(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(tmp_path / "run")
    with RunLease(run):
        beat(run, 0)
        assert main(["status", str(run)]) == 0
        text = capsys.readouterr().out
        pieces = (
            "pretrain bert, running", "6 of 100 (6.0 %), 94 s left", "loss 5.0000", "accuracy 25.0%", "2,000 tokens/s", "MFU 42.0%",
            "padding 1.5 %", "nothing yet", "1 on 1 host (n0: 1): 1 in step",
        )  # fmt: skip
        for piece in pieces:
            assert piece in text, text
        assert main(["status", str(run), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == "running"


def test_watching_ends_with_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(tmp_path / "run")
    with RunLease(run):
        write_exit(run, World(), code=ExitCode.COMPLETE, cause="complete", step=6)
    assert main(["status", str(run), "--watch"]) == 0
    assert capsys.readouterr().out.count("complete") == 1


def test_runs_below_a_folder_are_listed_and_sorted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(tmp_path / "a" / "first", loss=3.0)
    begin(tmp_path / "b", loss=2.0, task={"kind": "classification"})
    (tmp_path / "b" / "nested").mkdir()
    begin(tmp_path / "b" / "nested" / "run")
    assert [path.name for path in find_runs(tmp_path)] == ["first", "b"], "a run is not searched for other runs"
    assert main(["runs", str(tmp_path), "--sort", "name"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "a/first", "b"]
    assert "finetune" in lines[2]
    assert "6/100" in lines[1]
    assert main(["runs", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    "argv", [["status", "NO"], ["status", "HERE"], ["runs", "NO"], ["runs", "HERE"], ["status", "HERE", "--watch", "0"]]
)
def test_what_is_no_run_is_said(tmp_path: Path, argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    named = [{"NO": str(tmp_path / "absent"), "HERE": str(tmp_path)}.get(part, part) for part in argv]
    assert main(named) == 78
    assert "dstrain: error:" in capsys.readouterr().err

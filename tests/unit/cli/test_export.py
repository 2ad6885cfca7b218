"""`dstrain export`: where it writes, what it says; what it writes is proven in tests/stages/test_pipeline.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstrain.base.errors import ConfigError
from dstrain.cli.main import main
from dstrain.stages import export
from dstrain.stages.export import ExportReport


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]] = []

    def export_run(run_folder: Path, out: Path, **options: Any) -> ExportReport:
        seen.append({"run_folder": run_folder, "out": out, **options})
        return ExportReport(step=12, num_parameters=1_234_567, max_difference=3e-7)

    monkeypatch.setattr(export, "export_run", export_run)
    return seen


def test_the_folder_is_export_in_the_run_unless_another_is_given(
    calls: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "runs/a"]) == 0
    assert main(["export", "runs/a", "--out", "hf", "--step", "8", "--overwrite"]) == 0
    assert main(["export", "runs/a", "--average", "last:5"]) == 0
    usual = {
        "run_folder": Path("runs/a"),
        "out": Path("runs/a/export"),
        "step": None,
        "average": None,
        "overwrite": False,
    }
    assert calls == [usual, {**usual, "out": Path("hf"), "step": 8, "overwrite": True}, {**usual, "average": "last:5"}]
    assert "hf: step 12, 1.2 M parameters; logits differ by at most 3.0e-07" in capsys.readouterr().out


def test_a_run_that_cannot_be_exported_is_one_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **options: Any) -> ExportReport:
        raise ConfigError("runs/a: no valid checkpoint")

    monkeypatch.setattr(export, "export_run", refuse)
    assert main(["export", "runs/a"]) == 78
    said = capsys.readouterr()
    assert said.err == "dstrain: error: runs/a: no valid checkpoint\n"
    assert said.out == ""

"""`dstrain bench` as a command: a whole waterfall with real processes on tiny shards, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli.main import main
from dstrain.planner.variants import variants
from tests.support.runs import build_tiny_shards, pretrain_settings, write_config


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bench")
    return pretrain_settings(build_tiny_shards(folder), folder / "run")


def test_a_waterfall_is_measured_and_written(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", settings)
    out = tmp_path / "out"
    assert main(["bench", str(config), "--steps", "2", "--warmup", "1", "--json", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert [v["name"] for v in data["variants"]] == [
        v.name for v in variants(model_type="bert", compiles=False, micro_batch=4)
    ]
    losses = [v["last_loss"] for v in data["variants"][:-1]]
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4), "a saver changed the loss"
    for variant in data["variants"]:
        assert variant["tokens_per_second"] > 0
        assert 0 < variant["mfu"] < 1.5
        assert variant["peak_bytes"] > 10**8
    assert "5/5" in captured.err
    assert json.loads((out / "bench.json").read_text()) == data
    assert "Recommended" in (out / "bench.md").read_text()
    assert (out / "bench.svg").read_text().startswith("<svg")
    assert not Path(settings["run_folder"]).exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: must be 1 or more"),
        (["--seconds", "0"], "--seconds: must be above 0"),
        (["--out", __file__], "the name is taken already"),
    ],
)
def test_bad_numbers_are_refused(
    arguments: list[str], message: str, settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", settings)
    assert main(["bench", str(config), *arguments]) == 78
    assert message in capsys.readouterr().err


def test_missing_shards_are_said_before_anything_is_measured(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path / "run.yaml", settings)
    assert main(["bench", str(config), f"data.path={tmp_path / 'none'}"]) == 78
    said = capsys.readouterr().err
    assert "none: no such folder; build it with" in said
    assert "ceilings" not in said

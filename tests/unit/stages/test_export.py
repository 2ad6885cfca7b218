"""What an export may replace: an earlier export, and nothing else. What it writes is tested on whole runs in tests/stages."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError
from dstrain.stages.export import export_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder without a checkpoint: an export that gets past its target says so."""
    folder = tmp_path / "runs/a"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("stage: pretrain")
    return folder


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("runs/a", "holds the run itself"),
        ("runs", "holds the run itself"),
        ("runs/a/checkpoints/..", "holds the run itself"),
        ("corpus", "holds something that is no exported model"),
        ("mine.yaml", "is a file"),
    ],
)
def test_overwrite_removes_no_run_no_corpus_and_no_file(name: str, said: str, run: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.jsonl").write_text("{}")
    (tmp_path / "mine.yaml").write_text("seed: 0")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=said):
        export_run(run, tmp_path / name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_earlier_export_and_an_empty_folder_may_be_replaced_when_asked(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_text("{}")
    (tmp_path / "hf/model.safetensors").touch()
    for name in ("empty", "hf"):
        with pytest.raises(ConfigError, match="no valid checkpoint"):
            export_run(run, tmp_path / name, overwrite=True)
        with pytest.raises(ConfigError, match="exists already; give another --out, or --overwrite"):
            export_run(run, tmp_path / name)

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.data.reader import ShardDataset
from dstrain.foreign.open import open_dataset
from tests.support.foreign_tars import npy_set, text_set, write_tar


def test_index_says_what_came_out_and_how_to_train(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_set(tmp_path / "s", texts, extension="json")
    arguments = [
        "shards",
        "index",
        str(tmp_path / "s"),
        "--text-field",
        "json:text",
        "--tokenizer",
        str(tokenizer_folder),
    ]
    assert main([*arguments, "--block-tokens", "256"]) == 0
    out = capsys.readouterr().out
    assert f"data.path: {tmp_path / 's/dstrain-index'}" in out
    assert "in .json:text members" in out
    assert open_dataset(tmp_path / "s/dstrain-index/train").manifest.num_documents > 100
    assert main([*arguments, "--block-tokens", "256"]) == 0
    assert "made before" in capsys.readouterr().out
    assert main(arguments) == 78
    assert "--overwrite" in capsys.readouterr().err


def test_index_takes_files_and_another_place(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tars = npy_set(tmp_path / "s", [[5, 6], [7, 8], [9]])
    chosen = [str(tar) for tar in tars[:2]]
    out = tmp_path / "i"
    assert main(["shards", "index", *chosen, "--tokenizer", str(tokenizer_folder), "--out", str(out)]) == 0
    assert "2 shards" in capsys.readouterr().out
    assert (out / "validation").is_dir()


def test_a_refused_tar_is_one_message(
    tmp_path: Path, tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar(tmp_path / "s/a.tar", [("../evil.txt", b"x")])
    assert main(["shards", "index", str(tmp_path / "s"), "--tokenizer", str(tokenizer_folder)]) == 78
    error = capsys.readouterr().err
    assert "a.tar: refused (traversal) at byte 512" in error
    assert "Traceback" not in error
    bad = ["shards", "index", str(tmp_path / "s"), "--tokenizer", str(tokenizer_folder), "--validation-fraction", "2"]
    assert main(bad) == 78
    assert "validation_fraction" in capsys.readouterr().err


def test_convert_writes_shards(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text_set(tmp_path / "s", [*texts, texts[0]])
    arguments = ["shards", "convert", str(tmp_path / "s"), "--text-field", "txt", "--tokenizer", str(tokenizer_folder)]
    assert main([*arguments, "--out", str(tmp_path / "o"), "--validation-fraction", "0"]) == 0
    assert "1 duplicates" in capsys.readouterr().out
    assert ShardDataset(tmp_path / "o/train").manifest.num_documents == len(texts)
    assert main([*arguments, "--out", str(tmp_path / "p"), "--keep-order", "--validation-fraction", "0"]) == 0
    assert ShardDataset(tmp_path / "p/train").manifest.num_documents == len(texts) + 1


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("index", "convert"):
        with pytest.raises(SystemExit):
            main(["shards", action, "--help"])
        assert "examples:" in capsys.readouterr().out

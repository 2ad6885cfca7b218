from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.cli.main import main
from dstrain.foreign.index import IndexConfig, IndexReport, index_tars
from dstrain.foreign.verify import is_index, verify_index
from tests.support.foreign_tars import text_set


def test_a_sound_index_is_sound(foreign_index: IndexReport, shards: Path) -> None:
    report = verify_index(foreign_index.path, quiet=True)
    assert report.is_sound
    assert report.num_shards == 3
    assert is_index(foreign_index.path)
    assert is_index(foreign_index.path / "train")
    assert not is_index(shards)


def test_every_damaged_block_and_file_is_listed(
    tmp_path: Path,
    texts: list[str],
    tokenizer_folder: Path,
    foreign_config: IndexConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tars = text_set(tmp_path / "s", texts)
    index = index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    data = bytearray(tars[0].read_bytes())
    data[600] ^= 1
    data[-2000] ^= 1
    tars[0].write_bytes(data)
    tars[2].unlink()
    problems = "\n".join(verify_index(index.path, quiet=True).problems)
    assert "set-000.tar: sha256" in problems
    assert problems.count("set-000.tar: block ") >= 1
    assert "set-002.tar: cannot be read: No such file" in problems
    assert "set-001.tar" not in problems
    (index.path / "validation/samples.idx").write_bytes(b"")
    assert any("samples.idx" in problem for problem in verify_index(index.path, quiet=True).problems)
    assert main(["shards", "verify", str(index.path)]) == 78
    assert "set-002.tar" in capsys.readouterr().out


def test_inspect_and_verify_know_an_index(foreign_index: IndexReport, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "inspect", str(foreign_index.path)]) == 0
    out = capsys.readouterr().out
    assert "story 0" in out
    assert "matches" in out
    assert main(["shards", "verify", str(foreign_index.path)]) == 0
    assert "sound (3 shards" in capsys.readouterr().out

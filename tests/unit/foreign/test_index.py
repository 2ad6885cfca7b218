from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from dstrain.base.errors import DataError, StorageError
from dstrain.foreign import index as index_module
from dstrain.foreign.dataset import ForeignDataset
from dstrain.foreign.index import IndexConfig, IndexReport, index_tars
from tests.support.foreign_tars import npy, npy_set, text_set, write_tar


def tables(path: Path) -> dict[str, bytes]:
    return {
        f"{split}/{name}": (path / split / name).read_bytes()
        for split in ("train", "validation")
        for name in ("samples.idx", "blocks.idx")
    }


def test_the_index_is_laid_out_like_a_folder_of_shards(foreign_index: IndexReport) -> None:
    assert foreign_index.path.name == "dstrain-index"
    assert sorted(p.name for p in foreign_index.path.iterdir()) == ["tokenizer", "train", "validation"]
    assert foreign_index.counts == {"samples": 120, "empty": 0, "missing": 0}
    assert not list(foreign_index.path.parent.glob(".indexing*"))


def test_an_index_elsewhere_is_the_same_and_names_the_place_of_the_shards(
    foreign_index: IndexReport, tokenizer_folder: Path, foreign_config: IndexConfig, tmp_path: Path
) -> None:
    source = foreign_index.path.parent
    again = index_tars([source], tokenizer=tokenizer_folder, out=tmp_path / "i", config=foreign_config, quiet=True)
    assert again.train.fingerprint == foreign_index.train.fingerprint
    assert tables(again.path) == tables(foreign_index.path)
    assert Path(again.train.root) == source


def test_the_same_command_again_finds_the_finished_index(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    def run(**changes: Any) -> IndexReport:
        overwrite = changes.pop("overwrite", False)
        config = foreign_config.model_copy(update=changes)
        return index_tars(
            [tmp_path / "set"], tokenizer=tokenizer_folder, config=config, overwrite=overwrite, quiet=True
        )

    shards = text_set(tmp_path / "set", texts)
    first = run()
    assert run(workers=2).reused
    assert not first.reused
    with pytest.raises(DataError, match="made from other settings"):
        run(block_tokens=512)
    assert run(block_tokens=512, overwrite=True).train.num_blocks < first.train.num_blocks
    os.utime(shards[0], (1, 1))
    with pytest.raises(DataError, match="made from other shards"):
        run(block_tokens=512)


def test_an_interrupted_indexing_goes_on_where_it_was(
    tmp_path: Path,
    texts: list[str],
    tokenizer_folder: Path,
    foreign_config: IndexConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text_set(tmp_path / "set", texts, shards=4)
    whole = index_tars(
        [tmp_path / "set"], tokenizer=tokenizer_folder, out=tmp_path / "w", config=foreign_config, quiet=True
    )
    done: list[str] = []
    real = index_module.index_shard

    def failing(path: Path, *args: Any, **kwargs: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(index_module, "index_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    assert not (tmp_path / "set/dstrain-index").exists()
    monkeypatch.setattr(
        index_module, "index_shard", lambda path, *a, **k: done.append(path.name) or real(path, *a, **k)
    )
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    assert sorted(done) == [f"set-{number:03d}.tar" for number in range(4)]
    assert tables(report.path) == tables(whole.path)


@pytest.mark.fault
def test_a_killed_indexing_leaves_no_process_and_ends_as_if_done_by_one(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> None:
    text_set(tmp_path / "set", texts * 30, shards=6)
    out = tmp_path / "i"
    code = f"""
        from pathlib import Path
        from dstrain.foreign.index import IndexConfig, index_tars
        if __name__ == "__main__":
            config = IndexConfig(text_field="txt", block_tokens=256, validation_fraction=0.1, workers=2)
            index_tars([{str(tmp_path / "set")!r}], tokenizer=Path({str(tokenizer_folder)!r}), out=Path({str(out)!r}),
                       config=config, quiet=True)
    """
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(code))
    process = subprocess.Popen([sys.executable, str(script)])
    completed = tmp_path / ".indexing-i/completed"
    deadline = time.monotonic() + 120
    while not (completed.exists() and any(not f.name.startswith(".") for f in completed.iterdir())):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    kept = {f.name for f in completed.iterdir() if not f.name.startswith(".")}
    config = foreign_config.model_copy(update={"workers": 1})
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, out=out, config=config, quiet=True)
    fresh = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, out=tmp_path / "f", config=config, quiet=True)
    assert kept
    assert tables(report.path) == tables(fresh.path)


def test_a_small_set_still_holds_out_one_sample(tmp_path: Path, tokenizer_folder: Path) -> None:
    npy_set(tmp_path / "set", [[5, 6], [7], [8, 9, 10]], shards=2)
    report = index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, quiet=True)
    assert report.validation is not None
    assert (report.train.num_documents, report.validation.num_documents) == (2, 1)


def test_what_is_held_out_follows_names_not_places(
    foreign_index: IndexReport, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig, tmp_path: Path
) -> None:
    text_set(tmp_path / "a/b/moved", texts)
    moved = index_tars([tmp_path / "a/b/moved"], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)
    assert tables(moved.path) == tables(foreign_index.path)


def test_samples_without_the_member_are_refused_or_left_out(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_tar(tmp_path / "s/a.tar", [("a.txt", b"fox"), ("b.cls", b"1"), ("c.txt", b""), ("d.txt", b"the dog")])
    with pytest.raises(DataError, match=r"a\.tar: sample 'b' has no \.txt member \(it has \.cls\)"):
        index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, quiet=True)
    config = IndexConfig(skip_missing=True, validation_fraction=0)
    report = index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=config, quiet=True)
    assert report.counts == {"samples": 4, "empty": 1, "missing": 1}
    assert report.train.num_documents == 2


def test_captions_among_large_members_are_read_alone(tmp_path: Path, tokenizer_folder: Path) -> None:
    members = [(f"{i}.{kind}", data) for i in range(20) for kind, data in (("jpg", bytes(50_000)), ("txt", b"a fox"))]
    write_tar(tmp_path / "s/a.tar", members)
    config = IndexConfig(validation_fraction=0)
    report = index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=config, quiet=True)
    reads: list[int] = []
    real = os.pread

    def counting(handle: int, length: int, offset: int) -> bytes:
        reads.append(length)
        return real(handle, length, offset)

    dataset = ForeignDataset(report.path / "train")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(os, "pread", counting)
        block = dataset.read(0)
    assert len(block.ends) == 20
    assert sum(reads) < 20 * 4096


@pytest.mark.parametrize(
    ("member", "data", "message"),
    [
        ("a.txt", b"\xff\xfe", r"a\.tar: member 'a\.txt': not UTF-8"),
        ("a.json", b'{"text": [', r"a\.tar: member 'a\.json': not JSON"),
        ("a.npy", npy(np.array([1, -1], "<i4")), "id 4294967295 does not belong to the tokenizer's vocabulary"),
        ("a.npy", npy(np.array([9999], "<u2")), "id 9999 does not belong"),
        ("a.npy", npy(np.array([{}], object)), "dtype"),
    ],
)
def test_documents_that_cannot_be_read_name_shard_and_member(
    tmp_path: Path, tokenizer_folder: Path, member: str, data: bytes, message: str
) -> None:
    write_tar(tmp_path / "s/a.tar", [(member, data)])
    with pytest.raises(DataError, match=message):
        index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, quiet=True)


def test_a_set_without_a_token_is_refused(tmp_path: Path, tokenizer_folder: Path) -> None:
    write_tar(tmp_path / "s/a.tar", [("a.txt", b" ")])
    with pytest.raises(DataError, match="every document is empty"):
        index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, quiet=True)


def test_a_folder_that_may_not_be_written_points_to_out(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text_set(tmp_path / "s", texts[:6])

    def read_only(path: Path) -> None:
        raise StorageError(f"{path}: cannot be written: permission denied")

    monkeypatch.setattr(index_module, "make_directory", read_only)
    config = IndexConfig(text_field="txt")
    with pytest.raises(StorageError, match="name another place with --out"):
        index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=config, quiet=True)


def test_two_at_once_are_refused(tmp_path: Path, texts: list[str], tokenizer_folder: Path) -> None:
    text_set(tmp_path / "s", texts[:6])
    (tmp_path / "s/.indexing-dstrain-index").mkdir()
    with (tmp_path / "s/.indexing-dstrain-index/lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is indexing"):
            index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=IndexConfig(text_field="txt"), quiet=True)


def test_an_output_that_is_something_else_is_left_alone(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path
) -> None:
    text_set(tmp_path / "s", texts[:6])
    (tmp_path / "o").mkdir()
    (tmp_path / "o/precious").write_text("x")
    with pytest.raises(DataError, match="exists and is no index"):
        index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, out=tmp_path / "o", overwrite=True, quiet=True)
    assert (tmp_path / "o/precious").exists()


def test_other_programs_indexes_are_held_against_the_shards(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path
) -> None:
    shard = text_set(tmp_path / "s", texts[:6], shards=1)[0]
    shard.with_suffix(".idx").write_text("v1.2 1\ntxt 512 7 x.txt\n")
    config = IndexConfig(text_field="txt")
    with pytest.raises(DataError, match=r"set-000\.tar: disagrees with .*set-000\.idx"):
        index_tars([tmp_path / "s"], tokenizer=tokenizer_folder, config=config, quiet=True)
    report = index_tars(
        [tmp_path / "s"], tokenizer=tokenizer_folder, config=config, use_other_indexes=False, quiet=True
    )
    assert report.train.num_documents + (report.validation.num_documents if report.validation else 0) == 6

"""Joining the shards of several reduce tasks; killed finishes are in tests/fault/test_build_kill.py."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest

from dstrain.base.errors import DataError
from dstrain.corpus import build_finish
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.data.inspect import verify_dataset
from dstrain.data.reader import ShardDataset


@pytest.fixture
def config():
    return ShardBuildConfig(block_tokens=64, shard_bytes=4096, validation_fraction=0.1)


def test_shards_of_all_groups_are_numbered_through_and_sound(corpus, tokenizer_folder, tmp_path, config):
    report = build_shards([str(corpus)], tokenizer=tokenizer_folder, out=tmp_path / "out", config=config, quiet=True)
    names = [shard.name for shard in report.train.shards]
    assert names == [f"shard-{k:06d}.tar" for k in range(len(names))]
    assert len(names) > 3
    blocks = ShardDataset(report.path / "train").blocks
    assert np.array_equal(np.unique(blocks["shard"]), np.arange(len(names)))
    assert verify_dataset(report.path).problems == ()


def blocks_that_could_be_fuller(dataset: ShardDataset, block_tokens: int) -> int:
    blocks = [dataset.read(number) for number in range(dataset.manifest.num_blocks)]
    return sum(len(one.tokens) + int(other.ends[0]) <= block_tokens for one, other in pairwise(blocks))


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_held_out_blocks_are_full_however_many_tasks_found_the_documents(
    corpus, tokenizer_folder, tmp_path, config, monkeypatch, compression
):
    """One block of the held-out split is short, not one a reduce task; training blocks stay as the tasks wrote them."""
    config = config.model_copy(update={"compression": compression, "block_tokens": 128})

    def build(name: str) -> ShardDataset:
        out = build_shards([str(corpus)], tokenizer=tokenizer_folder, out=tmp_path / name, config=config, quiet=True)
        assert verify_dataset(out.path).problems == ()
        return ShardDataset(out.path / "validation")

    gathered = build("gathered")
    assert gathered.manifest.num_blocks > 1
    assert blocks_that_could_be_fuller(gathered, 128) == 0
    monkeypatch.setattr(build_finish, "LEAST_BLOCKS", 0)
    ragged = build("ragged")
    assert blocks_that_could_be_fuller(ragged, 128) > 0, "the corpus gives one task only: this test shows nothing"
    assert ragged.manifest.num_blocks > gathered.manifest.num_blocks
    tokens = [np.concatenate([d.read(n).tokens for n in range(d.manifest.num_blocks)]) for d in (gathered, ragged)]
    assert np.array_equal(*tokens)


def test_a_finish_that_was_killed_while_it_wrote_held_out_blocks_can_be_repeated(
    corpus, tokenizer_folder, tmp_path, config, monkeypatch
):
    def build(name: str) -> dict[str, bytes]:
        build_shards([str(corpus)], tokenizer=tokenizer_folder, out=tmp_path / name, config=config, quiet=True)
        return {path.name: path.read_bytes() for path in sorted((tmp_path / name / "validation").iterdir())}

    with monkeypatch.context() as patch:
        patch.setattr(build_finish.ShardWriter, "finish", _killed_in_the_final_folder(build_finish.ShardWriter.finish))
        with pytest.raises(KeyboardInterrupt):
            build("out")
    assert any(path.name == "validation" for path in (tmp_path / ".work-out").glob("final-*/*"))
    assert build("out") == build("whole")


def _killed_in_the_final_folder(finish):
    def stop(writer, **named):
        if writer._folder.parent.name.startswith("final-"):
            raise KeyboardInterrupt
        return finish(writer, **named)

    return stop


def test_a_card_and_numbers_stand_beside_the_shards(corpus, tokenizer_folder, tmp_path, config):
    report = build_shards([str(corpus)], tokenizer=tokenizer_folder, out=tmp_path / "out", config=config, quiet=True)
    stats = json.loads((report.path / "stats.json").read_text())
    assert stats["totals"]["documents"] == 120
    assert stats["splits"]["train"]["shards"] == len(report.train.shards)
    assert stats["counts"]["tokens"]["train"] == report.train.num_tokens
    assert (report.path / "README.md").read_text().startswith("---\n")


def test_a_corpus_without_tokens_is_refused(tokenizer_folder, tmp_path, config):
    path = tmp_path / "c.txt"
    path.write_text("\u200b")  # text for Python, nothing for this tokenizer
    with pytest.raises(DataError, match="the corpus gives no tokens"):
        build_shards([str(path)], tokenizer=tokenizer_folder, out=tmp_path / "out", config=config, quiet=True)
    assert not (tmp_path / "out").exists()


def test_shards_that_vanish_from_the_work_folder_are_missed(corpus, tokenizer_folder, tmp_path, config, monkeypatch):
    def lose(*arguments, **named):
        for shard in (tmp_path / ".work-out" / "data").rglob("shard-000000.tar"):
            shard.unlink()
        return finish(*arguments, **named)

    finish = build_finish.finish_build
    monkeypatch.setattr("dstrain.corpus.build.finish_build", lose)
    with pytest.raises(DataError, match="the work folder was touched"):
        build_shards([str(corpus)], tokenizer=tokenizer_folder, out=tmp_path / "out", config=config, quiet=True)

"""The benchmark measures what is there: counts and sizes are exact, times are only present."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dstrain.base.config import merge, validate
from dstrain.data.reader import ShardDataset
from dstrain.foreign.index import IndexConfig, index_tars
from dstrain.stages.bench_advice import PARTS
from dstrain.stages.config import PretrainConfig
from dstrain.stages.loader_bench import BenchSettings, bench_loader
from tests.support.foreign_tars import text_set
from tests.support.http_range_server import serve_ranges


def config(shards: Path, **sections: Any) -> PretrainConfig:
    settings = {
        "run_folder": "unused",
        "model": {"config": {"model_type": "bert"}},
        "data": {"path": str(shards), "sequence_length": 48},
        "train": {"global_batch": 16, "micro_batch": 4, "max_steps": 100},
    }
    return validate(PretrainConfig, merge(settings, sections), source="test")


QUICK = BenchSettings(seconds=0.05, quiet=True)


def test_every_part_is_measured_and_the_facts_are_the_shards(shards: Path) -> None:
    measured = bench_loader(config(shards), QUICK)
    dataset = ShardDataset(shards / "train")
    assert set(measured.cpu_s_per_mtok) == set(PARTS)
    assert all(measured.cpu_s_per_mtok[part] > 0 for part in ("read", "gather", "masking", "ledger"))
    assert measured.bytes_per_token == sum(s.bytes for s in dataset.manifest.shards) / dataset.manifest.num_tokens
    assert measured.block_tokens == dataset.manifest.num_tokens / dataset.manifest.num_blocks
    assert 0 < measured.padding_percent < 20
    assert measured.wall_mtok > 0
    assert measured.store_mb_s > 0
    assert not measured.remote
    assert not measured.compressed
    assert measured.reread_factor == 1
    assert set(measured.seek_ms) == {"start", "far"}
    assert measured.rss_bytes > 1 << 20


def test_padding_falls_with_longer_blocks_and_the_window_is_shared_among_ranks(shards: Path) -> None:
    alone = bench_loader(config(shards), QUICK)
    shared = bench_loader(config(shards), BenchSettings(seconds=0.05, rank_share=8, threads=2, quiet=True))
    assert shared.working_set_bytes < alone.working_set_bytes


def test_the_loop_runs_on_where_a_step_holds_nothing_of_this_rank(shards: Path) -> None:
    measured = bench_loader(config(shards), BenchSettings(seconds=0.05, rank_share=16, quiet=True))
    assert measured.wall_mtok > 0


@pytest.mark.parametrize("whole_word", [True, False])
def test_whole_words_are_measured_too(shards: Path, whole_word: bool) -> None:
    measured = bench_loader(config(shards, objective={"whole_word": whole_word}), QUICK)
    assert measured.steady_mtok_s > 0


def test_tars_that_hold_more_than_tokens_are_measured_by_what_is_read(
    tmp_path: Path, texts: list[str], tokenizer_folder: Path
) -> None:
    text_set(tmp_path / "set", texts)
    index = IndexConfig(text_field="txt", block_tokens=256, validation_fraction=0.1)
    index_tars([tmp_path / "set"], tokenizer=tokenizer_folder, out=tmp_path / "index", config=index, quiet=True)
    measured = bench_loader(config(tmp_path / "index"), QUICK)
    assert 2 <= measured.bytes_per_token < 4
    assert measured.steady_mtok_s > 0


def test_a_url_is_measured_like_a_folder(shards: Path) -> None:
    with serve_ranges(shards) as server:
        measured = bench_loader(config(Path("unused"), data={"path": server.url}), QUICK)
    assert measured.remote
    assert measured.store_mb_s > 0

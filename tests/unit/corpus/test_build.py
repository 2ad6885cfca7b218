"""P15: the same bytes for any order, any number of workers and after any interruption; faults leave nothing behind."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError, StorageError
from dstrain.corpus import encoding
from dstrain.corpus.build import ShardBuildConfig, build_shards, forecast_build
from dstrain.corpus.filters import FiltersConfig
from dstrain.data.reader import ShardDataset
from dstrain.data.tokenizer import Tokenizer, train_tokenizer


def tree(folder: Path) -> dict[str, str]:
    # Row counts that readers keep beside the shards are no part of them.
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match("rows-S*.idx")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def documents(folder: Path) -> list[str]:
    dataset, tokenizer = ShardDataset(folder), Tokenizer.load(folder.parent / "tokenizer")
    found = []
    for number in range(dataset.manifest.num_blocks):
        block, start = dataset.read(number), 0
        for end in block.ends.tolist():
            found.append(tokenizer.decode(block.tokens[start:end]))
            start = end
    return found


def build(inputs: list[str], tokenizer: Path, out: Path, *, overwrite: bool = False, **changes):
    config = ShardBuildConfig(**({"block_tokens": 256, "shard_bytes": 8192, "validation_fraction": 0.1} | changes))
    return build_shards(inputs, tokenizer=tokenizer, out=out, config=config, overwrite=overwrite, quiet=True)


def test_every_document_is_in_one_split_once(shards, texts):
    train, validation = documents(shards / "train"), documents(shards / "validation")
    assert sorted([*train, *validation]) == sorted(texts)
    assert 1 <= len(validation) < len(train)
    assert (shards / "tokenizer" / "tokenizer.json").exists()


def test_workers_and_batches_do_not_change_a_byte(shards, corpus, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_TEXTS", 7)
    build([str(corpus)], tokenizer_folder, tmp_path / "out", workers=2)
    assert tree(tmp_path / "out") == tree(shards)


def test_the_order_of_files_and_lines_does_not_change_a_shard(corpus, texts, tokenizer_folder, tmp_path, shards):
    moved = texts.copy()
    random.Random(3).shuffle(moved)
    parts = [write_jsonl(tmp_path / f"{name}.jsonl", moved[start::2]) for name, start in (("z", 0), ("a", 1))]
    for out, inputs in (("one", parts), ("two", parts[::-1])):
        build(inputs, tokenizer_folder, tmp_path / out)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    # Against the corpus in one file only the provenance differs.
    assert (
        ShardDataset(tmp_path / "one" / "train").manifest.fingerprint
        == ShardDataset(shards / "train").manifest.fingerprint
    )


def test_shuffling_depends_on_the_seed_and_the_held_out_documents_do_not(corpus, tokenizer_folder, tmp_path, shards):
    build([str(corpus)], tokenizer_folder, tmp_path / "out", seed=5)
    assert documents(tmp_path / "out" / "train") != documents(shards / "train")
    assert sorted(documents(tmp_path / "out" / "validation")) == sorted(documents(shards / "validation"))


def test_duplicates_and_empty_documents_are_counted_and_left_out(tokenizer_folder, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", ["a fox", "", "a dog", "a fox", " \n ", "a fox"])
    report = build([source], tokenizer_folder, tmp_path / "out")
    assert report.counts == {
        "documents_read": 6,
        "empty": 2,
        "duplicates": 2,
        "train_documents": 1,
        "validation_documents": 1,
    }
    kept = build([source], tokenizer_folder, tmp_path / "kept", deduplicate=False, validation_fraction=0.0)
    assert kept.train.num_documents == 4
    assert kept.validation is None
    assert not (tmp_path / "kept" / "validation").exists()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chosen=st.lists(st.integers(0, 119), min_size=1, max_size=25),
    fraction=st.sampled_from([0.0, 1e-9, 0.01, 0.5]),
)
def test_what_goes_in_comes_out_with_something_held_out(tokenizer_folder, texts, tmp_path_factory, chosen, fraction):
    folder = tmp_path_factory.mktemp("any")
    given = [texts[index] for index in chosen]
    report = build(
        [write_jsonl(folder / "c.jsonl", given)], tokenizer_folder, folder / "out", validation_fraction=fraction
    )
    train = documents(folder / "out" / "train")
    validation = documents(folder / "out" / "validation") if report.validation else []
    assert sorted([*train, *validation]) == sorted(set(given))
    assert train
    assert bool(validation) == (fraction > 0 and len(set(given)) > 1)


def test_the_same_request_finds_the_finished_output(corpus, tokenizer_folder, shards, small_blocks):
    before = {path: path.stat().st_mtime_ns for path in shards.rglob("*")}
    report = build_shards([str(corpus)], tokenizer=tokenizer_folder, out=shards, config=small_blocks, quiet=True)
    assert report.reused
    assert report.counts["documents_read"] == 120
    assert {path: path.stat().st_mtime_ns for path in shards.rglob("*")} == before


def test_another_request_is_refused_with_what_differs_and_can_overwrite(tokenizer_folder, tmp_path, texts):
    source = write_jsonl(tmp_path / "c.jsonl", texts[:20])
    out = tmp_path / "out"
    build([source], tokenizer_folder, out)
    before = tree(out)
    with pytest.raises(DataError, match=r"settings \(seed\).*--overwrite"):
        build([source], tokenizer_folder, out, seed=1)
    write_jsonl(tmp_path / "c.jsonl", texts[:30])
    with pytest.raises(DataError, match=r"built from other inputs"):
        build([source], tokenizer_folder, out)
    other = train_tokenizer(texts, kind="bpe", vocab_size=300, out=tmp_path / "bpe", quiet=True)
    with pytest.raises(DataError, match=r"inputs, tokenizer"):
        build([source], other, out)
    assert tree(out) == before
    assert build([source], tokenizer_folder, out, overwrite=True).train.num_documents > 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe", "c.jsonl", "out"]


def test_a_folder_that_is_no_dataset_is_never_replaced(corpus, tokenizer_folder, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="holds something that is no dataset"):
            build([str(corpus)], tokenizer_folder, tmp_path, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the corpus is empty"),
        ('{"text": ""}\n', r"the corpus is empty \(1 documents"),
        ('{"text": "a fox"}\n{"body": "x"}\n', r"c\.jsonl:2: no field 'text'"),
    ],
)
def test_bad_input_leaves_nothing_half_written(tokenizer_folder, tmp_path, content, message):
    source = tmp_path / "c.jsonl"
    source.write_text(content)
    with pytest.raises(DataError, match=message):
        build([str(source)], tokenizer_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_disk_that_is_clearly_too_small_is_named_before_anything_is_written(
    corpus, tokenizer_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("dstrain.corpus.build.free_bytes", lambda _path: 1000)
    with pytest.raises(StorageError, match=r"MiB free, and the build needs about [1-9]\S* MiB"):
        build([str(corpus)], tokenizer_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_forecast_is_near_what_is_built_and_writes_nothing(corpus, tokenizer_folder, tmp_path):
    config = ShardBuildConfig(block_tokens=64, shard_bytes=1 << 20)
    found = forecast_build([str(corpus)], tokenizer=tokenizer_folder, out=tmp_path / "out", config=config)
    assert list(tmp_path.iterdir()) == []
    assert found.scratch_bytes == corpus.stat().st_size * 3 // 2
    report = build([str(corpus)], tokenizer_folder, tmp_path / "out", block_tokens=64, shard_bytes=1 << 20)
    assert len(report.train.shards) <= found.shards <= len(report.train.shards) + 2


def test_the_same_documents_are_dropped_by_filters_as_the_report_says(tokenizer_folder, tmp_path):
    source = write_jsonl(tmp_path / "c.jsonl", ["a fox", "a fox and a dog", "owls", "seven wise owls watch"])
    report = build([source], tokenizer_folder, tmp_path / "out", filters=FiltersConfig(min_words=3))
    assert report.dropped == {"too_few_words": 2}
    assert report.train.num_documents + report.validation.num_documents == 2


def test_compressed_blocks_hold_the_same_documents(corpus, tokenizer_folder, tmp_path, shards):
    build([str(corpus)], tokenizer_folder, tmp_path / "out", compression="zstd")
    assert documents(tmp_path / "out" / "train") == documents(shards / "train")

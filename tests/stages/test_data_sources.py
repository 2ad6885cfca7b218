"""A pretraining run on every kind of source: zstd shards, a URL, foreign tars; each trained, killed and resumed alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dstrain.cli.main import main
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.data.cached_store import SMALL_BYTES
from dstrain.foreign.index import IndexConfig, index_tars
from tests.support.foreign_tars import text_set
from tests.support.http_range_server import serve_ranges
from tests.support.runs import build_tiny_shards, pretrain_settings, step_events, write_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    build_tiny_shards(folder, num_documents=60)
    return folder


def train(
    folder: Path, name: str, *, steps: int = 6, path: str | None = None, **data: Any
) -> dict[int, dict[str, Any]]:
    settings = pretrain_settings(folder, folder / name, train={"max_steps": steps, "evaluate_rows": 8}, data=data)
    settings["data"]["path"] = path or str(folder / "shards")
    assert main(["pretrain", str(write_config(folder / f"{name}.yaml", settings))]) == 0
    return step_events(folder / name)


def ledgers(events: dict[int, dict[str, Any]]) -> dict[int, str]:
    return {step: event["step_ledger"] for step, event in events.items()}


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[int, str]:
    return ledgers(train(folder, "plain"))


def test_compressed_shards_give_the_same_run(folder: Path, plain: dict[int, str]) -> None:
    config = ShardBuildConfig.model_validate({"block_tokens": 1024, "validation_fraction": 0.1, "compression": "zstd"})
    build_shards(
        [str(folder / "corpus.jsonl")], tokenizer=folder / "tok", out=folder / "zstd", config=config, quiet=True
    )
    assert ledgers(train(folder, "compressed", path=str(folder / "zstd"))) == plain


@pytest.mark.parametrize("cached", [False, True])
def test_a_url_gives_the_same_run_and_a_resume_goes_on(folder: Path, plain: dict[int, str], cached: bool) -> None:
    storage = {"cache_dir": str(folder / "cache")} if cached else {}
    name, shards = f"remote-{cached}", folder / "shards"
    if cached:  # blocks of a few kB are not worth a file of the cache each
        shards = folder / "large"
        build_shards([str(folder / "corpus.jsonl")], tokenizer=folder / "tok", out=shards, quiet=True)
    expected = ledgers(train(folder, f"local-{cached}", path=str(shards))) if cached else plain
    with serve_ranges(shards) as server:
        first = train(folder, name, steps=6, path=server.url, storage=storage)
        assert ledgers(first) == expected
        before = len(server.requests)
        again = train(folder, name, steps=8, path=server.url, storage=storage)
        assert max(again) == 8
        if cached:
            ranges = [w[6:].split("-") for _, path, w in server.requests[before:] if path.endswith(".tar") and w]
            assert all(int(last) - int(first) < SMALL_BYTES for first, last in ranges), "kept, and fetched again"
    assert "127.0.0.1" not in json.dumps([path.name for path in (folder / "cache").rglob("*")])


def test_foreign_tars_are_trained_on_as_they_are(folder: Path) -> None:
    texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").read_text().splitlines()]
    text_set(folder / "foreign", texts, shards=3)
    config = IndexConfig(text_field="txt", block_tokens=1024, validation_fraction=0.1)
    index = index_tars([folder / "foreign"], tokenizer=folder / "tok", config=config, quiet=True)
    whole = ledgers(train(folder, "foreign-whole", steps=8, path=str(index.path)))
    train(folder, "foreign-run", steps=4, path=str(index.path))
    again = ledgers(train(folder, "foreign-run", steps=8, path=str(index.path), prefetch_steps=4, threads=3))
    assert again == whole
    ahead = ledgers(train(folder, "foreign-ahead", steps=4, path=str(index.path), tokenising_workers=1))
    assert ahead == {step: whole[step] for step in range(1, 5)}


def test_a_remote_source_that_is_gone_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serve_ranges(folder / "tok") as server:
        settings = pretrain_settings(folder, folder / "gone")
        settings["data"]["path"] = f"{server.url}/nowhere"
        assert main(["pretrain", str(write_config(folder / "gone.yaml", settings))]) == 78
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "/nowhere" in said


def test_a_scheme_that_runs_programs_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = pretrain_settings(folder, folder / "pipe")
    settings["data"]["path"] = "pipe:touch /tmp/dstrain-was-here"
    assert main(["pretrain", str(write_config(folder / "pipe.yaml", settings))]) == 78
    assert "pipe" in capsys.readouterr().err
    assert not Path("/tmp/dstrain-was-here").exists()


def test_a_shard_set_that_changed_is_refused_with_its_fingerprint(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = folder / "changed"
    shutil.copytree(folder / "shards", copy)
    train(folder, "changing", steps=4, path=str(copy))
    shutil.rmtree(copy)
    config = ShardBuildConfig.model_validate({"block_tokens": 1024, "validation_fraction": 0.1, "seed": 9})
    build_shards([str(folder / "corpus.jsonl")], tokenizer=folder / "tok", out=copy, config=config, quiet=True)
    settings = pretrain_settings(folder, folder / "changing", train={"max_steps": 6, "evaluate_rows": 8})
    settings["data"]["path"] = str(copy)
    command = ["pretrain", str(write_config(folder / "changing.yaml", settings))]
    assert main(command) == 78
    said = capsys.readouterr().err
    assert "fingerprints" in said
    assert "--accept-new-data" in said
    assert main([*command, "--accept-new-data"]) == 0
    events = [json.loads(line) for line in (folder / "changing" / "events.jsonl").read_text().splitlines()]
    [event] = [event for event in events if event["event"] == "new_data"]
    assert event["step"] == 4

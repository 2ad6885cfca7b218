"""Single tasks; that they give the same shards together is in test_build and test_executors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.build_config import ShardBuildConfig
from dstrain.corpus.build_plan import estimate_sizes, map_tasks, reduce_plan, reduce_tasks, scan_tasks
from dstrain.corpus.build_tasks import Job, run_task
from dstrain.corpus.filters import FiltersConfig
from dstrain.corpus.sources import Source
from dstrain.corpus.work_folder import WorkFolder
from dstrain.data.tokenizer import Tokenizer


def make_job(folder: Path, tokenizer: Path, **settings) -> Job:
    work = WorkFolder.beside(folder / "out")
    work.create()
    return Job(work, tokenizer, Tokenizer.load(tokenizer).fingerprint, ShardBuildConfig(**settings))


def make_maps(job: Job, path: Path):
    sources = [Source(str(path), path.stat().st_size)]
    sizes = estimate_sizes(sources)
    (scan,) = scan_tasks(sources, sizes, job.config)
    return map_tasks(sources, {str(path): run_task(job, scan)}, sizes, job.config), sizes


def test_a_finished_task_is_not_run_again(tmp_path, tokenizer_folder):
    path = tmp_path / "c.txt"
    path.write_text("one\ntwo\n")
    job = make_job(tmp_path, tokenizer_folder)
    (task,), _ = make_maps(job, path)
    reported: list[int] = []
    first = run_task(job, task, reported.append)
    assert first["documents"] == 1
    assert sum(reported) == task.weight == 8
    assert run_task(job, task, reported.append) == first
    assert sum(reported) == 8
    assert [path.name for path in (job.work.path / "data").iterdir()] == [first["data"]]


def test_filters_judge_before_documents_are_hashed(tmp_path, tokenizer_folder):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a"}\n{"text": "a fox and a dog"}\n{"text": " "}\n')
    job = make_job(tmp_path, tokenizer_folder, filters=FiltersConfig(min_words=2))
    (task,), _ = make_maps(job, path)
    result = run_task(job, task)
    assert result["documents"] == 1
    assert result["counts"]["dropped"] == {"empty": 1, "too_few_words": 1}
    assert result["splits"][0] == result["splits"][1]


def test_an_input_that_changes_meanwhile_is_refused(tmp_path, tokenizer_folder):
    path = tmp_path / "c.txt"
    path.write_text("one")
    job = make_job(tmp_path, tokenizer_folder)
    (task,), _ = make_maps(job, path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r"c\.txt: changed while it was read"):
        run_task(job, task)


def test_a_bad_line_names_its_place_and_leaves_no_data(tmp_path, tokenizer_folder):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "a fox"}\n{"text": 3}\n')
    job = make_job(tmp_path, tokenizer_folder)
    (task,), _ = make_maps(job, path)
    with pytest.raises(DataError, match=r"c\.jsonl:2"):
        run_task(job, task)
    assert list((job.work.path / "data").iterdir()) == []
    assert task.name not in job.work.done()


def test_a_tokenizer_that_changes_meanwhile_is_refused_and_leaves_no_data(tmp_path, tokenizer_folder):
    path = tmp_path / "c.txt"
    path.write_text("one")
    job = make_job(tmp_path, tokenizer_folder)
    maps, sizes = make_maps(job, path)
    plan = reduce_plan(maps, [run_task(job, task) for task in maps], sizes, config=job.config, token_bytes=2)
    job.work.complete("plan-x", plan)
    (task,) = reduce_tasks("plan-x", plan)
    with pytest.raises(DataError, match="the tokenizer changed"):
        run_task(Job(job.work, tokenizer_folder, "0" * 64, job.config), task)
    assert run_task(job, task)["tokens"] > 0

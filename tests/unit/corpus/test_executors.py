"""P15: pools, arrays and any order of tasks give the bytes that one process gives. Ray is in test_ray_executor."""

from __future__ import annotations

import hashlib
import json
import random
import threading
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError, DataError, RunInUseError, StorageError
from dstrain.corpus import build_plan, build_tasks, executors
from dstrain.corpus.build import ShardBuildConfig, build_shards, build_share
from dstrain.corpus.build_tasks import run_task
from dstrain.corpus.executors import ArrayShare, InProcess, SpawnPool, array_position
from dstrain.corpus.work_folder import WorkFolder
from dstrain.health.lease import RunLease

CONFIG = ShardBuildConfig(block_tokens=64, shard_bytes=8192, validation_fraction=0.1)


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True)
def _small_tasks(monkeypatch):
    monkeypatch.setattr(build_plan, "_LEAST_MAP_BYTES", 2048)
    monkeypatch.setattr(executors, "_POLL_S", 0.02)


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts):
    """The corpus in six files."""
    folder = tmp_path_factory.mktemp("files")
    for number in range(6):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::6])
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def expected(files, tokenizer_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "out"
    report = build_shards([str(files / "*")], tokenizer=tokenizer_folder, out=out, config=CONFIG, quiet=True)
    assert report.encoding_seconds > 0
    return tree(out)


def run(files, tokenizer, out, executor, **named):
    build_shards([str(files / "*")], tokenizer=tokenizer, out=out, config=CONFIG, quiet=True, executor=executor)
    return tree(out)


def share(files, tokenizer, out, index, count, *, wait_s=60.0):
    mine = ArrayShare(index, count, inner=InProcess(), wait_s=wait_s)
    return build_share([str(files / "*")], share=mine, tokenizer=tokenizer, out=out, config=CONFIG, quiet=True)


def test_a_pool_gives_the_same_bytes(files, tokenizer_folder, tmp_path, expected):
    assert run(files, tokenizer_folder, tmp_path / "out", SpawnPool(2)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_order_of_tasks_does_not_matter(files, tokenizer_folder, tmp_path, expected):
    class Mixed(InProcess):
        def run(self, job, tasks, *, quiet):
            for task in random.Random(7).sample(tasks, len(tasks)):
                run_task(job, task)

    assert run(files, tokenizer_folder, tmp_path / "out", Mixed()) == expected


def test_the_shares_of_an_array_meet_and_one_publishes(files, tokenizer_folder, tmp_path, expected):
    out, reports = tmp_path / "out", {}

    def work(index):
        reports[index] = share(files, tokenizer_folder, out, index, 3)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reports) == 3
    assert any(report is not None for report in reports.values())
    assert tree(out) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # A requeued share finds everything done.
    assert share(files, tokenizer_folder, out, 1, 3).reused


def test_one_job_of_many_does_what_jobs_that_never_start_leave(files, tokenizer_folder, tmp_path, expected):
    assert share(files, tokenizer_folder, tmp_path / "out", 2, 5) is not None
    assert tree(tmp_path / "out") == expected


def test_a_claim_that_makes_no_progress_is_waited_for_in_vain_with_a_message(
    files, tokenizer_folder, tmp_path, expected, monkeypatch
):
    out = tmp_path / "out"
    names: list[str] = []
    claim = WorkFolder.claim

    def claimed(self, name):
        names.append(name)
        return claim(self, name)

    monkeypatch.setattr(WorkFolder, "claim", claimed)
    monkeypatch.setattr(build_tasks, "_RUNNERS", {"scan": stop})
    with pytest.raises(DataError, match="stop"):
        share(files, tokenizer_folder, out, 0, 2)
    monkeypatch.undo()
    monkeypatch.setattr(build_plan, "_LEAST_MAP_BYTES", 2048)
    with (
        claim(WorkFolder.beside(out), names[0]),
        pytest.raises(
            StorageError, match=r"waited 0 s for 1 scan tasks that other jobs have claimed.*\.work-out/claims"
        ),
    ):
        share(files, tokenizer_folder, out, 0, 2, wait_s=0.1)
    # What was finished stays, and one process can end an array's build.
    assert run(files, tokenizer_folder, out, InProcess()) == expected


def stop(*_):
    raise DataError("stop")


def test_a_job_that_comes_too_late_finds_the_output_and_leaves_nothing(files, tokenizer_folder, tmp_path, expected):
    class Slow(InProcess):
        def run(self, job, tasks, *, quiet):
            if tasks[0].kind == "map":  # meanwhile another job publishes and clears up
                share(files, tokenizer_folder, tmp_path / "out", 1, 2)
            super().run(job, tasks, quiet=quiet)

    late = ArrayShare(0, 2, inner=Slow(), wait_s=5)
    report = build_share(
        [str(files / "*")], share=late, tokenizer=tokenizer_folder, out=tmp_path / "out", config=CONFIG, quiet=True
    )
    assert report is not None
    assert report.reused
    assert tree(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_bad_file_stops_the_build_and_its_mend_redoes_only_its_own_task(files, tokenizer_folder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in files.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    good = (folder / "5.jsonl").read_text()
    (folder / "5.jsonl").write_text(good + "{broken\n")
    with pytest.raises(DataError, match=r"5\.jsonl:21"):
        run(folder, tokenizer_folder, tmp_path / "out", InProcess())
    before = {path.name for path in (tmp_path / ".work-out" / "done").glob("map-*")}
    assert len(before) >= 5  # of about seven: all before the bad one
    (folder / "5.jsonl").write_text(good)
    ran: list[str] = []

    class Watched(InProcess):
        def run(self, job, tasks, *, quiet):
            ran.extend(task.name for task in tasks if task.name not in job.work.done())
            super().run(job, tasks, quiet=quiet)

    run(folder, tokenizer_folder, tmp_path / "out", Watched())
    assert 1 <= sum(name.startswith("map-") for name in ran) <= 2
    assert sum(name.startswith("scan-") for name in ran) == 1


def test_two_builds_of_one_output_do_not_run_together(files, tokenizer_folder, tmp_path):
    with RunLease(tmp_path / ".work-out"), pytest.raises(RunInUseError, match=r"out: being built by process \d+ on"):
        run(files, tokenizer_folder, tmp_path / "out", InProcess())
    assert (tmp_path / ".work-out").exists()


def test_a_process_that_dies_is_a_passing_fault_with_a_hint(files, tokenizer_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(executors, "single_threaded", exec)  # the spawned processes fail at their start
    with pytest.raises(StorageError, match="fewer --workers"):
        run(files, tokenizer_folder, tmp_path / "out", SpawnPool(2))


@pytest.mark.parametrize(
    ("given", "environ", "found"),
    [
        ((1, 4), {}, (1, 4)),
        (
            (None, None),
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "4"},
            (2, 4),
        ),
        ((None, 8), {"SLURM_ARRAY_TASK_ID": "5"}, (5, 8)),
    ],
)
def test_the_place_in_an_array_is_given_or_slurms(given, environ, found):
    assert array_position(*given, environ) == found


@pytest.mark.parametrize(("given", "environ"), [((None, 4), {}), ((1, None), {"SLURM_ARRAY_TASK_COUNT": "many"})])
def test_half_a_place_is_refused(given, environ):
    with pytest.raises(ConfigError, match="--task-index and --num-tasks"):
        array_position(*given, environ)


def test_a_share_outside_the_array_is_refused():
    with pytest.raises(ConfigError, match="from 0 to 2"):
        ArrayShare(3, 3, inner=InProcess())

"""P15: a build that is killed with SIGKILL at any moment goes on with what is missing and gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import signal
from pathlib import Path

import psutil
import pytest

from dstrain.corpus import build_plan, build_tasks
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.work_folder import WorkFolder
from dstrain.data.tokenizer import train_tokenizer
from tests.support.runs import wait_for

pytestmark = pytest.mark.fault

WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls watch from their old oak tree".split()
SETTINGS = {"block_tokens": 64, "shard_bytes": 8192, "validation_fraction": 0.1}


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str], int]:
    """A corpus in several files, a tokenizer, the undisturbed output, and its number of tasks."""
    folder = tmp_path_factory.mktemp("made")
    texts = [" ".join(WORDS[(k + j * j) % len(WORDS)] for j in range(k % 30)) + f" {k % 400}" for k in range(500)]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number in range(8):
        lines = (json.dumps({"text": text}) + "\n" for text in texts[number::8])
        (corpus / f"{number}.jsonl").write_text("".join(lines))
    tokenizer = train_tokenizer(texts, kind="wordpiece", vocab_size=300, out=folder / "tok", quiet=True)
    with counted() as ran:
        build(corpus, tokenizer, folder / "out")
    assert sum(kind == "map" for kind in ran) >= 4
    assert sum(kind == "reduce" for kind in ran) >= 4
    return corpus, tokenizer, tree(folder / "out"), len(ran)


class counted:  # noqa: N801
    """Kinds of the tasks that this process runs meanwhile, with the small map tasks of the script."""

    def __enter__(self) -> list[str]:
        ran: list[str] = []
        self._patch = pytest.MonkeyPatch()
        for kind, run in list(build_tasks._RUNNERS.items()):

            def counting(*args, kind=kind, run=run):
                ran.append(kind)
                return run(*args)

            self._patch.setitem(build_tasks._RUNNERS, kind, counting)
        self._patch.setattr(build_plan, "_LEAST_MAP_BYTES", 2048)
        return ran

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def build(corpus: Path, tokenizer: Path, out: Path) -> None:
    build_shards(
        [str(corpus / "*.jsonl")], tokenizer=tokenizer, out=out, config=ShardBuildConfig(**SETTINGS), quiet=True
    )


@pytest.mark.parametrize(("moment", "workers"), [("1", 1), ("9", 1), ("14", 1), ("finish", 1), ("10", 2), ("18", 2)])
def test_a_killed_build_goes_on_with_what_is_missing(made, tmp_path, tmp_path_factory, zygote, moment, workers):
    corpus, tokenizer, expected, tasks = made
    out, aside = tmp_path / "out", tmp_path_factory.mktemp("aside")
    arguments = [
        str(corpus),
        str(tokenizer),
        str(out),
        moment,
        str(workers),
        json.dumps(SETTINGS),
        str(aside / "ready"),
    ]
    with zygote.start_module("tests.support.stalled_build", *arguments, world_size=1, log_folder=aside) as job:
        wait_for((aside / "ready").exists, job=job)
        children = psutil.Process(job.processes[0].pid).children(recursive=True)
        assert bool(children) == (workers > 1)
        job.signal(signal.SIGKILL)
        job.wait()
    assert not out.exists()
    assert psutil.wait_procs(children, timeout=30)[1] == []
    work = WorkFolder.beside(out)
    # A kill may also fall inside the writing of a marker, whose staged file then stays: no finished task.
    (work.path / "done" / ".map-torn.json.0.tmp").write_text("{")
    done = [name for name in work.done() if not name.startswith("plan-")]
    with counted() as ran:
        build(corpus, tokenizer, out)
    assert len(ran) == tasks - len(done)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert tree(out) == expected

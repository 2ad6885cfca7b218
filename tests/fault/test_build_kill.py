"""P15: a build that is killed with SIGKILL at any moment goes on with what is missing and gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dstrain.corpus import build_plan, build_tasks
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.work_folder import WorkFolder
from dstrain.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.fault

WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls watch from their old oak tree".split()
SETTINGS = {"block_tokens": 64, "shard_bytes": 8192, "validation_fraction": 0.1}
SCRIPT = """
import json, sys, time
from pathlib import Path
from dstrain.corpus import build_finish, build_plan, executors
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.executors import Progress

corpus, tokenizer, out, moment, workers, settings = sys.argv[1:]
build_plan._LEAST_MAP_BYTES = 2048

def stall(*_, **__):
    print("ready", flush=True)
    time.sleep(600)

if moment == "finish":
    build_finish.write_card = stall
else:
    left = int(moment)
    count = Progress.finished
    def finished(self, task, result):
        global left
        count(self, task, result)
        left -= 1
        if left <= 0:
            stall()
    Progress.finished = finished
config = ShardBuildConfig(workers=int(workers), **json.loads(settings))
build_shards([corpus + "/*.jsonl"], tokenizer=Path(tokenizer), out=Path(out), config=config, quiet=True)
"""


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
def test_a_killed_build_goes_on_with_what_is_missing(made, tmp_path, moment, workers):
    corpus, tokenizer, expected, tasks = made
    out = tmp_path / "out"
    arguments = [str(corpus), str(tokenizer), str(out), moment, str(workers), json.dumps(SETTINGS)]
    with subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        children = psutil.Process(process.pid).children(recursive=True)
        assert bool(children) == (workers > 1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
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

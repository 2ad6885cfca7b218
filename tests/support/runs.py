"""Tiny corpora, configurations and processes for tests that run the real thing: shards, launch scripts, signals, kills."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from dstrain.base.config import merge
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from dstrain.data.tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
AUSTEN = Path(str(files("dstrain") / "corpora" / "austen.jsonl.gz"))

BERT = {
    "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def write_corpus(path: Path, *, num_documents: int = 120) -> Path:
    """A jsonl of real paragraphs (Austen) of very different lengths, so that packing has work to do."""
    lines = []
    for document in read_documents(find_sources([str(AUSTEN)]), CorpusConfig()):
        paragraphs = [p for p in document.text.split("\n") if p.strip()]
        for n, start in enumerate(range(0, len(paragraphs), 5)):
            text = " ".join(paragraphs[start : start + 1 + n % 3])[: 200 + 300 * (n % 4)]
            lines.append(json.dumps({"id": f"{document.id}-{n}", "text": text}))
            if len(lines) == num_documents:
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
                return path
    raise AssertionError("the embedded corpus is shorter than expected")


def build_tiny_shards(folder: Path, *, num_documents: int = 120, block_tokens: int = 1024) -> Path:
    """Tokenizer and shards of a few thousand tokens in `folder`/shards."""
    corpus = write_corpus(folder / "corpus.jsonl", num_documents=num_documents)
    texts = (d.text for d in read_documents(find_sources([str(corpus)]), CorpusConfig()))
    train_tokenizer(texts, kind="wordpiece", vocab_size=400, lowercase=True, out=folder / "tok", quiet=True)
    config = ShardBuildConfig(block_tokens=block_tokens, validation_fraction=0.1)
    build_shards([str(corpus)], tokenizer=folder / "tok", out=folder / "shards", config=config, quiet=True)
    return folder / "shards"


def pretrain_settings(shards: Path, run_folder: Path, **sections: Any) -> dict[str, Any]:
    """A pretraining configuration that runs in a second; `sections` are merged over it."""
    base = {
        "run_folder": str(run_folder),
        "seed": 7,
        "data": {"path": str(shards), "sequence_length": 48},
        "model": {"config": BERT},
        "optimizer": {"learning_rate": 2.0e-3},
        "schedule": {"warmup_steps": 2},
        "engine": {"precision": "fp32", "device": "cpu", "timeout_s": 60, "threads": 1},
        "train": {"global_batch": 12, "micro_batch": 4, "max_steps": 12, "evaluate_rows": 16},
        "checkpoint": {"every_steps": 4},
        "monitor": {"log_every": 1, "tensorboard": False},
    }
    return merge(base, sections)


def write_config(path: Path, settings: dict[str, Any]) -> Path:
    """Write settings as a run's YAML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Job:
    """N ranks of one command, started as a launcher would: rank and world in the environment."""

    def __init__(
        self, command: list[str], *, world_size: int, log_folder: Path, environment: dict[str, str] | None = None
    ):
        log_folder.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs = [log_folder / f"rank-{rank}.log" for rank in range(world_size)]
        for rank, log in enumerate(self.logs):
            ranks = {
                "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command],
                        env={**os.environ, **ranks, **(environment or {})},
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        cwd=ROOT,
                        start_new_session=True,
                    )
                )

    def wait(self, timeout_s: float = 150) -> list[int]:
        """Exit codes in rank order; everything is killed when it takes too long."""
        deadline = time.monotonic() + timeout_s
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.signal(signal.SIGKILL)
            raise AssertionError(f"ranks did not end in {timeout_s} s:\n{self.output()}") from None

    def succeed(self, timeout_s: float = 150) -> None:
        """Wait for exit code 0 of every rank."""
        codes = self.wait(timeout_s)
        assert codes == [0] * len(codes), f"exit codes {codes}:\n{self.output()}"

    def signal(self, number: int, ranks: list[int] | None = None) -> None:
        for rank, process in enumerate(self.processes):
            if (ranks is None or rank in ranks) and process.poll() is None:
                process.send_signal(number)

    def output(self) -> str:
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in self.logs)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.wait(30)


def pretrain_job(config: Path, *overrides: str, world_size: int, **kwargs: Any) -> Job:
    """launch/pretrain.py at a world size, as any launcher starts it."""
    logs = config.parent / f"logs-{config.stem}-{world_size}-{time.monotonic_ns()}"
    command = [str(ROOT / "launch" / "pretrain.py"), "--config", str(config), *overrides]
    return Job(command, world_size=world_size, log_folder=logs, **kwargs)


def step_events(run_folder: Path) -> dict[int, dict[str, Any]]:
    """The last `step` event of every step."""
    events: dict[int, dict[str, Any]] = {}
    path = run_folder / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if event["event"] == "step":
            events[event["step"]] = event
    return events


def wait_for(condition: Callable[[], bool], *, job: Job, timeout_s: float = 100) -> None:
    """Poll until a condition holds; fail with the job's output when it ends or takes too long."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        ended = [p.poll() for p in job.processes]
        assert None in ended or condition(), f"the job ended ({ended}) before the condition held:\n{job.output()}"
        assert time.monotonic() < deadline, f"condition not reached in {timeout_s} s:\n{job.output()}"
        time.sleep(0.01)


@contextmanager
def running(job: Job) -> Iterator[Job]:
    """Kill whatever is left of a job."""
    with job:
        yield job

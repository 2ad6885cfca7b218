"""What the unit tests of several rooms share: a world of one, a tiny corpus, its tokenizer and shards, each made once."""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.base.control import ControlPlane
from dstrain.base.world import World, free_port
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.data.tokenizer import train_tokenizer

WORDS = "the quick brown fox jumps over a lazy dog while seven wise owls watch from their old oak tree".split()


def sentence(index: int) -> str:
    """A document of 5 to 44 words that no other index gives."""
    length = 5 + index * 7 % 40
    return f"story {index} " + " ".join(WORDS[(index * 3 + k * k) % len(WORDS)] for k in range(length))


@pytest.fixture(scope="session")
def _processes() -> ControlPlane:
    from dstrain.train.engine import start_processes

    gc.freeze()  # DeepSpeed collects six times for each bf16 engine; what is imported by now need not be walked again
    before = dict(os.environ)
    try:
        return start_processes(World(master_port=free_port()), device="cpu", timeout_s=60)
    finally:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def control(_processes: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> ControlPlane:
    """The process group and the variables that DeepSpeed wants, and agreements of one rank with itself."""
    variables: dict[str, str] = {}
    _processes.world.export(variables)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return _processes


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return [sentence(index) for index in range(120)]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "tok"
    return train_tokenizer(texts, kind="wordpiece", vocab_size=300, out=out, lowercase=True, quiet=True)


@pytest.fixture(scope="session")
def small_blocks() -> ShardBuildConfig:
    return ShardBuildConfig(block_tokens=256, shard_bytes=8192, validation_fraction=0.1)


@pytest.fixture(scope="session")
def shards(
    tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer_folder: Path, small_blocks: ShardBuildConfig
) -> Path:
    """Read-only: a test that damages shards copies them first."""
    out = tmp_path_factory.mktemp("shards") / "out"
    build_shards([str(corpus)], tokenizer=tokenizer_folder, out=out, config=small_blocks, quiet=True)
    return out


class _Messages(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What dstrain logged during the test, whatever `configure_logs` did to the logger before."""
    logger = logging.getLogger("dstrain")
    handler, level = _Messages(), logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler.messages
    logger.removeHandler(handler)
    logger.setLevel(level)

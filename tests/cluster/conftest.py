"""One cluster for all tests of a session: built at the first, mended after each, taken down at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dstrain.corpus.build import ShardBuildConfig, build_shards
from tests.support.cluster import Lab, LabError, missing
from tests.support.cluster_runs import ClusterRun, Result
from tests.support.runs import build_tiny_shards, pretrain_job


@pytest.fixture(scope="session")
def _lab() -> Iterator[Lab]:
    reason = missing()
    if reason:
        pytest.skip(f"no cluster can be built here: {reason}")
    try:
        lab = Lab.install()
    except LabError as error:
        pytest.skip(f"no cluster can be built here: {error}")
    try:
        lab.bring_up()
        yield lab
    finally:
        lab.take_down()


@pytest.fixture
def lab(_lab: Lab) -> Iterator[Lab]:
    """Two idle nodes and a login node."""
    yield _lab
    _lab.mend()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: many small blocks, beside the corpus and its tokenizer."""
    return build_tiny_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def shards_by_default(shards: Path) -> Path:
    """Read-only: of the same corpus, made by one process with the settings that commands have unasked."""
    home = shards.parent
    out = home / "by-default"
    build_shards([str(home / "corpus.jsonl")], tokenizer=home / "tok", out=out, config=ShardBuildConfig(), quiet=True)
    return out


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Result:
    """What two ranks come to that nobody disturbs, on this machine."""
    return _undisturbed(tmp_path_factory.mktemp("undisturbed"), shards)


@pytest.fixture(scope="session")
def undisturbed_by_default(tmp_path_factory: pytest.TempPathFactory, shards_by_default: Path) -> Result:
    """The same, from the other shards."""
    return _undisturbed(tmp_path_factory.mktemp("undisturbed-by-default"), shards_by_default)


def _undisturbed(home: Path, shards: Path) -> Result:
    run = ClusterRun.prepare(home, shards)
    with pretrain_job(run.config, world_size=2) as job:
        job.succeed()
    return run.result()

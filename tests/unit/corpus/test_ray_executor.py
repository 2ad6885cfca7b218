"""The same bytes from a Ray of two CPUs; skipped where Ray is not installed."""

from __future__ import annotations

import hashlib
import json

import pytest

pytest.importorskip("ray")

import ray

from dstrain.base.errors import DataError, MachineError
from dstrain.corpus import build_plan
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.ray_executor import OnRay


@pytest.fixture
def one_ray(monkeypatch):
    """Ray takes some seconds to start: both builds of a test get the one that the first of them starts."""
    start, stop = ray.init, ray.shutdown
    monkeypatch.setattr(ray, "init", lambda **settings: None if ray.is_initialized() else start(**settings))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    yield
    stop()


@pytest.mark.slow  # Ray starts its own servers: 20 s on two cores that others use as well, nearly a minute on busy ones
@pytest.mark.usefixtures("one_ray")
def test_ray_gives_the_same_bytes_and_names_a_bad_line(corpus, tokenizer_folder, tmp_path, monkeypatch, texts):
    monkeypatch.setattr(build_plan, "_LEAST_MAP_BYTES", 2048)
    config = ShardBuildConfig(block_tokens=64, shard_bytes=8192, validation_fraction=0.1)
    found = []
    for name, executor in (("one", None), ("two", OnRay(workers=2))):
        out = tmp_path / name
        build_shards([str(corpus)], tokenizer=tokenizer_folder, out=out, config=config, quiet=True, executor=executor)
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        found.append({str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files})
    assert found[0] == found[1]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": texts[0]}) + "\n{broken\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2"):
        build_shards(
            [str(bad)], tokenizer=tokenizer_folder, out=tmp_path / "x", config=config, quiet=True, executor=OnRay()
        )


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(MachineError, match=r"--ray-address 127\.0\.0\.1:1"), OnRay(address="127.0.0.1:1"):
        pass

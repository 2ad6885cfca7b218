"""What a run says about its places, and how findings become an event, a line and an end."""

import json
import logging
from pathlib import Path

import pytest

from dstrain.base.config import validate
from dstrain.base.control import ControlPlane
from dstrain.base.errors import StorageError
from dstrain.base.world import World
from dstrain.health import sanity
from dstrain.health.sanity_disk import Room
from dstrain.health.sanity_findings import Finding
from dstrain.stages.assembly import Site
from dstrain.stages.config import PretrainConfig
from dstrain.stages.sanity import check_start, places_of
from tests.support.runs import pretrain_settings


def config(tmp_path, **sections):
    return validate(PretrainConfig, pretrain_settings(Path("/shards"), tmp_path / "run", **sections), source="test")


def site():
    world = World()
    return Site(world, ControlPlane(world), "cpu", "fp32")


def events(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def _messages(monkeypatch):
    monkeypatch.setattr(logging.getLogger("dstrain"), "propagate", True)


def test_places_follow_from_the_configuration(tmp_path):
    sections = {
        "checkpoint": {"mirror": str(tmp_path / "mirror"), "keep_last": 3},
        "data": {"storage": {"cache_dir": str(tmp_path / "cache"), "prefetch_bytes": 1 << 20}},
    }
    places = places_of(config(tmp_path, **sections), num_parameters=1_000_000)
    assert places.needed_bytes > 12_000_000
    assert (places.keep, places.mirror, places.cache, places.cache_bytes) == (
        3,
        tmp_path / "mirror",
        tmp_path / "cache",
        1 << 20,
    )
    remote = config(tmp_path, checkpoint={"mirror": "s3://bucket/run"})
    assert places_of(remote, num_parameters=1).mirror is None, "a store has no disk to ask"


def test_a_run_that_fits_goes_on_with_one_event_and_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="dstrain")
    check_start(config(tmp_path), site(), num_parameters=1000)
    (event,) = events(tmp_path)
    assert (event["event"], event["result"]) == ("start_checks", "ok")
    assert [finding["check"] for finding in event["findings"]] == ["disk"]
    assert len([r for r in caplog.records if "checked before the first step" in r.message]) == 1


def test_a_disk_without_room_for_a_checkpoint_ends_the_run_before_it_begins_and_is_on_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sanity, "room_at", lambda path: Room(str(path), 1 << 30, -1))
    with pytest.raises(
        StorageError, match=r"run_folder has 1\.07 GB free, a checkpoint takes 12 GB .*make room there"
    ) as caught:
        check_start(config(tmp_path), site(), num_parameters=1_000_000_000)
    assert caught.value.exit_code == 76
    assert events(tmp_path)[0]["result"] == "failed"


def test_a_disk_with_little_room_is_a_warning_of_its_own_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sanity, "room_at", lambda path: Room(str(path), 20_000_000, -1))
    check_start(config(tmp_path), site(), num_parameters=1_000_000)
    assert any(r.levelno == logging.WARNING and "disk: run_folder has 20 MB free" in r.message for r in caplog.records)


def test_what_is_switched_off_is_not_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr(sanity, "room_at", lambda path: pytest.fail("asked for the room"))
    check_start(config(tmp_path, start={"disk": False}), site(), num_parameters=10**12)
    assert events(tmp_path)[0]["findings"] == []


def test_a_gpu_that_torch_cannot_use_is_no_silent_cpu_run_unless_the_cpu_was_chosen(tmp_path, monkeypatch, caplog):
    broken = Finding(
        "accelerator",
        "failed",
        "there is an NVIDIA driver (550), and torch 2.13 is a CPU build",
        "install one for CUDA",
    )
    monkeypatch.setattr(sanity, "accelerator_here", lambda: broken)
    check_start(config(tmp_path, engine={"device": "cpu"}), site(), num_parameters=1000)
    assert not [r for r in caplog.records if r.levelno == logging.WARNING]
    check_start(config(tmp_path, engine={"device": "auto"}), site(), num_parameters=1000)
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "is a CPU build; the run uses the CPU: install one for CUDA" in record.message

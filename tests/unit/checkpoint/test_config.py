"""The section says in one way when to save, and refuses what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest

from dstrain.base.config import to_plain, validate
from dstrain.base.errors import ConfigError
from dstrain.checkpoint.config import CheckpointConfig


@pytest.mark.parametrize(
    ("fields", "interval"),
    [
        ({}, "auto"),
        ({"every_steps": "auto"}, "auto"),
        ({"every_steps": 500}, "steps"),
        ({"every_steps": None}, "end"),
        ({"every_minutes": 20}, "minutes"),
        ({"every_steps": None, "every_minutes": 20}, "minutes"),
    ],
)
def test_one_thing_decides_and_survives_being_written_down(fields: dict[str, Any], interval: str) -> None:
    config = validate(CheckpointConfig, fields, source="test")
    assert config.interval == interval
    assert validate(CheckpointConfig, to_plain(config), source="config.yaml").interval == interval


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"every_steps": 0}, "every_steps: 0 is not a number of steps"),
        ({"every_steps": "often"}, "every_steps"),
        ({"every_steps": 5, "every_minutes": 3}, "contradict each other: set one"),
        ({"every_minutes": 0}, "every_minutes"),
        ({"keep_last": 0}, "keep_last"),
        ({"keep_every": 0}, "keep_every"),
        ({"mirror_keep_last": 0}, "mirror_keep_last"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"mirror": "https://host/folder"}, "https:// cannot be written"),
        ({"mirror": "ftp://host/folder"}, "mirror"),
        ({"mirror": "s3://KEY:SECRET@bucket/folder"}, "keys do not belong into a URL"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        validate(CheckpointConfig, fields, source="test")
    assert "SECRET" not in str(caught.value)


def test_a_mirror_is_a_folder_or_a_store() -> None:
    for place in ("/disk2/run", "s3://bucket/run", "gs://bucket/run", "az://container/run"):
        assert CheckpointConfig(mirror=place).mirror == place

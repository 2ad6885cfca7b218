from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.corpus.build_config import ShardBuildConfig, build_request, content_key, request_differences
from dstrain.corpus.filters import FiltersConfig
from dstrain.corpus.sources import Source
from dstrain.data.tokenizer import Tokenizer


def request(tokenizer: Tokenizer, *names: str, sha256: str = "a", **settings):
    sources = [Source(name, 3) for name in names]
    config = ShardBuildConfig(**settings)
    return build_request(sources, {name: sha256 for name in names}, tokenizer, config)


def test_a_request_knows_content_but_neither_place_order_nor_workers(tokenizer_folder: Path) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    one = request(tokenizer, "/x/a.txt", "/x/b.txt", workers=1)
    assert request(tokenizer, "/other/b.txt", "/other/a.txt", workers=9) == one
    assert request(tokenizer, "/x/a.txt", "/x/b.txt", sha256="b") != one


@pytest.mark.parametrize(
    "changed",
    [{"seed": 1}, {"block_tokens": 64}, {"compression": "zstd"}, {"filters": FiltersConfig(min_words=2)}],
    ids=lambda changed: next(iter(changed)),
)
def test_every_setting_that_decides_bytes_is_named_as_a_difference(tokenizer_folder: Path, changed) -> None:
    tokenizer = Tokenizer.load(tokenizer_folder)
    before, after = request(tokenizer, "a.txt"), request(tokenizer, "a.txt", **changed)
    assert request_differences(before, after) == [f"settings ({next(iter(changed))})"]
    assert content_key(before) != content_key(after)
    assert request_differences(before, before) == []


def test_settings_out_of_range_name_the_key() -> None:
    with pytest.raises(ConfigError, match="block_tokens"):
        validate(ShardBuildConfig, {"block_tokens": 1}, source="command line")

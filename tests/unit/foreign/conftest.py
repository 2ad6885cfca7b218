"""A small foreign set of texts with its index, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.foreign.index import IndexConfig, IndexReport, index_tars
from tests.support.foreign_tars import text_set


@pytest.fixture(scope="session")
def foreign_config() -> IndexConfig:
    return IndexConfig(text_field="txt", block_tokens=256, validation_fraction=0.1)


@pytest.fixture(scope="session")
def foreign_index(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], tokenizer_folder: Path, foreign_config: IndexConfig
) -> IndexReport:
    """Read-only: a test that damages tars makes its own."""
    folder = tmp_path_factory.mktemp("foreign") / "set"
    text_set(folder, texts)
    return index_tars([folder], tokenizer=tokenizer_folder, config=foreign_config, quiet=True)

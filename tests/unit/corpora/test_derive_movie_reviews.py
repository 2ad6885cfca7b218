"""The rule that made the movie reviews, on lines made up here."""

from __future__ import annotations

import gzip
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "support/derive_movie_reviews.py"
    spec = importlib.util.spec_from_file_location("derive_movie_reviews", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_near_zero_and_repeated_sentences_are_left_out_and_the_sign_decides(recipe: ModuleType) -> None:
    lines = ["1\t0.49\tmeh", "2\t-0.5\tpoor ", "3\t2.5\tgood", "4\t-3\tgood", "5\t0\tnothing"]
    assert recipe.derive(lines) == "id\tlabel\trating\ttext\n2\tnegative\t-0.5\tpoor\n3\tpositive\t2.5\tgood\n"


def test_writing_twice_gives_the_same_bytes(recipe: ModuleType, tmp_path: Path) -> None:
    for name in ("a.gz", "other-name.gz"):
        recipe.write_gzip(tmp_path / name, "text\n")
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "other-name.gz").read_bytes()
    assert gzip.decompress((tmp_path / "a.gz").read_bytes()) == b"text\n"

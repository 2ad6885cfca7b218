from __future__ import annotations

import pytest

from dstrain.base.errors import DataError
from dstrain.data.tokenizer_build import TokenizerBuildConfig, build_tokenizer


def test_the_same_request_finds_the_trained_folder_and_another_is_refused(corpus, tmp_path):
    out = tmp_path / "tok"
    config = TokenizerBuildConfig(vocab_size=200, lowercase=True)
    first = build_tokenizer([str(corpus)], out=out, config=config, quiet=True)
    again = build_tokenizer([str(corpus)], out=out, config=config, quiet=True)
    assert (first.reused, again.reused) == (False, True)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    other = TokenizerBuildConfig(vocab_size=100)
    with pytest.raises(DataError, match="--overwrite"):
        build_tokenizer([str(corpus)], out=out, config=other, quiet=True)
    replaced = build_tokenizer([str(corpus)], out=out, config=other, overwrite=True, quiet=True)
    assert replaced.tokenizer.vocab_size < first.tokenizer.vocab_size


def test_a_folder_that_is_no_tokenizer_is_never_replaced(corpus, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(DataError, match="exists"):
            build_tokenizer([str(corpus)], out=tmp_path, overwrite=overwrite, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bad_line_names_file_and_line_and_leaves_nothing(tmp_path):
    source = tmp_path / "c.txt"
    source.write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(DataError, match=r"c\.txt:2: not UTF-8"):
        build_tokenizer([str(source)], out=tmp_path / "tok", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from dstrain.corpus.megatron import open_megatron, read_megatron
from dstrain.corpus.sources import Source
from dstrain.data.tokenizer import Tokenizer
from tests.support.token_files import MEGATRON_CODES, write_megatron


def read(path: Path, folder: Path | None, **settings) -> list[tuple[str, str]]:
    config = CorpusConfig(input_tokenizer=None if folder is None else str(folder), **settings)
    return [(d.id, d.text) for d in read_documents(find_sources([str(path)]), config)]


@pytest.fixture(scope="module")
def ids(texts: list[str], tokenizer_folder: Path) -> list[list[int]]:
    return [array.tolist() for array in Tokenizer.load(tokenizer_folder).encode_documents(texts[:20])]


@pytest.mark.parametrize("dtype", sorted(set(MEGATRON_CODES) - {"uint8", "int8"}))
def test_ids_become_the_texts_they_were_made_from(tmp_path, tokenizer_folder, texts, ids, dtype):
    path = write_megatron(tmp_path / "c_text_document", [[document] for document in ids], dtype=dtype)
    assert read(path, tokenizer_folder) == [(f"{path}:{i + 1}", text) for i, text in enumerate(texts[:20])]


def test_the_index_names_the_pair_too_and_both_names_are_one_source(tmp_path, ids):
    path = write_megatron(tmp_path / "c", [[ids[0]]])
    found = find_sources([str(tmp_path / "c.idx"), str(tmp_path / "c.bin"), str(tmp_path / "c.*")])
    assert [source.name for source in found] == [str(path)]
    path.unlink()
    with pytest.raises(DataError, match=r"c\.idx: its data file .*c\.bin is missing"):
        find_sources([str(tmp_path / "c.idx")])


def test_sentences_of_a_document_are_joined_and_the_end_of_document_leaves_no_text(
    tmp_path, tokenizer_folder, texts, ids
):
    end = Tokenizer.load(tokenizer_folder).sep_id
    path = write_megatron(tmp_path / "c", [[ids[0], [*ids[1], end]], [], [ids[2]]])
    assert [text for _, text in read(path, tokenizer_folder)] == [f"{texts[0]} {texts[1]}", "", texts[2]]


def test_ids_without_their_tokenizer_or_with_another_are_refused(tmp_path, tokenizer_folder):
    path = write_megatron(tmp_path / "c", [[[5, 6]], [[7, 40000]]])
    with pytest.raises(DataError, match=r"c\.bin: holds token ids, not text.*--input-tokenizer"):
        read(path, None)
    with pytest.raises(DataError, match=r"c\.bin:2: token id 40000 is outside the \d+ ids"):
        read(path, tokenizer_folder)
    with pytest.raises(DataError, match=r"tokenizer\.json: no such file\. --input-tokenizer takes"):
        read(path, tmp_path)


def test_an_index_that_does_not_fit_its_data_is_named_with_the_sequence(tmp_path, tokenizer_folder, ids):
    path = write_megatron(tmp_path / "c", [[document] for document in ids])
    whole, index = path.read_bytes(), path.with_suffix(".idx").read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match=rf"c\.idx: sequence 19: .* are not inside .*c\.bin \({len(whole) - 2} bytes\)"):
        read(path, tokenizer_folder)
    path.write_bytes(whole)
    for damaged, message in (
        (index[:-1], "copy it again"),
        (b"not an index at all, but long enough to hold one", "does not begin with MMIDIDX"),
        (index[:9] + struct.pack("<Q", 2) + index[17:], "version 2"),
        (index[:17] + b"\x07" + index[18:], "dtype code 7"),
        (index[:18] + struct.pack("<Q", 1 << 60) + index[26:], "copy it again"),
        (index[:-8] + struct.pack("<q", 3), "do not cover all 20 sequences"),
    ):
        path.with_suffix(".idx").write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            read(path, tokenizer_folder)
    path.with_suffix(".idx").unlink()
    with pytest.raises(DataError, match=r"c\.idx: missing"):
        read(path, tokenizer_folder)


def test_a_document_above_the_limit_is_refused(tmp_path, tokenizer_folder, ids):
    path = write_megatron(tmp_path / "c", [[ids[0]], [ids[1] * 100]])
    with pytest.raises(DataError, match=r"c\.bin:2: longer than 500 bytes"):
        read(path, tokenizer_folder, max_document_bytes=500)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_the_index_gives_documents_or_a_named_refusal(
    tmp_path_factory, tokenizer_folder, ids, data
):
    folder = tmp_path_factory.mktemp("flip")
    path = write_megatron(folder / "c", [[document] for document in ids[:5]])
    index = bytearray(path.with_suffix(".idx").read_bytes())
    at = data.draw(st.integers(0, len(index) - 1))
    index[at] ^= data.draw(st.integers(1, 255))
    path.with_suffix(".idx").write_bytes(index)
    count, message = 0, str(folder)
    try:
        count = len(read(path, tokenizer_folder))
    except DataError as error:
        message = str(error)
    assert count <= 5
    assert str(folder) in message


def test_a_part_reads_its_documents_only(tmp_path, tokenizer_folder, texts, ids):
    path = write_megatron(tmp_path / "c", [[document] for document in ids])
    assert open_megatron(path).num_documents == 20
    config = CorpusConfig(input_tokenizer=str(tokenizer_folder))
    part = Source(str(path), None, start=7, stop=9, first_row=7)
    seen: list[int] = []
    found = [(d.id, d.text) for d in read_megatron(part, config, seen.append)]
    assert found == [(f"{path}:8", texts[7]), (f"{path}:9", texts[8])]
    assert sum(seen) == 2 * len(ids[7] + ids[8])

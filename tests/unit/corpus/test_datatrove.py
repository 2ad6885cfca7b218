from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from dstrain.corpus.sources import Source
from dstrain.data.tokenizer import Tokenizer
from tests.support.token_files import write_datatrove


def read(path: Path, folder: Path | None, **settings) -> list[tuple[str, str]]:
    config = CorpusConfig(input_tokenizer=None if folder is None else str(folder), **settings)
    return [(d.id, d.text) for d in read_documents(find_sources([str(path)]), config)]


@pytest.fixture(scope="module")
def ids(texts: list[str], tokenizer_folder: Path) -> list[list[int]]:
    tokenizer = Tokenizer.load(tokenizer_folder)
    # datatrove ends every document with the tokenizer's end of text.
    return [[*array.tolist(), tokenizer.sep_id] for array in tokenizer.encode_documents(texts[:20])]


@pytest.mark.parametrize(("width", "metadata"), [(2, None), (4, None), (2, "gpt2|2\n100\n100 T"), (4, "x|y|4\n1\n1 T")])
def test_ids_of_either_width_become_the_texts_they_were_made_from(
    tmp_path, tokenizer_folder, texts, ids, width, metadata
):
    path = write_datatrove(tmp_path / "00000_c.ds", ids, width=width, metadata=metadata)
    assert read(path, tokenizer_folder) == [(f"{path}:{i + 1}", text) for i, text in enumerate(texts[:20])]


def test_jsonl_output_is_read_with_its_ids(tmp_path, texts):
    rows = [{"text": text, "id": f"a/{i}", "metadata": {"url": "x"}} for i, text in enumerate(texts[:3])]
    path = tmp_path / "00000.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    assert read(path, None, id_field="id") == [(f"a/{i}", text) for i, text in enumerate(texts[:3])]


def test_the_message_for_a_missing_tokenizer_says_which_one_it_was(tmp_path, ids):
    path = write_datatrove(tmp_path / "c.ds", ids, metadata="meta-llama/Llama-3|2\n1\n1 T")
    with pytest.raises(DataError, match=r"c\.ds: holds token ids, not text .*'meta-llama/Llama-3'.*--input-tokenizer"):
        read(path, None)


def test_files_that_do_not_fit_each_other_are_refused(tmp_path, tokenizer_folder, ids):
    path = write_datatrove(tmp_path / "c.ds", ids)
    whole, index_path = path.read_bytes(), path.with_name("c.ds.index")
    index = index_path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"c\.ds: \d+ bytes, but c\.ds\.index ends at \d+ ids: one of the two"):
        read(path, tokenizer_folder)
    path.write_bytes(whole)
    index_path.write_bytes(index[:-3])
    with pytest.raises(DataError, match=r"c\.ds\.index: \d+ bytes are no whole number"):
        read(path, tokenizer_folder)
    index_path.write_bytes(index[8:16] + index[:8] + index[16:])
    with pytest.raises(DataError, match=r"c\.ds\.index: the end of document 2 is not in order"):
        read(path, tokenizer_folder)
    index_path.unlink()
    with pytest.raises(DataError, match=r"c\.ds\.index: missing"):
        read(path, tokenizer_folder)
    path = write_datatrove(tmp_path / "c.ds", ids, metadata="gpt2|4\n1\n1 T")
    with pytest.raises(DataError, match="ids of 4 bytes each: one of the two"):
        read(path, tokenizer_folder)
    path.with_name("c.ds.metadata").write_text("no width")
    with pytest.raises(DataError, match=r"c\.ds\.metadata: the first line must end"):
        read(path, tokenizer_folder)


def test_an_empty_file_gives_no_document_and_a_long_one_is_refused(tmp_path, tokenizer_folder, ids):
    assert read(write_datatrove(tmp_path / "e.ds", []), tokenizer_folder) == []
    path = write_datatrove(tmp_path / "c.ds", [ids[0], ids[1] * 50])
    with pytest.raises(DataError, match=r"c\.ds:2: longer than 200 bytes"):
        read(path, tokenizer_folder, max_document_bytes=200)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_of_the_index_gives_documents_or_a_named_refusal(
    tmp_path_factory, tokenizer_folder, ids, data
):
    folder = tmp_path_factory.mktemp("flip")
    path = write_datatrove(folder / "c.ds", ids[:5])
    index_path = path.with_name("c.ds.index")
    index = bytearray(index_path.read_bytes())
    index[data.draw(st.integers(0, len(index) - 1))] ^= data.draw(st.integers(1, 255))
    index_path.write_bytes(index)
    count, message = 5, str(folder)
    try:
        count = len(read(path, tokenizer_folder))
    except DataError as error:
        message = str(error)
    assert count == 5
    assert str(folder) in message


def test_a_part_reads_its_documents_only(tmp_path, tokenizer_folder, texts, ids):
    path = write_datatrove(tmp_path / "c.ds", ids)
    part = Source(str(path), None, start=7, stop=9, first_row=7)
    config = CorpusConfig(input_tokenizer=str(tokenizer_folder))
    found = [(d.id, d.text) for d in read_documents([part], config)]
    assert found == [(f"{path}:8", texts[7]), (f"{path}:9", texts[8])]

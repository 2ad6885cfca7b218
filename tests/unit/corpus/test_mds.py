from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dstrain.base.errors import DataError
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from dstrain.corpus.sources import Source
from dstrain.data.tokenizer import Tokenizer
from tests.support.token_files import mds_array, mds_shard, write_mds

TEXT = {"text": ("str", None), "n": ("int", 8)}


def rows(texts: list[str], first: int = 0) -> list[dict[str, bytes]]:
    return [{"text": t.encode(), "n": struct.pack("<q", first + i)} for i, t in enumerate(texts)]


def read(path: Path, **settings) -> list[tuple[str, str]]:
    return [(d.id, d.text) for d in read_documents(find_sources([str(path)]), CorpusConfig(**settings))]


def texts_of(path: Path, **settings) -> list[str]:
    return [text for _, text in read(path, **settings)]


@pytest.mark.parametrize("zstd", [False, True])
def test_a_folder_gives_the_text_of_every_shard_in_order(tmp_path, texts, zstd):
    folder = write_mds(tmp_path / "set", TEXT, [rows(texts[:5]), rows(texts[5:8], 5)], zstd=zstd)
    suffix = ".zstd" if zstd else ""
    places = [f"{folder}/shard.00000.mds{suffix}:{i}" for i in range(1, 6)]
    places += [f"{folder}/shard.00001.mds{suffix}:{i}" for i in range(1, 4)]
    assert read(folder) == list(zip(places, texts[:8]))
    assert [name for name, _ in read(folder, id_field="n")] == [str(i) for i in range(8)]


def test_one_shard_is_read_without_its_index(tmp_path):
    path = tmp_path / "a.mds"
    path.write_bytes(mds_shard(TEXT, rows(["alpha", "", "gamma ✓"])))
    assert texts_of(path) == ["alpha", "", "gamma ✓"]


@pytest.mark.parametrize(
    ("encoding", "value"), [("json", b'"caf\\u00e9"'), ("bytes", "café".encode()), ("str", "café".encode())]
)
def test_text_columns_of_any_encoding_that_holds_text(tmp_path, encoding, value):
    path = tmp_path / "a.mds"
    path.write_bytes(mds_shard({"text": (encoding, None)}, [{"text": value}]))
    assert texts_of(path) == ["café"]


@pytest.mark.parametrize(
    ("encoding", "size", "dtype"),
    [
        ("ndarray", None, "int32"),
        ("ndarray", None, "uint16"),
        ("ndarray:int64", None, "int64"),
        ("ndarray:uint16:7", 14, "uint16"),
        ("ndarray:int32:1,7", 28, "int32"),
        ("bytes", None, "int64"),
    ],
)
def test_arrays_of_ids_become_text(tmp_path, tokenizer_folder, texts, encoding, size, dtype):
    ids = Tokenizer.load(tokenizer_folder).encode_documents(texts[:1])[0][:7].tolist()
    has_shape = encoding.count(":") == 2 or encoding == "bytes"
    value = (
        np.array(ids, dtype=dtype).tobytes() if has_shape else mds_array(ids, dtype, with_dtype=encoding == "ndarray")
    )
    path = tmp_path / "a.mds"
    path.write_bytes(mds_shard({"tokens": (encoding, size)}, [{"tokens": value}]))
    found = texts_of(path, text_field="tokens", input_tokenizer=str(tokenizer_folder))
    assert len(found[0]) > 5
    assert texts[0].startswith(found[0])
    if encoding != "bytes":
        with pytest.raises(DataError, match=r"a\.mds:1: holds token ids, not text"):
            texts_of(path, text_field="tokens")


def test_long_arrays_of_ids_keep_their_length(tmp_path, tokenizer_folder, texts):
    ids = np.concatenate(Tokenizer.load(tokenizer_folder).encode_documents(texts)).tolist()
    assert len(ids) > 256
    path = tmp_path / "a.mds"
    path.write_bytes(mds_shard({"tokens": ("ndarray", None)}, [{"tokens": mds_array(ids, "uint32")}]))
    found = texts_of(path, text_field="tokens", input_tokenizer=str(tokenizer_folder))
    assert found == [" ".join(texts)]


@pytest.mark.parametrize("encoding", ["pkl", "pil", "jpeg", "float32", "list[png]", "ndarray:float16"])
def test_what_holds_no_text_is_refused_and_never_decoded(tmp_path, tokenizer_folder, encoding):
    path = tmp_path / "a.mds"
    bomb = b"cos\nsystem\n(S'touch " + str(tmp_path / "owned").encode() + b"'\ntR."
    path.write_bytes(mds_shard({"text": (encoding, None)}, [{"text": bomb}]))
    with pytest.raises(DataError, match=r"a\.mds:1: "):
        texts_of(path, input_tokenizer=str(tokenizer_folder))
    assert not (tmp_path / "owned").exists()


def test_other_columns_are_passed_over_whatever_they_hold(tmp_path):
    path = tmp_path / "a.mds"
    columns = {"image": ("pil", None), "text": ("str", None), "zz": ("pkl", None)}
    path.write_bytes(mds_shard(columns, [{"image": b"\x00" * 9, "text": b"fine", "zz": b"\x80"}]))
    assert texts_of(path) == ["fine"]
    with pytest.raises(DataError, match=r"a\.mds: no field 'body'; it has 'image', 'text', 'zz'"):
        texts_of(path, text_field="body")
    with pytest.raises(DataError, match=r"no field 'key'.*--id-field"):
        texts_of(path, id_field="key")


def index_of(folder: Path, change) -> None:
    data = json.loads((folder / "index.json").read_text())
    change(data)
    (folder / "index.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["shards"][0]["raw_data"].update(basename="../../etc/passwd"), "names no file of this folder"),
        (lambda d: d["shards"][0]["raw_data"].update(basename="/etc/passwd"), "names no file of this folder"),
        (lambda d: d["shards"][0]["raw_data"].update(basename=7), "names no file of this folder"),
        (lambda d: d["shards"][0]["raw_data"].update(basename="gone.mds"), "file is missing: gone.mds"),
        (lambda d: d["shards"][0]["raw_data"].update(bytes=5), "copy it again"),
        (lambda d: d["shards"][0].update(format="json"), "not in MDS format"),
        (lambda d: d.update(version=1), "not an MDS index"),
        (lambda d: d.update(shards={}), "not an MDS index"),
    ],
)
def test_an_index_that_is_wrong_or_leads_out_of_its_folder_is_refused(tmp_path, change, message):
    folder = write_mds(tmp_path / "set", TEXT, [rows(["alpha"])])
    index_of(folder, change)
    with pytest.raises(DataError, match=message) as caught:
        find_sources([str(folder)])
    assert str(folder) in str(caught.value)


def test_damaged_shards_are_named(tmp_path):
    whole = mds_shard(TEXT, rows(["alpha", "beta"]))
    path = tmp_path / "a.mds"
    for damaged, message in (
        (whole[:-1], r"a\.mds:2: the shard ends 1 bytes too early"),
        (whole[:2], r"a\.mds: the shard ends 2 bytes too early"),
        (struct.pack("<I", 1 << 30) + whole[4:], "samples in one shard"),
        (struct.pack("<I", 1 << 27) + whole[4:], "too early"),
        (whole[:4] + struct.pack("<I", 5) + whole[8:], "does not rise"),
        (whole.replace(b'"column_names"', b'"column_nomes"'), "description of its columns"),
        (whole.replace(b"beta", b"b\xe9ta"), r"a\.mds:2: not UTF-8: byte 0xe9 at offset 1"),
        (
            whole.replace(struct.pack("<I", 4) + struct.pack("<q", 1), struct.pack("<I", 9) + struct.pack("<q", 1)),
            "sum to",
        ),
        (b"<html>404</html>" * 40, "samples in one shard"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=message):
            texts_of(path)
    path = tmp_path / "b.mds.zstd"
    path.write_bytes(zstandard.compress(whole)[:-6])
    with pytest.raises(DataError, match=r"b\.mds\.zstd: cannot be read to its end"):
        texts_of(path)


def test_a_sample_above_the_limit_is_refused(tmp_path):
    path = tmp_path / "a.mds"
    path.write_bytes(mds_shard(TEXT, rows(["a", "b" * 5000])))
    with pytest.raises(DataError, match=r"a\.mds:2: this sample is longer than 1000 bytes"):
        texts_of(path, max_document_bytes=1000)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_flipped_byte_gives_documents_or_a_named_refusal(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("flip") / "a.mds"
    shard = bytearray(mds_shard(TEXT, rows(["alpha", "beta", "gamma"])))
    shard[data.draw(st.integers(0, len(shard) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(shard)
    count, message = 0, str(path)
    try:
        count = len(texts_of(path))
    except DataError as error:
        message = str(error)
    assert count <= 3
    assert str(path) in message


def test_a_part_reads_its_samples_only_and_reports_its_bytes(tmp_path):
    path = tmp_path / "a.mds"
    path.write_bytes(mds_shard(TEXT, rows(["alpha", "beta", "gamma"])))
    found = read_documents([Source(str(path), None, start=1, stop=2, first_row=1)], CorpusConfig())
    assert [(d.id, d.text) for d in found] == [(f"{path}:2", "beta")]
    seen: list[int] = []
    list(read_documents(find_sources([str(path)]), CorpusConfig(), on_bytes=seen.append))
    assert sum(seen) == path.stat().st_size

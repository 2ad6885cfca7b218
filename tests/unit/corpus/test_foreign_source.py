from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.build import ShardBuildConfig, build_shards
from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
from tests.support.foreign_tars import npy_set, text_set, write_tar


def test_tars_are_inputs_like_any_other(tmp_path: Path, texts: list[str]) -> None:
    text_set(tmp_path / "a", texts[:30])
    text_set(tmp_path / "b", texts[30:40], shards=1, extension="json")
    reported: list[int] = []
    for inputs in ([f"wds:{tmp_path}"], [str(tmp_path / "a/*.tar"), str(tmp_path / "b/set-000.tar")]):
        sources = find_sources(inputs)
        found = list(read_documents(sources, CorpusConfig(), on_bytes=reported.append))
        assert [document.text for document in found] == texts[:40]
    assert found[0].id == f"{tmp_path / 'a/set-000.tar'}:part/000000"
    assert sum(reported) == 2 * sum(source.size_bytes or 0 for source in sources)


def test_the_text_field_is_that_of_the_corpus(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.json", b'{"body": "hello"}')])
    sources = find_sources([str(tmp_path / "a.tar")])
    assert next(read_documents(sources, CorpusConfig(text_field="body"))).text == "hello"
    with pytest.raises(DataError, match=r"a\.tar: member 'a\.json': no field 'text'"):
        list(read_documents(sources, CorpusConfig()))


def test_shards_built_from_tars_are_those_built_from_text(
    tmp_path: Path, texts: list[str], shards: Path, tokenizer_folder: Path, small_blocks: ShardBuildConfig
) -> None:
    text_set(tmp_path / "set", texts)
    report = build_shards(
        [f"wds:{tmp_path / 'set'}"], tokenizer=tokenizer_folder, out=tmp_path / "out", config=small_blocks, quiet=True
    )
    tars = sorted(path.relative_to(shards) for path in shards.rglob("*.tar"))
    assert tars
    assert [(report.path / tar).read_bytes() for tar in tars] == [(shards / tar).read_bytes() for tar in tars]


def test_sets_that_are_no_text_say_what_to_do(tmp_path: Path) -> None:
    npy_set(tmp_path / "n", [[1, 2]], shards=1)
    write_tar(tmp_path / "m/a.tar", [("a.txt", b"x"), ("b.cls", b"1")])
    write_tar(tmp_path / "l/a.tar", [("a.txt", b"x" * 100)])
    for place, message in (
        ("n", "use `dstrain shards convert`"),
        ("m", "'b' has no .txt member"),
        ("l", "longer than"),
    ):
        with pytest.raises(DataError, match=message):
            list(read_documents(find_sources([f"wds:{tmp_path / place}"]), CorpusConfig(max_document_bytes=50)))
    with pytest.raises(DataError, match="commands and URLs are refused"):
        find_sources(["wds:pipe:true"])

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dstrain.base.errors import DataError
from dstrain.corpus.filters import FiltersConfig
from dstrain.corpus.sampling import text_places
from dstrain.corpus.tokenizer_build import (
    FERTILITY_NAME,
    Fertility,
    TokenizerBuildConfig,
    TokenizerReport,
    build_tokenizer,
    measure,
)
from dstrain.data.tokenizer import Tokenizer


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
        with pytest.raises(DataError, match=r"thesis\.tex: is a file; choose another --out"):
            build_tokenizer([str(corpus)], out=tmp_path / "thesis.tex", overwrite=overwrite, quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bad_line_names_file_and_line_and_leaves_nothing(tmp_path):
    source = tmp_path / "c.txt"
    source.write_bytes(b"fine\nbad \xff\n")
    with pytest.raises(DataError, match=r"c\.txt:2: not UTF-8"):
        build_tokenizer([str(source)], out=tmp_path / "tok", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


@pytest.mark.parametrize(("text", "count"), [("", 0), ('{"text": ""}\n', 1)])
def test_an_empty_corpus_is_named(text, count, tmp_path):
    source = tmp_path / "c.jsonl"
    source.write_text(text)
    with pytest.raises(DataError, match=rf"c\.jsonl: the corpus is empty \({count} documents, none with text\)"):
        build_tokenizer([str(source)], out=tmp_path / "tok", quiet=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def train(inputs, out, **settings) -> TokenizerReport:
    config = TokenizerBuildConfig(**{"vocab_size": 300, **settings})
    return build_tokenizer([str(path) for path in inputs], out=out, config=config, quiet=True)


def write(folder: Path, names: str, texts: list[str]) -> list[Path]:
    paths = []
    for place, name in enumerate(names):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts[place :: len(names)]))
        paths.append(path)
    return paths


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
@pytest.mark.parametrize("sample", [{"sample_bytes": 6000}, {"sample_share": 0.5}])
def test_a_sample_gives_one_vocabulary_however_the_documents_lie_in_files(tmp_path, texts, kind, sample):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    one = train(write(tmp_path / "a", "xyz", texts), tmp_path / "one", kind=kind, **sample)
    two = train(write(tmp_path / "b", "qp", [*reversed(texts)]), tmp_path / "two", kind=kind, **sample)
    assert one.tokenizer.fingerprint == two.tokenizer.fingerprint
    assert one.fertility == two.fertility


def test_held_out_documents_are_not_learned_from(tmp_path):
    # Each document has a character of its own, which only a document that is learned from puts into the alphabet.
    marked = {chr(0x4E00 + k): f"document {k} {chr(0x4E00 + k)}" for k in range(300)}
    held_out = {c for c, text in marked.items() if text_places(text.encode())[1] < 0.05 * (1 << 64)}
    assert 3 <= len(held_out) <= 30
    paths = write(tmp_path, "c", [*marked.values()])
    report = train(paths, tmp_path / "tok", sample_share=1.0, vocab_size=1000)
    known = {c for c in marked if report.tokenizer.token(int(report.tokenizer.encode_documents([c])[0][0])) != "[UNK]"}
    assert known == set(marked) - held_out
    assert report.fertility is not None
    assert report.fertility.is_held_out
    assert report.fertility.documents == len(held_out)
    assert report.fertility.unknown_share > 0


def test_the_report_counts_tokens_words_and_unknown_ones(tmp_path, texts, tokenizer_folder):
    tokenizer = Tokenizer.load(tokenizer_folder)
    found = measure(tokenizer, iter(["the quick fox", "the ☃"]), is_held_out=True)
    ids = [i for array in tokenizer.encode_documents(["the quick fox", "the ☃"]) for i in array.tolist()]
    unknown = [i for i in ids if tokenizer.token(i) == "[UNK]"]
    assert found == Fertility(
        documents=2,
        words=5,
        tokens_per_word=round(len(ids) / 5, 4),
        characters_per_token=round(18 / len(ids), 4),
        unknown_share=round(len(unknown) / len(ids), 6),
        is_held_out=True,
    )
    assert len(unknown) == 1
    assert measure(tokenizer, iter([]), is_held_out=False) is None


def test_a_finished_folder_still_tells_its_fertility(tmp_path, corpus):
    first = train([corpus], tmp_path / "tok")
    again = train([corpus], tmp_path / "tok")
    assert (again.reused, again.fertility) == (True, first.fertility)
    assert first.fertility is not None
    assert not first.fertility.is_held_out
    (tmp_path / "tok" / FERTILITY_NAME).unlink()
    assert train([corpus], tmp_path / "tok").fertility is None


def test_filters_decide_what_is_learned_from_and_are_counted(tmp_path, corpus, texts):
    short = sum(len(t) < 100 for t in texts)
    assert 0 < short < len(texts)
    report = train([corpus], tmp_path / "tok", filters=FiltersConfig(min_characters=100))
    assert report.dropped == {"too_short": short}
    with pytest.raises(DataError, match=rf"the filters drop all {len(texts)} documents \(too_short {len(texts)}\)"):
        train([corpus], tmp_path / "none", filters=FiltersConfig(min_characters=10_000))
    assert not (tmp_path / "none").exists()


def test_two_kinds_of_sample_exclude_each_other():
    with pytest.raises(ValueError, match="exclude each other"):
        TokenizerBuildConfig(sample_bytes=5, sample_share=0.5)

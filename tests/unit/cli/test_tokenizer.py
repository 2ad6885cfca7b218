"""`dstrain tokenizer train` with samples and filters, as a person types it, in this process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError, DataError
from dstrain.cli import tokenizer
from dstrain.corpus.filters import FiltersConfig, HookConfig
from dstrain.corpus.sources import CorpusConfig
from dstrain.data.tokenizer import Tokenizer
from tests.support.token_files import write_megatron


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tokenizer.add_parser(parser.add_subparsers())
    return parser.parse_args(["tokenizer", "train", *map(str, argv)])


def run(*argv: str | Path) -> int:
    args = parse(*argv)
    return int(args.run(args))


def test_arguments_become_settings_of_input_and_filters():
    args = parse(
        *("--input", "a.bin", "--out", "tok", "--input-tokenizer", "gpt2", "--max-document-bytes", "99"),
        *("--min-chars", "1", "--max-chars", "9", "--min-words", "2", "--max-words", "8", "--max-non-letters", "0.3"),
        *("--max-control", "0.01", "--scripts", "Latin", "Greek", "--min-script-share", "0.7", "--nfc"),
        *("--strip-control", "--filter", "lid:language=de", "--filter", "quality"),
    )
    corpus = validate(CorpusConfig, tokenizer.corpus_settings(args), source="test")
    assert corpus == CorpusConfig(input_tokenizer="gpt2", max_document_bytes=99)
    assert validate(FiltersConfig, tokenizer.filter_settings(args), source="test") == FiltersConfig(
        min_characters=1,
        max_characters=9,
        min_words=2,
        max_words=8,
        max_non_letters=0.3,
        max_control=0.01,
        scripts=("Latin", "Greek"),
        min_script_share=0.7,
        hooks=(HookConfig(name="lid", settings={"language": "de"}), HookConfig(name="quality")),
        normalize=True,
        strip_control=True,
    )


def test_without_arguments_settings_are_the_defaults():
    args = parse("--input", "a.txt", "--out", "tok")
    assert validate(CorpusConfig, tokenizer.corpus_settings(args), source="test") == CorpusConfig()
    assert validate(FiltersConfig, tokenizer.filter_settings(args), source="test") == FiltersConfig()


def test_a_sample_is_measured_on_held_out_documents_and_drops_are_told(tmp_path, capsys):
    rows = [{"text": f"document {k} of some words"} for k in range(400)] + [{"text": "x"}] * 3
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ("--input", tmp_path / "c.jsonl", "--vocab-size", "150", "--min-chars", "5", "--out", tmp_path / "tok")
    assert run(*args, "--sample-mb", "0.005") == 0
    shown = capsys.readouterr().out
    assert "left out     3 too_short" in shown
    assert "held-out documents" in shown
    assert "tokens per word" in shown
    assert run(*args, "--sample-mb", "0.005") == 0
    again = capsys.readouterr()
    assert "nothing to do" in again.err
    assert "held-out documents" in again.out
    with pytest.raises(DataError, match="--overwrite"):
        run(*args)


def test_token_ids_are_read_through_their_tokenizer(tmp_path, tokenizer_folder, texts, capsys):
    ids = Tokenizer.load(tokenizer_folder).encode_documents(texts)
    path = write_megatron(tmp_path / "c", [[array.tolist()] for array in ids])
    args = ("--input", path, "--vocab-size", "200", "--out", tmp_path / "tok")
    with pytest.raises(DataError, match="holds token ids, not text"):
        run(*args)
    assert run(*args, "--input-tokenizer", tokenizer_folder) == 0
    assert "documents it learned from" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--scripts", "Latein"), "'Latein' is no name of a Unicode script"),
        (("--filter", "nosuch"), "no installed package offers a document filter 'nosuch'"),
        (("--filter", "x:y"), "write NAME or NAME:key=value"),
        (("--sample-share", "1.5"), "sample_share"),
        (("--sample-mb", "-1"), "sample_bytes"),
    ],
)
def test_wrong_settings_are_named(corpus, tmp_path, extra, message):
    with pytest.raises(ConfigError, match=message):
        run("--input", corpus, "--out", tmp_path / "tok", *extra)
    assert not (tmp_path / "tok").exists()

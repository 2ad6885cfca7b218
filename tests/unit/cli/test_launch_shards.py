"""Arguments of a shard build from the command line and from a YAML: the same words, which mean the same to the build."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from dstrain.base.errors import ConfigError
from dstrain.cli.launch_shards import build_words
from dstrain.cli.main import build_parser


def parsed(words: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(["launch", "shards", *words])


def built(words: list[str]) -> argparse.Namespace:
    return build_parser().parse_args(["shards", "build", *words])


def test_words_mean_to_the_build_what_they_meant_here() -> None:
    given = ["--input", "a b.jsonl", "--input=-c.txt", "--tokenizer", "tok", "--out", "out", "--scripts", "Latin", "Greek", "--nfc",
             "--seed", "3", "--max-non-letters", "0.25", "--workers", "4", "--compression", "zstd"]  # fmt: skip
    words = build_words(parsed(given), None)
    assert vars(built(words)) == vars(built(given))
    assert build_words(parsed(words), None) == words


def test_defaults_are_not_spelt_out() -> None:
    words = build_words(parsed(["--input", "a", "--tokenizer", "t", "--out", "o", "--seed", "0"]), None)
    assert words == ["--input=a", "--tokenizer=t", "--out=o"]


def test_a_file_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    settings = {"input": ["a.jsonl", "b.jsonl"], "tokenizer": "tok", "out": "shards", "text-field": "body", "block_tokens": 4096,
                "keep_duplicates": True, "nfc": False, "validation_fraction": 0.05, "scripts": ["Latin"]}  # fmt: skip
    path = tmp_path / "shards.yaml"
    path.write_text(yaml.safe_dump(settings))
    args = built(build_words(parsed([str(path), "--out", "other", "--workers", "2"]), path))
    assert (args.input, args.tokenizer, args.out) == (["a.jsonl", "b.jsonl"], Path("tok"), Path("other"))
    assert (args.text_field, args.block_tokens, args.keep_duplicates, args.nfc) == ("body", 4096, True, False)
    assert (args.validation_fraction, args.scripts, args.workers) == (0.05, ["Latin"], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputs: a", "inputs: not an argument.*Did you mean input"),
        ("seed: many", "seed: 'many': not a int"),
        ("seed: [1]", "seed: .*a single value"),
        ("nfc: 1", "nfc: 1: true or false"),
        ("input: []", "input: .*a text, or a list"),
        ("input: [1]", "input: .*a text, or a list"),
        ("compression: gzip", "compression: 'gzip': one of none, zstd"),
        ("input: a\ntokenizer: t", "--out missing"),
    ],
)
def test_a_fault_in_the_file_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "shards.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        build_words(parsed([str(path)]), path)

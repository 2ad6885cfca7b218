"""`dstrain tokenizer train`: a vocabulary from a corpus; and the arguments about text that `shards build` shares."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dstrain.base.errors import ExitCode

_EPILOG = """
examples:
  dstrain tokenizer train --input 'corpus/*.jsonl.gz' --vocab-size 32768 --out tok/
  dstrain tokenizer train --input 'web/**/*.parquet' --sample-mb 500 --scripts Latin --kind bpe --out tok/
  dstrain tokenizer train --input books/*.txt --split blank-lines --kind bpe --out tok/
  dstrain tokenizer train --input hf:Salesforce/wikitext/wikitext-2-raw-v1 --lowercase --out tok/

The result is a folder for AutoTokenizer.from_pretrained. An existing tokenizer (BERT's, RoBERTa's, ...) needs no
training: give its folder to `dstrain shards build --tokenizer`. The same command again finds the finished folder.

Why a sample: a vocabulary is a table of frequent pieces, and frequencies settle early. Beyond a few hundred MB of text
almost no piece changes, while time and memory grow with the text. The sample is chosen by a hash of each document, so
it is spread evenly over the corpus and is the same for any order of files. With a sample, one document in twenty of it
is not learned from, and the tokenizer is measured on these when it is done.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `tokenizer train`."""
    parser = subparsers.add_parser("tokenizer", help="train a tokenizer from text")
    commands = parser.add_subparsers(title="commands", dest="action", required=True, metavar="ACTION")
    train = commands.add_parser(
        "train",
        help="train a vocabulary",
        description="Train a tokenizer from text and write its folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus_arguments(train)
    train.add_argument("--out", required=True, type=Path, help="folder to write")
    train.add_argument(
        "--kind", choices=("wordpiece", "bpe", "unigram"), default="wordpiece", help="wordpiece (default) is BERT's"
    )
    train.add_argument("--vocab-size", type=int, default=32768, help="ids, special tokens included (default 32768)")
    train.add_argument("--lowercase", action="store_true", help="fold case; wordpiece then strips accents too")
    train.add_argument(
        "--min-frequency", type=int, default=2, help="pieces seen less often are not learned (default 2)"
    )
    train.add_argument(
        "--model-max-length", type=int, default=512, help="longest input of the exported model (default 512)"
    )
    sample = train.add_mutually_exclusive_group()
    sample.add_argument(
        "--sample-mb",
        type=float,
        default=None,
        metavar="N",
        help="learn from N MiB of text (500 is ample), held in memory; default: all of the text",
    )
    sample.add_argument(
        "--sample-share", type=float, default=None, metavar="X", help="learn from this share of the documents, 0 to 1"
    )
    train.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer folder")
    train.set_defaults(run=run_train)


def add_corpus_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Register how text is read and filtered; `corpus_settings` and `filter_settings` take the values up."""
    text = parser.add_argument_group("input")
    text.add_argument(
        "--input",
        required=required,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="txt, jsonl, csv, tsv (each also .gz, .zst), parquet, WebDataset .tar, Megatron .bin/.idx or datatrove .ds "
        "files, patterns, MDS folders, wds:FOLDER, or hf:OWNER/NAME[/CONFIG][:SPLIT]",
    )
    text.add_argument("--text-field", default="text", help="field or column with the text (default text)")
    text.add_argument("--id-field", default=None, help="field that names a document in messages (default file:line)")
    text.add_argument(
        "--format",
        choices=("auto", "txt", "jsonl", "csv", "tsv", "parquet", "megatron", "mds", "datatrove", "webdataset"),
        default="auto",
        help="default: by file name",
    )
    text.add_argument(
        "--split",
        choices=("file", "blank-lines", "lines"),
        default="file",
        help="how txt files become documents (default: one file, one document)",
    )
    text.add_argument(
        "--max-document-bytes", type=int, default=64 << 20, help="longest line or document accepted (default 64 MiB)"
    )
    text.add_argument(
        "--input-tokenizer",
        default=None,
        metavar="DIR",
        help="folder with the tokenizer.json that made the ids of Megatron, .ds and MDS inputs: they become text again",
    )
    _add_filter_arguments(
        parser.add_argument_group("filters", "All are off by default. Dropped documents are counted.")
    )


def _add_filter_arguments(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--min-chars", type=int, default=0, metavar="N", help="fewest characters")
    group.add_argument("--max-chars", type=int, default=None, metavar="N", help="most characters")
    group.add_argument("--min-words", type=int, default=0, metavar="N", help="fewest words")
    group.add_argument("--max-words", type=int, default=None, metavar="N", help="most words")
    group.add_argument(
        "--max-non-letters",
        type=float,
        default=None,
        metavar="X",
        help="largest share of digits, punctuation and symbols; prose is near 0.05, code and tables near 0.3",
    )
    group.add_argument(
        "--max-control",
        type=float,
        default=None,
        metavar="X",
        help="largest share of control and replacement characters; 0.001 finds wrongly decoded text",
    )
    group.add_argument(
        "--scripts", nargs="+", default=[], metavar="NAME", help="wanted Unicode scripts: Latin, Cyrillic, Han, ..."
    )
    group.add_argument(
        "--min-script-share",
        type=float,
        default=0.8,
        metavar="X",
        help="least share of letters in the wanted scripts (default 0.8)",
    )
    group.add_argument(
        "--filter",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help="a filter of an installed package (entry points dstrain.document_filters), e.g. for language or quality; "
        "may stand several times",
    )
    group.add_argument("--nfc", action="store_true", help="bring text to Unicode normal form NFC first")
    group.add_argument("--strip-control", action="store_true", help="remove control characters first")


def corpus_settings(args: argparse.Namespace) -> dict[str, object]:
    """The `CorpusConfig` fields of parsed arguments."""
    names = ("text_field", "id_field", "format", "split", "max_document_bytes", "input_tokenizer")
    return {name: getattr(args, name) for name in names}


def filter_settings(args: argparse.Namespace) -> dict[str, object]:
    """The `FiltersConfig` fields of parsed arguments.

    Raises:
        ConfigError: a `--filter` cannot be read.
    """
    from dstrain.corpus.filters import parse_hook

    return {
        "min_characters": args.min_chars,
        "max_characters": args.max_chars,
        "min_words": args.min_words,
        "max_words": args.max_words,
        "max_non_letters": args.max_non_letters,
        "max_control": args.max_control,
        "scripts": args.scripts,
        "min_script_share": args.min_script_share,
        "hooks": [parse_hook(text).model_dump() for text in args.filter],
        "normalize": args.nfc,
        "strip_control": args.strip_control,
    }


def run_train(args: argparse.Namespace) -> int:
    """Train and say what came out."""
    from dstrain.base.config import validate
    from dstrain.corpus.tokenizer_build import TokenizerBuildConfig, build_tokenizer

    settings = {
        "corpus": corpus_settings(args),
        "filters": filter_settings(args),
        "kind": args.kind,
        "vocab_size": args.vocab_size,
        "lowercase": args.lowercase,
        "min_frequency": args.min_frequency,
        "model_max_length": args.model_max_length,
        "sample_bytes": None if args.sample_mb is None else int(args.sample_mb * (1 << 20)),
        "sample_share": args.sample_share,
    }
    config = validate(TokenizerBuildConfig, settings, source="command line")
    report = build_tokenizer(args.input, out=args.out, config=config, overwrite=args.overwrite)
    tokenizer = report.tokenizer
    if report.reused:
        print(f"{args.out}: exists already, from the same inputs and settings; nothing to do", file=sys.stderr)
    print(f"tokenizer    {args.out}")
    print(f"vocabulary   {tokenizer.vocab_size} ids, stored as {tokenizer.dtype.name}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    _print_worth(report)
    print(f"next         dstrain shards build --input ... --tokenizer {args.out} --out shards/")
    return ExitCode.COMPLETE


def _print_worth(report: Any) -> None:
    if report.dropped:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.dropped.items())
        print(f"left out     {reasons}")
    worth = report.fertility
    if worth is not None:
        where = "held-out documents" if worth.is_held_out else "documents it learned from (--sample-mb holds some out)"
        print(
            f"fertility    {worth.tokens_per_word:.2f} tokens per word, {worth.characters_per_token:.2f} characters per "
            f"token, {worth.unknown_share:.3%} unknown, on {worth.documents:,} {where}"
        )

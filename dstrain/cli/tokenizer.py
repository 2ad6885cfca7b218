"""`dstrain tokenizer train`: a vocabulary from a corpus."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dstrain.base.errors import ExitCode

_EPILOG = """
examples:
  dstrain tokenizer train --input 'corpus/*.jsonl.gz' --vocab-size 32768 --out tok/
  dstrain tokenizer train --input books/*.txt --split blank-lines --kind bpe --out tok/
  dstrain tokenizer train --input hf:Salesforce/wikitext/wikitext-2-raw-v1 --lowercase --out tok/

The result is a folder for AutoTokenizer.from_pretrained. An existing tokenizer (BERT's, RoBERTa's, ...) needs no
training: give its folder to `dstrain shards build --tokenizer`. The same command again finds the finished folder.
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
    train.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer folder")
    train.set_defaults(run=run_train)


def add_corpus_arguments(parser: argparse.ArgumentParser) -> None:
    """Register how text is read; `corpus_settings` turns them into `CorpusConfig` fields."""
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="txt, jsonl, csv, tsv (each also .gz, .zst) or parquet files, patterns, or hf:OWNER/NAME[/CONFIG][:SPLIT]",
    )
    parser.add_argument("--text-field", default="text", help="field or column with the text (default text)")
    parser.add_argument("--id-field", default=None, help="field that names a document in messages (default file:line)")
    parser.add_argument(
        "--format",
        choices=("auto", "txt", "jsonl", "csv", "tsv", "parquet"),
        default="auto",
        help="default: by file name",
    )
    parser.add_argument(
        "--split",
        choices=("file", "blank-lines", "lines"),
        default="file",
        help="how txt files become documents (default: one file, one document)",
    )
    parser.add_argument(
        "--max-document-bytes", type=int, default=64 << 20, help="longest line or document accepted (default 64 MiB)"
    )


def corpus_settings(args: argparse.Namespace) -> dict[str, object]:
    """The `CorpusConfig` fields of parsed arguments."""
    names = ("text_field", "id_field", "format", "split", "max_document_bytes")
    return {name: getattr(args, name) for name in names}


def run_train(args: argparse.Namespace) -> int:
    """Train and say what came out."""
    from dstrain.base.config import validate
    from dstrain.data.tokenizer_build import TokenizerBuildConfig, build_tokenizer

    settings = {
        "corpus": corpus_settings(args),
        "kind": args.kind,
        "vocab_size": args.vocab_size,
        "lowercase": args.lowercase,
        "min_frequency": args.min_frequency,
        "model_max_length": args.model_max_length,
    }
    config = validate(TokenizerBuildConfig, settings, source="command line")
    report = build_tokenizer(args.input, out=args.out, config=config, overwrite=args.overwrite)
    tokenizer = report.tokenizer
    if report.reused:
        print(f"{args.out}: exists already, from the same inputs and settings; nothing to do", file=sys.stderr)
    print(f"tokenizer    {args.out}")
    print(f"vocabulary   {tokenizer.vocab_size} ids, stored as {tokenizer.dtype.name}")
    print(f"fingerprint  {tokenizer.fingerprint}")
    print(f"next         dstrain shards build --input ... --tokenizer {args.out} --out shards/")
    return ExitCode.COMPLETE

"""`dstrain shards build|inspect|verify`: text to WebDataset shards, and a look at them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dstrain.base.errors import ExitCode
from dstrain.cli.tokenizer import add_corpus_arguments, corpus_settings

_BUILD_EPILOG = """
examples:
  dstrain shards build --input 'corpus/*.jsonl.gz' --tokenizer tok/ --out shards/
  dstrain shards build --input table.csv --text-field body --tokenizer tok/ --workers 8 --out shards/
  dstrain shards build --input hf:Salesforce/wikitext/wikitext-2-raw-v1 --tokenizer tok/ --out shards/

Writes shards/train, shards/validation (held out by document hash) and shards/tokenizer; the training configuration
names them with data.path: shards/. The same inputs and settings give the same bytes, in any order, with any number of
workers. Exact duplicates are dropped. Nothing appears under --out before everything is complete; the same command
again finds the finished folder.
"""
_INSPECT_EPILOG = """
examples:
  dstrain shards inspect shards/              both splits
  dstrain shards inspect shards/train --json  one split, for programs
"""
_VERIFY_EPILOG = """
example:
  dstrain shards verify shards/

Reads every byte once: sha256 of shards and index, tar headers, checksums of every block, ids, tokenizer.
Exit code 0: sound. 78: damaged, every problem is listed.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `shards build`, `shards inspect` and `shards verify`."""
    parser = subparsers.add_parser("shards", help="build, look at and verify training shards")
    commands = parser.add_subparsers(title="commands", dest="action", required=True, metavar="ACTION")
    _add_build(commands)
    inspect = commands.add_parser(
        "inspect",
        help="what is in a shards folder",
        description="Show counts, document lengths, provenance and the first documents.",
        epilog=_INSPECT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    inspect.add_argument("path", type=Path, help="a shards folder or one of its splits")
    inspect.add_argument("--samples", type=int, default=3, help="documents shown (default 3)")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=run_inspect)
    verify = commands.add_parser(
        "verify",
        help="check every byte",
        description="Check a shards folder for damage.",
        epilog=_VERIFY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("path", type=Path, help="a shards folder or one of its splits")
    verify.set_defaults(run=run_verify)


def _add_build(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    build = commands.add_parser(
        "build",
        help="text to shards",
        description="Tokenise text into WebDataset shards of whole documents.",
        epilog=_BUILD_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_corpus_arguments(build)
    build.add_argument("--tokenizer", required=True, type=Path, help="tokenizer folder")
    build.add_argument("--out", required=True, type=Path, help="folder to write")
    build.add_argument("--seed", type=int, default=0, help="seed of the global shuffle (default 0)")
    build.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents held out (default 0.01, 0 for none)"
    )
    build.add_argument("--block-tokens", type=int, default=131072, help="tokens of a block (default 131072)")
    build.add_argument("--shard-mb", type=int, default=512, help="size of a shard in MiB (default 512)")
    build.add_argument("--workers", type=int, default=1, help="tokenising processes (default 1, which uses threads)")
    build.add_argument("--keep-duplicates", action="store_true", help="keep documents that are equal byte for byte")
    build.add_argument("--overwrite", action="store_true", help="replace shards built from something else")
    build.set_defaults(run=run_build)


def run_build(args: argparse.Namespace) -> int:
    """Build and say what came out."""
    from dstrain.base.config import validate
    from dstrain.data.build import ShardBuildConfig, build_shards

    settings = {
        "corpus": corpus_settings(args),
        "seed": args.seed,
        "block_tokens": args.block_tokens,
        "shard_bytes": args.shard_mb << 20,
        "validation_fraction": args.validation_fraction,
        "deduplicate": not args.keep_duplicates,
        "workers": args.workers,
    }
    config = validate(ShardBuildConfig, settings, source="command line")
    report = build_shards(args.input, tokenizer=args.tokenizer, out=args.out, config=config, overwrite=args.overwrite)
    if report.reused:
        print(f"{args.out}: exists already, from the same inputs and settings; nothing to do", file=sys.stderr)
    print(f"shards       {args.out}")
    for name, manifest in (("train", report.train), ("validation", report.validation)):
        if manifest is not None:
            print(
                f"{name:12} {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
                f"{manifest.num_blocks:,} blocks, {len(manifest.shards):,} shards"
            )
    dropped = {name: report.counts.get(name, 0) for name in ("duplicates", "empty")}
    print(f"left out     {dropped['duplicates']:,} duplicates, {dropped['empty']:,} empty documents")
    return ExitCode.COMPLETE


def run_inspect(args: argparse.Namespace) -> int:
    """Describe a dataset."""
    from dstrain.data.inspect import inspect_dataset

    found = inspect_dataset(args.path, num_samples=args.samples)
    if args.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
        return ExitCode.COMPLETE
    for name, split in found["splits"].items():
        _print_split(name, split)
    return ExitCode.COMPLETE


def _print_split(name: str, split: dict[str, Any]) -> None:
    lengths = split["lengths"]
    matches = {None: "no tokenizer beside the shards", True: "matches", False: "DOES NOT MATCH the shards"}
    print(f"{name}")
    print(f"  documents    {split['documents']:,} in {split['blocks']:,} blocks, {split['shards']:,} shards")
    print(f"  tokens       {split['tokens']:,} ({split['dtype']}), {split['bytes']:,} bytes on disk")
    print(f"  tokenizer    vocabulary {split['vocab_size']:,}, {matches[split['tokenizer_matches']]}")
    print(f"  fingerprint  {split['fingerprint']}")
    print(
        f"  lengths      mean {lengths['mean']:.0f}, median {lengths['median']:.0f}, longest {lengths['max']:,} tokens"
    )
    most = max(max(lengths["counts"].values()), 1)
    for label, count in lengths["counts"].items():
        print(f"    {label:>10}  {count:>12,}  {'█' * round(30 * count / most)}")
    for text in split["samples"]:
        print(f"  sample       {' '.join(text.split())[:160]}")


def run_verify(args: argparse.Namespace) -> int:
    """Check a dataset; the exit code tells."""
    from dstrain.data.inspect import verify_dataset

    report = verify_dataset(args.path)
    for problem in report.problems:
        print(problem)
    size = f"{report.num_shards:,} shards, {report.num_blocks:,} blocks, {report.num_bytes:,} bytes"
    if report.is_sound:
        print(f"{args.path}: sound ({size})")
        return ExitCode.COMPLETE
    print(
        f"{args.path}: {len(report.problems)} problems in {size}. Copy the damaged files again, or rebuild the dataset"
    )
    return ExitCode.BAD_INPUT

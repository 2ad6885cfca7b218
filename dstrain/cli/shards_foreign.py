"""`dstrain shards index|convert`: train on WebDataset tars that somebody else made, as they are or rewritten."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from dstrain.base.errors import ExitCode

_INDEX_EPILOG = """
examples:
  dstrain shards index laion/ --text-field txt --tokenizer tok/          captions of an image set
  dstrain shards index wiki/ --text-field json:text --tokenizer tok/ --workers 8
  dstrain shards index tokens/ --text-field tokens.npy --tokenizer tok/  token ids made elsewhere
  dstrain shards index /readonly/set --tokenizer tok/ --out my-index/

Then train with data.path: laion/dstrain-index (or what --out says). The tars stay as they are: the index holds 20 bytes
a document, checksums and a copy of the tokenizer, and gives exact resume and any world size. Indexing reads each shard in
full; an interrupted indexing goes on where it was with the same command. Text is tokenised again while training; rewrite
the set with `dstrain shards convert` where that costs too much. Indexes of wids, DALI and Energon beside the shards are
held against them. Damaged and hostile tars are refused, docs/foreign-datasets.md lists the reasons.
"""
_CONVERT_EPILOG = """
examples:
  dstrain shards convert wiki/ --text-field json:text --tokenizer tok/ --workers 8 --out shards/
  dstrain shards convert tokens/ --text-field tokens.npy --tokenizer tok/ --keep-order --out shards/

Writes the same folder as `dstrain shards build`. Documents are shuffled globally and exact duplicates dropped, unless
--keep-order is given. The tars are not touched.
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `shards index` and `shards convert`."""
    index = commands.add_parser(
        "index",
        help="make existing WebDataset tars trainable as they are",
        description="Index WebDataset tars for random access and exact resume, without rewriting them.",
        epilog=_INDEX_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(index)
    index.add_argument("--out", type=Path, help="folder of the index (default: dstrain-index in the tars' folder)")
    index.add_argument("--wids", type=Path, help="a wids shard list (JSON) to hold the tars against")
    index.add_argument(
        "--ignore-other-indexes", action="store_true", help="do not look at wids, DALI or Energon indexes"
    )
    index.set_defaults(run=run_index)
    convert = commands.add_parser(
        "convert",
        help="rewrite WebDataset tars as shards",
        description="Rewrite WebDataset tars as block shards, for speed.",
        epilog=_CONVERT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(convert)
    convert.add_argument("--out", type=Path, required=True, help="folder to write")
    convert.add_argument("--keep-order", action="store_true", help="keep the set's order; also keeps duplicates")
    convert.add_argument("--keep-duplicates", action="store_true", help="keep documents that equal another's")
    convert.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default 0)")
    convert.add_argument("--shard-mb", type=int, default=512, help="size of a shard in MiB (default 512)")
    convert.set_defaults(run=run_convert)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("input", nargs="+", help="a folder (searched for *.tar) or tars")
    parser.add_argument("--tokenizer", required=True, type=Path, help="tokenizer folder")
    parser.add_argument(
        "--text-field",
        metavar="MEMBER",
        help="member with the document: an extension such as txt or tokens.npy, or json:FIELD (default: the only one)",
    )
    parser.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of samples held out (default 0.01, 0 for none)"
    )
    parser.add_argument("--block-tokens", type=int, default=131072, help="tokens of a block (default 131072)")
    parser.add_argument("--skip-missing", action="store_true", help="leave out samples without the member")
    parser.add_argument("--max-member-mb", type=int, default=64, help="largest member accepted, in MiB (default 64)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default 1, which uses threads)")
    parser.add_argument("--overwrite", action="store_true", help="replace what was made from something else")


def _index_settings(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "text_field": args.text_field,
        "block_tokens": args.block_tokens,
        "validation_fraction": args.validation_fraction,
        "skip_missing": args.skip_missing,
        "limits": {"max_member_bytes": args.max_member_mb << 20},
        "workers": args.workers,
    }


def run_index(args: argparse.Namespace) -> int:
    """Index and say what came out."""
    from dstrain.base.config import validate
    from dstrain.foreign.index import IndexConfig, index_tars

    report = index_tars(
        args.input,
        tokenizer=args.tokenizer,
        out=args.out,
        config=validate(IndexConfig, _index_settings(args), source="command line"),
        wids=args.wids,
        use_other_indexes=not args.ignore_other_indexes,
        overwrite=args.overwrite,
    )
    note = "  (made before from the same shards and settings)" if report.reused else ""
    print(f"index        {report.path}{note}")
    print(f"documents    in .{report.train.member} members")
    _print_splits(report.train, report.validation)
    _print_left_out(report.counts)
    print(f"train with   data.path: {report.path}")
    return ExitCode.COMPLETE


def run_convert(args: argparse.Namespace) -> int:
    """Convert and say what came out."""
    from dstrain.base.config import validate
    from dstrain.corpus.foreign_convert import ConvertConfig, convert_foreign

    settings = {
        "index": _index_settings(args),
        "shuffle": not args.keep_order,
        "deduplicate": not args.keep_duplicates,
        "seed": args.seed,
        "shard_bytes": args.shard_mb << 20,
    }
    report = convert_foreign(
        args.input,
        tokenizer=args.tokenizer,
        out=args.out,
        config=validate(ConvertConfig, settings, source="command line"),
        overwrite=args.overwrite,
    )
    print(f"shards       {report.path}")
    _print_splits(report.train, report.validation)
    _print_left_out({**report.counts, "duplicates": report.duplicates})
    return ExitCode.COMPLETE


def _print_splits(train: Any, validation: Any) -> None:
    for name, manifest in (("train", train), ("validation", validation)):
        if manifest is not None:
            print(
                f"{name:12} {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
                f"{manifest.num_blocks:,} blocks, {len(manifest.shards):,} shards"
            )


def _print_left_out(counts: dict[str, int]) -> None:
    names = [name for name in ("empty", "missing", "duplicates") if name in counts]
    print(f"left out     {', '.join(f'{counts[name]:,} {name}' for name in names)}")

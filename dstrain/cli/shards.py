"""`dstrain shards`: registers the commands for shards; inspect and verify are here, the others in modules of their own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from dstrain.base.errors import ConfigError, ExitCode
from dstrain.cli import shards_bench, shards_build, shards_foreign

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
    shards_build.add_command(commands)
    shards_foreign.add_commands(commands)
    shards_bench.add_commands(commands)
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


def run_inspect(args: argparse.Namespace) -> int:
    """Describe a dataset."""
    from dstrain.data.inspect import inspect_dataset
    from dstrain.foreign.open import open_dataset

    if args.samples < 0:
        raise ConfigError(f"--samples: must be 0 or more, got {args.samples}")
    found = inspect_dataset(args.path, num_samples=args.samples, open_split=open_dataset)
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
    from dstrain.foreign.verify import is_index, verify_index

    report = verify_index(args.path) if is_index(args.path) else verify_dataset(args.path)
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

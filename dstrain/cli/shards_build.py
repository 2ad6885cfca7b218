"""`dstrain shards build`: text to shards, by one process, a pool, an array of jobs or a Ray cluster."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.base.errors import ExitCode
from dstrain.cli.tokenizer import add_corpus_arguments, corpus_settings, filter_settings

if TYPE_CHECKING:
    from dstrain.corpus.build import BuildForecast
    from dstrain.corpus.build_config import BuildReport, ShardBuildConfig

_EPILOG = """
examples:
  dstrain shards build --input 'corpus/*.jsonl.gz' --tokenizer tok/ --out shards/ --workers 8
  dstrain shards build --input table.csv --text-field body --tokenizer tok/ --out shards/ --dry-run
  dstrain shards build --input hf:Salesforce/wikitext/wikitext-2-raw-v1 --tokenizer tok/ --out shards/
  dstrain shards build --input 'corpus/*.parquet' --tokenizer tok/ --out shards/ --task-index 3 --num-tasks 16
  dstrain shards build --input 'corpus/*.parquet' --tokenizer tok/ --out shards/ --executor ray --ray-address auto

Writes shards/train, shards/validation (held out by document hash), shards/tokenizer and a dataset card; the training
configuration names them with data.path: shards/. The same inputs and settings give the same bytes, in any order, with
any number of processes and any executor. Exact duplicates are dropped. Nothing appears under --out before everything is
complete; after a crash, a kill or a bad input file that was mended, the same command does what is missing, from the
scratch folder .work-NAME beside --out. On a SLURM cluster: slurm/build_shards.sbatch.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `shards build`."""
    build = commands.add_parser(
        "build",
        help="text to shards",
        description="Tokenise text into WebDataset shards of whole documents.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_build_arguments(build)
    build.add_argument("--dry-run", action="store_true", help="print the plan and the space it needs; write nothing")
    _add_executor_arguments(build)
    build.set_defaults(run=run_build)


def add_build_arguments(build: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Register what decides the shards' bytes, and `--workers`, which does not.

    Args:
        build: of `shards build`, or of `launch shards`, which may take them from a file.
        required: whether the input, tokenizer and output must be among the arguments.
    """
    add_corpus_arguments(build, required=required)
    build.add_argument("--tokenizer", required=required, type=Path, help="tokenizer folder")
    build.add_argument("--out", required=required, type=Path, help="folder to write")
    build.add_argument("--seed", type=int, default=0, help="seed of the global shuffle (default 0)")
    build.add_argument(
        "--validation-fraction", type=float, default=0.01, help="share of documents held out (default 0.01, 0 for none)"
    )
    build.add_argument("--block-tokens", type=int, default=131072, help="tokens of a block (default 131072)")
    build.add_argument("--shard-mb", type=int, default=512, help="size of a shard in MiB (default 512)")
    build.add_argument(
        "--compression",
        choices=("none", "zstd"),
        default="none",
        help="zstd: 0.4 of the bytes, for object stores (default none)",
    )
    build.add_argument("--keep-duplicates", action="store_true", help="keep documents that are equal byte for byte")
    build.add_argument("--overwrite", action="store_true", help="replace shards built from something else")
    build.add_argument(
        "--workers",
        type=int,
        default=1,
        help="processes on this machine, one core each (default 1: this process, which uses threads)",
    )


def _add_executor_arguments(build: argparse.ArgumentParser) -> None:
    group = build.add_argument_group("who works (decides no byte of the output)")
    group.add_argument(
        "--executor",
        choices=("local", "array", "ray"),
        default=None,
        help="local (default); array: this is one of several jobs; ray: a Ray cluster (pip install dstrain[ray])",
    )
    group.add_argument(
        "--task-index", type=int, metavar="I", help="array: number of this job, from 0 (default SLURM's)"
    )
    group.add_argument("--num-tasks", type=int, metavar="N", help="array: number of jobs (default SLURM's)")
    group.add_argument(
        "--wait-minutes",
        type=float,
        default=60.0,
        help="array: give up when tasks that other jobs claim make no progress for so long (default 60)",
    )
    group.add_argument(
        "--ray-address", metavar="HOST:PORT", help="ray: a running cluster, or auto (default: start one with --workers)"
    )


def run_build(args: argparse.Namespace) -> int:
    """Build and say what came out."""
    from dstrain.base.config import validate
    from dstrain.corpus.build import forecast_build
    from dstrain.corpus.build_config import ShardBuildConfig

    settings = {
        "corpus": corpus_settings(args),
        "filters": filter_settings(args),
        "seed": args.seed,
        "block_tokens": args.block_tokens,
        "shard_bytes": args.shard_mb << 20,
        "validation_fraction": args.validation_fraction,
        "deduplicate": not args.keep_duplicates,
        "compression": args.compression,
        "workers": args.workers,
    }
    config = validate(ShardBuildConfig, settings, source="command line")
    if args.dry_run:
        _print_forecast(forecast_build(args.input, tokenizer=args.tokenizer, out=args.out, config=config), args)
        return ExitCode.COMPLETE
    report = _run(args, config)
    if report is None:
        print(f"{args.out}: all tasks are done, and another job publishes the shards")
    else:
        _print_report(report)
    return ExitCode.COMPLETE


def _run(args: argparse.Namespace, config: ShardBuildConfig) -> BuildReport | None:
    from dstrain.base.errors import ConfigError
    from dstrain.corpus.build import build_shards, build_share, default_executor
    from dstrain.corpus.executors import ArrayShare, array_position

    executor = _executor_name(args)
    if executor != "array" and (args.task_index is not None or args.num_tasks is not None):
        raise ConfigError(f"--task-index and --num-tasks belong to --executor array, not {executor}")
    common = {"tokenizer": args.tokenizer, "out": args.out, "config": config, "overwrite": args.overwrite}
    if executor == "array":
        index, count = array_position(args.task_index, args.num_tasks, os.environ)
        inner = default_executor(config)
        share = ArrayShare(index, count, inner=inner, wait_s=args.wait_minutes * 60)
        return build_share(args.input, share=share, **common)
    if executor == "ray":
        try:
            from dstrain.corpus.ray_executor import OnRay
        except ModuleNotFoundError as error:
            raise ConfigError(f"--executor ray needs Ray on every node: pip install 'dstrain[ray]' ({error})") from None
        return build_shards(args.input, executor=OnRay(address=args.ray_address, workers=config.workers), **common)
    return build_shards(args.input, **common)


def _executor_name(args: argparse.Namespace) -> str:
    is_numbered = args.task_index is not None or args.num_tasks is not None
    return str(args.executor or ("array" if is_numbered else "local"))


def _print_forecast(found: BuildForecast, args: argparse.Namespace) -> None:
    text = "unknown" if found.sizes.text_bytes is None else f"about {_size(found.sizes.text_bytes)}"
    verdict = "enough" if found.free_bytes >= found.scratch_bytes else "NOT ENOUGH"
    print(f"inputs       {len(found.sources):,}, {_size(found.sizes.stored_bytes)} stored, text {text}")
    for source in found.sources[:10]:
        size = "size unknown" if source.size_bytes is None else _size(source.size_bytes)
        print(f"               {source.name}  {size}")
    if len(found.sources) > 10:
        print(f"               and {len(found.sources) - 10:,} more")
    print(f"map          about {found.map_tasks:,} tasks of {_size(found.sizes.map_target_bytes)}")
    print(f"shuffle      {found.sizes.buckets:,} hash buckets")
    print(f"reduce       about {found.reduce_tasks:,} tasks, {found.shards:,} shards of train")
    print(f"work         {_executor_name(args)}, {args.workers} processes")
    print(
        f"space        about {_size(found.scratch_bytes)} beside {args.out}, {_size(found.free_bytes)} free: {verdict}"
    )
    print("nothing was written")


def _print_report(report: BuildReport) -> None:
    if report.reused:
        print(f"{report.path}: exists already, from the same inputs and settings; nothing to do", file=sys.stderr)
    print(f"shards       {report.path}")
    for name, manifest in (("train", report.train), ("validation", report.validation)):
        if manifest is not None:
            print(
                f"{name:12} {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, "
                f"{manifest.num_blocks:,} blocks, {len(manifest.shards):,} shards"
            )
    dropped = {"duplicate": 0, "empty": 0} | report.dropped
    print("left out     " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    if not report.reused:
        read = report.counts.get("documents_read", 0)
        print(
            f"speed        {report.seconds:,.1f} s, {read / max(report.seconds, 1e-9):,.0f} documents/s, "
            f"{report.tokens_per_core_second / 1e6:.2f} Mtok/s per core (sorting, tokenising, writing)"
        )


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"

"""`dstrain shards bench`: how fast the loader is on these shards, whether that is enough for some GPUs, and what to change."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dstrain.stages.bench_advice import Measured, Need

_EPILOG = """
examples:
  dstrain shards bench shards/ --gpu h100 --model bert-base --gpus-per-node 8
  dstrain shards bench s3://bucket/shards --sequence-length 1024 --need-mtok-s 0.6 data.storage.connections=32
  dstrain shards bench shards/ --sequence-length 8192 --global-batch 512 --json

Measures one rank: its share of the batch, its threads, its cache. CPU numbers are of one core and steady (each block made
ready once): plan with these. The loop at the end runs from a cold start, while the shuffle windows are filling, with steps prepared
ahead: it may come out below or above. What a GPU takes is the estimate of `dstrain plan` for forwards and backwards; a run's own
tokens/s (TensorBoard) is better: give it with --need-mtok-s. Run it on a training node: the storage and the page cache of another
machine say little.
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `shards bench`."""
    bench = commands.add_parser(
        "bench",
        help="measure the loader on your shards and storage",
        description="Measure the training loader on a shards folder or URL, forecast waiting GPUs, and say what to change.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    bench.add_argument("path", help="a shards folder or URL, as data.path names it")
    bench.add_argument("--sequence-length", type=int, default=512, help="tokens of a row (default 512)")
    bench.add_argument("--global-batch", type=int, default=512, help="rows of a step over all ranks (default 512)")
    bench.add_argument("--micro-batch", type=int, default=32, help="most rows of one forward (default 32)")
    bench.add_argument("--world", type=int, help="ranks that share the batch (default: --gpus-per-node)")
    bench.add_argument("--threads", type=int, default=1, help="threads of a rank that make steps (default 1)")
    bench.add_argument("--seconds", type=float, default=10.0, help="how long the loop runs (default 10)")
    bench.add_argument("--whole-word", action="store_true", help="mask whole words")
    bench.add_argument("--need-mtok-s", type=float, help="million tokens a second that one GPU takes")
    bench.add_argument("--gpu", help="or estimate it for a GPU of `dstrain plan --gpu-type`: h100, a100, ...")
    models = "bert-base (default), bert-large, modernbert-base, modernbert-large"
    bench.add_argument("--model", default="bert-base", help=f"with --gpu: {models}")
    bench.add_argument("--gpus-per-node", type=int, default=1, help="GPUs of a node (default 1)")
    bench.add_argument("--json", action="store_true", help="print JSON")
    bench.add_argument(
        "overrides", nargs="*", metavar="key=value", help="keys of the configuration, e.g. data.window_rows=2048"
    )
    bench.set_defaults(run=run_bench, more_into="overrides")


def run_bench(args: argparse.Namespace) -> int:
    """Measure, forecast, advise."""
    from dstrain.base.logs import configure_logs
    from dstrain.base.world import World
    from dstrain.stages.bench_advice import advice, forecast
    from dstrain.stages.loader_bench import BenchSettings, bench_loader

    configure_logs(World())
    for name in ("global_batch", "micro_batch", "gpus_per_node", "threads", "world"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more, got {getattr(args, name)}")
    if not args.seconds > 0:
        raise ConfigError(f"--seconds: must be above 0, got {args.seconds}")
    need = _need(args)
    settings = BenchSettings(seconds=args.seconds, rank_share=args.world or args.gpus_per_node, threads=args.threads)
    measured = bench_loader(_config(args), settings)
    plan = forecast(measured, need) if need is not None else None
    said = advice(measured, need)
    if args.json:
        found: dict[str, Any] = {
            "measured": {**dataclasses.asdict(measured), "steady_mtok_s_per_core": measured.steady_mtok_s}
        }
        found |= {
            "need": need and dataclasses.asdict(need),
            "forecast": plan and dataclasses.asdict(plan),
            "advice": said,
        }
        print(json.dumps(found, indent=1))
        return ExitCode.COMPLETE
    _print_measured(measured, threads=args.threads)
    if need is not None and plan is not None:
        print(f"need         {need.mtok_s:.2f} Mtok/s a GPU ({need.name}{', an estimate' if need.estimated else ''})")
        print(f"forecast     {plan.cores_per_gpu:.3f} cores a GPU, {plan.cores_per_node:.2f} a node of {need.gpus_per_node}; "
              f"{plan.store_mb_s:.1f} MB/s a node; GPUs wait {plan.wait_share:.1%} of the time "
              f"with data.threads={plan.threads}")  # fmt: skip
    for sentence in said:
        print(f"advice       {sentence}")
    return ExitCode.COMPLETE


def _print_measured(measured: Measured, *, threads: int) -> None:
    print(f"first batch  {measured.first_batch_s:.3f} s from nothing opened")
    print(f"steady       {measured.steady_mtok_s:.2f} Mtok/s a core; CPU seconds for a million tokens:")
    for part, seconds in measured.cpu_s_per_mtok.items():
        print(f"  {part:10} {seconds:.4f}")
    print(f"loop         {measured.wall_mtok / max(1e-9, measured.wall_s):.2f} Mtok/s of wall time over "
          f"{measured.wall_s:.1f} s with {threads} threads, from a cold start")  # fmt: skip
    print(f"storage      {measured.store_mb_s:,.1f} MB/s while reading; {measured.bytes_per_token:.2f} bytes a token, "
          f"blocks of {measured.block_tokens:,.0f} tokens{', zstd' if measured.compressed else ''}")  # fmt: skip
    print(f"padding      {measured.padding_percent:.2f} % of rows of {measured.sequence_length}")
    print(
        f"seek         {measured.seek_ms['start']:.1f} ms at step 0, {measured.seek_ms['far']:.1f} ms at step 1,000,000"
    )
    print(f"memory       {measured.rss_bytes / 2**20:,.0f} MiB now; shuffle windows {measured.working_set_bytes / 2**20:,.0f} MiB, "
          f"cache {measured.cache_bytes / 2**20:,.0f} MiB")  # fmt: skip


def _need(args: argparse.Namespace) -> Need | None:
    from dstrain.planner.gpu_need import tokens_per_second
    from dstrain.stages.bench_advice import Need

    if args.need_mtok_s is not None and args.gpu is not None:
        raise ConfigError("give --need-mtok-s or --gpu, not both")
    if args.need_mtok_s is not None:
        if not args.need_mtok_s > 0:
            raise ConfigError(f"--need-mtok-s: must be above 0, got {args.need_mtok_s}")
        return Need(args.need_mtok_s, gpus_per_node=args.gpus_per_node)
    if args.gpu is None:
        return None
    rate = tokens_per_second(args.gpu, args.model, mean_context=min(256, args.sequence_length))
    return Need(rate / 1e6, gpus_per_node=args.gpus_per_node, estimated=True, name=f"{args.model} on {args.gpu}")


def _config(args: argparse.Namespace) -> Any:
    """A pretraining configuration around the data; its model is never built."""
    from dstrain.base.config import merge, parse_overrides, validate
    from dstrain.stages.config import PretrainConfig

    settings = {
        "run_folder": "unused",
        "model": {"config": {"model_type": "bert"}},
        "data": {"path": args.path, "sequence_length": args.sequence_length},
        "objective": {"whole_word": args.whole_word},
        "train": {"global_batch": args.global_batch, "micro_batch": args.micro_batch, "max_steps": 1_000_000},
    }
    return validate(PretrainConfig, merge(settings, parse_overrides(args.overrides)), source="command line")

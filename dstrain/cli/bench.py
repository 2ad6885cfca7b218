"""`dstrain bench`: what each saver brings on your model, your data and your device, and the settings to take."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dstrain.base.errors import ConfigError, ExitCode

_EPILOG = """
examples:
  dstrain bench configs/bert-base.yaml data.path=shards/
  dstrain bench configs/modernbert-base.yaml data.path=shards/ --out bench/        (bench.md, bench.json, bench.svg)
  dstrain bench configs/bert-base.yaml data.path=shards/ --steps 5 --compile no

Measures the device's ceilings (matrix products, memory, attention), then the run's own step on one device: padded, dense and eager first,
then with one saver more at a time, each in a process of its own, on the same steps of the same shards. Minutes in all; compiling
takes one more. Trains nothing: the run folder is not touched.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `bench`."""
    parser = subparsers.add_parser(
        "bench",
        help="measure what each saver brings on this device",
        description="A measured waterfall of a training step on your model, data and device, and the recommended settings.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a pretraining run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the configuration")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each variant at most (default 20)")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them (default 3)")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="timed seconds of each variant at most (default 30)"
    )
    parser.add_argument(
        "--compile", choices=("auto", "yes", "no"), default="auto", help="measure compiled blocks (auto: on a GPU)"
    )
    parser.add_argument(
        "--learning",
        action="store_true",
        help="also measure the switches that change what is learned (docs/learning.md)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write bench.md, bench.json and bench.svg there")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run, more_into="overrides")


def _run(args: argparse.Namespace) -> int:
    from dstrain.base.storage import make_directory, write_json, write_text
    from dstrain.cli.training import load_stage_config
    from dstrain.planner.bench import Effort, bench
    from dstrain.planner.waterfall import as_json, markdown, svg
    from dstrain.stages.training_data import load_tokenizer

    for name in ("steps", "warmup"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}: must be 1 or more, got {getattr(args, name)}")
    if not args.seconds > 0:
        raise ConfigError(f"--seconds: must be above 0, got {args.seconds}")
    config = load_stage_config("pretrain", args.config, args.overrides)
    load_tokenizer(config.data)  # shards that are not there are said now, not after the ceilings
    compiles = {"auto": None, "yes": True, "no": False}[args.compile]
    effort = Effort(
        warmup=args.warmup, steps=args.steps, limit_s=args.seconds, compile_blocks=compiles, learning=args.learning
    )
    if args.out is not None:
        make_directory(args.out)  # a wrong name is better said before minutes of measuring than after them
    found = bench(config, effort, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(as_json(found), indent=1) if args.json else markdown(found))
    if args.out is not None:
        write_text(args.out / "bench.md", markdown(found))
        write_json(args.out / "bench.json", as_json(found))
        write_text(args.out / "bench.svg", svg(found))
    return ExitCode.COMPLETE

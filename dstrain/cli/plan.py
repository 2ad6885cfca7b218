"""`dstrain plan`: memory, time, traffic, failures and money of a run before it starts; the cheapest setting; a simulation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dstrain.planner.plan import Site
    from dstrain.planner.probe import Measured
    from dstrain.planner.workload import Workload
    from dstrain.stages.config import PretrainConfig

_EPILOG = """
examples:
  dstrain plan configs/bert-base.yaml --gpus 64 --gpu-type h100
  dstrain plan configs/bert-large.yaml --gpus 8 --gpu-type a100 train.micro_batch=32 engine.zero_stage=2
  dstrain plan configs/bert-base.yaml --budget-usd 500 --budget-hours 24
  dstrain plan configs/bert-base.yaml --gpus 8 --simulate
  dstrain plan configs/bert-base.yaml --probe --save-calibration here.json        (measures this device, under a minute)
  dstrain plan configs/bert-base.yaml --gpus 8 --calibration here.json

What is modelled, from what sources, and how far it was off for published runs: docs/planner.md. Step times of GPUs are a roofline, not
measurements, unless a calibration is given.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `plan`."""
    parser = subparsers.add_parser(
        "plan",
        help="memory, time and money of a run before it starts",
        description="Plan a pretraining run from its configuration: memory of a GPU by part and ZeRO stage, the largest "
        "micro-batch, step time, traffic, save interval, goodput, GPU-hours, money, energy.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the configuration")
    _add_place(parser)
    _add_search(parser)
    _add_simulation(parser)
    parser.add_argument(
        "--probe", action="store_true", help="measure this device first (under a minute) and plan with it"
    )
    parser.add_argument("--save-calibration", type=Path, metavar="FILE", help="with --probe: keep what was measured")
    parser.add_argument("--calibration", type=Path, metavar="FILE", help="plan with what an earlier --probe measured")
    parser.add_argument(
        "--vocab-size", type=int, help="ids of the tokenizer, where there are no shards to read it from"
    )
    parser.add_argument("--mean-context", type=float, help="tokens that a token attends to, on average; likewise")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_run, more_into="overrides")


def _add_place(parser: argparse.ArgumentParser) -> None:
    place = parser.add_argument_group("where it would run")
    place.add_argument("--gpus", type=int, default=8, help="GPUs of the job (default 8)")
    place.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of a node (default 8)")
    place.add_argument(
        "--gpu-type",
        help="v100, a100-40, a100, h100 (default; with a calibration: its device), h200, b200, mi300x, l40s, 4090, cpu",
    )
    place.add_argument(
        "--interconnect",
        default="ib400",
        help="between nodes: ib400 (default), ib200, ib100, roce400, efa400, eth100, ...",
    )
    place.add_argument(
        "--prices", type=Path, metavar="FILE", help="your own price table (a copy of dstrain/planner/prices.yaml)"
    )
    place.add_argument(
        "--mtbf-hours", type=float, help="GPU-hours between failures (default: checkpoint.gpu_hours_per_failure)"
    )
    place.add_argument(
        "--restart-minutes", type=float, default=5.0, help="from a failure to the next useful step (default 5)"
    )
    place.add_argument(
        "--storage-gb-s", type=float, default=2.0, help="durable writes of the whole job, GB/s (default 2)"
    )


def _add_search(parser: argparse.ArgumentParser) -> None:
    search = parser.add_argument_group("the cheapest setting that fits")
    search.add_argument("--budget-usd", type=float, help="money the run may cost, in the currency of the price table")
    search.add_argument("--budget-hours", type=float, help="hours it may take, failures included")
    search.add_argument("--max-gpus", type=int, default=1024, help="most GPUs to consider (default 1024)")
    search.add_argument("--only", metavar="TYPE,TYPE", help="GPU types to consider (default: all with a price)")


def _add_simulation(parser: argparse.ArgumentParser) -> None:
    simulation = parser.add_argument_group("simulation with stragglers and failures")
    simulation.add_argument(
        "--simulate", action="store_true", help="simulate 30 days at --gpus, doubled up to --simulate-gpus"
    )
    simulation.add_argument("--simulate-gpus", type=int, default=16384, help="largest number (default 16384)")
    simulation.add_argument(
        "--jitter", type=float, default=0.02, help="log standard deviation of a node's step (default 0.02)"
    )
    simulation.add_argument("--slow-nodes", type=int, default=0, help="nodes that are slow all the time")
    simulation.add_argument("--slow-factor", type=float, default=1.2, help="by how much (default 1.2)")
    simulation.add_argument("--seed", type=int, default=0, help="of the simulation (default 0)")


def _run(args: argparse.Namespace) -> int:
    from dstrain.cli.training import load_stage_config

    _check(args)
    config = load_stage_config("pretrain", args.config, args.overrides)
    site = _site(args, config)
    work = _workload(args, config, site)
    if args.probe or args.calibration is not None:
        site, work = _calibrated(args, config, site, work)
    if args.budget_usd is not None or args.budget_hours is not None:
        return _suggest(args, work, site)
    return _show(args, work, site)


def _check(args: argparse.Namespace) -> None:
    for name in ("gpus", "gpus_per_node", "max_gpus", "simulate_gpus", "vocab_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: must be 1 or more, got {value}")
    for name in ("mtbf_hours", "storage_gb_s", "budget_usd", "budget_hours", "mean_context"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ConfigError(f"--{name.replace('_', '-')}: must be above 0, got {value}")
    if args.restart_minutes < 0:
        raise ConfigError(f"--restart-minutes: must be 0 or more, got {args.restart_minutes}")
    if args.save_calibration is not None and not args.probe:
        raise ConfigError("--save-calibration: nothing is measured without --probe")
    if args.probe and args.calibration is not None:
        raise ConfigError("give --probe, which measures, or --calibration, which was measured, and not both")


def _site(args: argparse.Namespace, config: PretrainConfig) -> Site:
    from dstrain.planner.devices import find_device, find_interconnect
    from dstrain.planner.network import Cluster
    from dstrain.planner.plan import Site
    from dstrain.planner.prices import load_prices

    cluster = Cluster(find_device(_gpu_type(args)), args.gpus, args.gpus_per_node, find_interconnect(args.interconnect))
    hours = args.mtbf_hours if args.mtbf_hours is not None else config.checkpoint.gpu_hours_per_failure
    source = (
        str(args.prices) if args.prices is not None else "the packaged price table (orders of magnitude; --prices FILE)"
    )
    return Site(
        cluster=cluster, prices=load_prices(args.prices), prices_source=source, device_hours_per_failure=hours,
        restart_s=60 * args.restart_minutes, storage_bytes_s=1e9 * args.storage_gb_s,
    )  # fmt: skip


def _gpu_type(args: argparse.Namespace) -> str:
    """As given; else that of the device at hand where something is or was measured on it."""
    if args.gpu_type is not None:
        return str(args.gpu_type)
    if args.calibration is not None:
        from dstrain.planner.calibration import device_of, load_calibration

        return device_of(load_calibration(args.calibration))
    if args.probe:
        import torch

        return _gpu_here() if torch.cuda.is_available() else "cpu"
    return "h100"


def _gpu_here() -> str:
    from dstrain.base.device import device_name
    from dstrain.planner.devices import DEVICES

    name = device_name("cuda").lower()
    return next((known for known in reversed(DEVICES) if known in name), "h100")


def _calibrated(args: argparse.Namespace, config: PretrainConfig, site: Site, work: Workload) -> tuple[Site, Workload]:
    """The place and the run with measured rates in place of the table's."""
    from dataclasses import replace

    from dstrain.planner.calibration import calibrated_device, calibrated_stack, load_calibration, save_calibration
    from dstrain.planner.plan import on_cluster

    measured = load_calibration(args.calibration) if args.calibration is not None else _probe(config, site, work)
    if args.save_calibration is not None:
        save_calibration(args.save_calibration, measured)
    work = replace(work, precision=measured.precision)
    device = calibrated_device(site.cluster.device, measured)
    context = measured.steps[0].tokens / measured.steps[0].rows
    stack = calibrated_stack(work.anatomy, device, measured, context=context)
    return replace(on_cluster(site, replace(site.cluster, device=device)), stack=stack), work


def _probe(config: PretrainConfig, site: Site, work: Workload) -> Measured:
    from dstrain.base.device import choose_device, choose_precision
    from dstrain.planner.probe import probe

    device = choose_device("cuda" if site.cluster.device.is_gpu else "cpu")
    precision = choose_precision(config.engine.precision, device=device)
    return probe(
        config.model, config.engine, work.anatomy, sequence_length=work.sequence_length, mask_rate=work.mask_rate, device=device,
        precision=precision,
    )  # fmt: skip


def _workload(args: argparse.Namespace, config: PretrainConfig, site: Site) -> Workload:
    from dstrain.planner.workload import workload

    return workload(config, site.cluster.device, vocabulary=args.vocab_size, context=args.mean_context)


def _suggest(args: argparse.Namespace, work: Workload, site: Site) -> int:
    from dstrain.planner.devices import find_device
    from dstrain.planner.report import plan_json, plan_text, suggestions_text
    from dstrain.planner.search import Budget, search, suggestable

    names = [find_device(name.strip()).name for name in args.only.split(",")] if args.only else None
    budget = Budget(args.budget_usd, args.budget_hours)
    found = search(work, site, budget, devices=suggestable(names), most_gpus=args.max_gpus)
    if args.json:
        nearest = plan_json(found.nearest) if found.nearest is not None else None
        print(json.dumps({"best": [plan_json(plan) for plan in found.best], "nearest": nearest}, indent=1))
    else:
        print(suggestions_text(found, budget))
        if found.best:
            print("\n" + plan_text(found.best[0]))
    return ExitCode.COMPLETE if found.best else ExitCode.BAD_INPUT


def _show(args: argparse.Namespace, work: Workload, site: Site) -> int:
    from dstrain.planner.plan import make_plan
    from dstrain.planner.report import plan_json, plan_text, scaling_text

    plan = make_plan(work, site)
    found: dict[str, Any] = plan_json(plan)
    text = plan_text(plan)
    if args.simulate:
        rows = _simulate(args, work, site)
        found["simulation"] = [_row_json(row) for row in rows]
        text += "\n\n" + scaling_text(rows, seed=args.seed)
    print(json.dumps(found, indent=1) if args.json else text)
    return ExitCode.COMPLETE if plan.fits else ExitCode.BAD_INPUT


def _simulate(args: argparse.Namespace, work: Workload, site: Site) -> list[Any]:
    from dstrain.planner.scaling import gpu_counts, simulate_scaling
    from dstrain.planner.simulate import Noise

    noise = Noise(sigma=args.jitter, slow_nodes=args.slow_nodes, slow_factor=args.slow_factor)
    return simulate_scaling(work, site, gpu_counts(args.gpus, args.simulate_gpus), noise=noise, seed=args.seed)


def _row_json(row: Any) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(row)

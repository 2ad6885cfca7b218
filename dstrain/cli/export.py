"""`dstrain export`: a run's checkpoint as a native Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `export`."""
    parser = subparsers.add_parser(
        "export",
        help="write a run as a Hugging Face folder",
        description="Write a run's checkpoint as a native Hugging Face folder (safetensors, tokenizer, model card). The "
        "exported folder is loaded back with plain transformers and its logits are compared before this command says done.",
        epilog="example:\n  dstrain export runs/bert-base --out hf/\n"
        "  python -c \"from transformers import pipeline; print(pipeline('fill-mask', 'hf/')('a [MASK] of good fortune'))\"",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run_folder", type=Path, help="the run folder")
    parser.add_argument("--out", type=Path, help="folder to write; default: export/ in the run folder")
    parser.add_argument("--step", type=int, help="checkpoint to export; default: the best by metric, else the newest")
    parser.add_argument(
        "--average", metavar="last:K", help="export the mean of the K newest checkpoints (up to --step) instead of one"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from dstrain.base.logs import configure_logs
    from dstrain.base.world import World
    from dstrain.stages.export import export_run

    configure_logs(World())
    out = args.out or args.run_folder / "export"
    report = export_run(args.run_folder, out, step=args.step, average=args.average, overwrite=args.overwrite)
    print(
        f"{out}: step {report.step}, {report.num_parameters / 1e6:.1f} M parameters; logits differ by at most {report.max_difference:.1e}"
    )
    return 0

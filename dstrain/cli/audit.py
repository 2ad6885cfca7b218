"""`dstrain audit` and `dstrain replay`: what a run was trained on, proven and shown. Neither needs a GPU or an engine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.base.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from dstrain.stages.audit import AuditReport
    from dstrain.stages.coverage import EpochCoverage
    from dstrain.stages.replay import Kind, ReplayedStep

_AUDIT_EPILOG = """
examples:
  dstrain audit runs/bert-base                  an even sample of the steps: about half a minute
  dstrain audit runs/bert-base --full           every step, every shard
  dstrain audit runs/bert-base --step 20000     the run as it was after 20000 steps
  dstrain audit runs/bert-base data.path=/new/place/of/the/shards

Rebuilds the order of the data from the run's configuration and newest checkpoint; checks that the shards on disk are the ones
the checkpoint pins; counts for every source and epoch what was seen, missed and repeated; makes steps again and
compares their ledgers with events.jsonl and the checkpoints, and names the first that differs. Any number of processes
may have trained, also changing ones. Exit code 0: sound. 78: not, every problem is listed. See docs/audit.md.
"""
_REPLAY_EPILOG = """
examples:
  dstrain replay runs/bert-base --step 1200                    the first documents of the whole batch
  dstrain replay runs/bert-base --step 1200 --rank 3 --world 8 what rank 3 of 8 trained on
  dstrain replay runs/bert-base --step 1200 --documents 100000 | grep -i 'needle'

Steps count from 1, as in events.jsonl and TensorBoard. Marks: [MASK:word] was hidden, {shown→word} was replaced by
another token, =word= was left as it is; all three were to be predicted. [block, row] is what data.skip_rows takes.
"""

_COLOURS: dict[str, str] = {"mask": "33", "random": "31", "kept": "32"}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `audit` and `replay`."""
    audit = subparsers.add_parser(
        "audit",
        help="prove what a run was trained on",
        description="Check a pretraining run's data: what was seen, missed and repeated, and whether its ledgers are true.",
        epilog=_AUDIT_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("run_folder", type=Path, help="the run folder")
    audit.add_argument("--step", type=int, help="look at the first so many steps; default: all that left a trace")
    audit.add_argument("--full", action="store_true", help="make every step again and hash every shard")
    audit.add_argument("--threads", type=int, default=1, help="steps made at the same time (default 1)")
    audit.add_argument("--json", action="store_true", help="print JSON")
    audit.add_argument(
        "overrides", nargs="*", metavar="key=value", help="override keys, such as where the shards lie now"
    )
    audit.set_defaults(run=_run_audit, more_into="overrides")
    replay = subparsers.add_parser(
        "replay",
        help="show a step's documents and masks as text",
        description="Print the documents of one optimizer step, with what was hidden in them.",
        epilog=_REPLAY_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    replay.add_argument("run_folder", type=Path, help="the run folder")
    replay.add_argument("--step", type=int, required=True, help="which step, counted from 1")
    replay.add_argument("--rank", type=int, default=0, help="whose share of the batch (default 0)")
    replay.add_argument("--world", type=int, default=1, help="ranks the batch is shared among (default 1: all of it)")
    replay.add_argument("--documents", type=int, default=8, help="documents shown (default 8); counts cover all")
    replay.add_argument("--json", action="store_true", help="print JSON")
    replay.add_argument("overrides", nargs="*", metavar="key=value", help="override keys of the run's configuration")
    replay.set_defaults(run=_run_replay, more_into="overrides")


def _pretraining(args: argparse.Namespace) -> Any:
    """The run's configuration; only pretraining has a plan to rebuild."""
    from dstrain.base.logs import configure_logs
    from dstrain.base.world import World
    from dstrain.cli.training import load_run_config

    configure_logs(World())
    for name in ("step", "threads", "documents", "world"):
        value = getattr(args, name, None)
        if value is not None and value < (0 if name == "documents" else 1):
            raise ConfigError(f"--{name}: {value} is too small")
    stage, config = load_run_config(args.run_folder, args.overrides)
    if stage != "pretrain":
        raise ConfigError(f"{args.run_folder}: holds a {stage} run; only pretraining runs have a data plan to look at")
    return config


def _run_audit(args: argparse.Namespace) -> int:
    from dstrain.stages.audit import audit_run

    config = _pretraining(args)
    report = audit_run(config, until=args.step, full=args.full, threads=args.threads)
    if args.json:
        print(json.dumps({"sound": report.is_sound, **dataclasses.asdict(report)}, indent=1, default=str))
    else:
        _print_audit(report)
    return ExitCode.COMPLETE if report.is_sound else ExitCode.BAD_INPUT


def _print_audit(report: AuditReport) -> None:
    starts = ", ".join(f"{ranks} from step {step + 1}" for step, ranks in report.worlds)
    print(f"run          {report.run}: {report.steps:,} steps; processes: {starts or 'not recorded'}")
    for name, fingerprint in report.fingerprints.items():
        print(f"source       {name}: fingerprint {fingerprint[:16]}, as on disk")
    for found in report.coverage:
        _print_epoch(found)
    redone = report.recomputed
    how = "all steps" if report.full else "an even sample"
    print(f"shards       {report.probed_blocks:,} blocks read and checked")
    print(f"ledger       {redone.steps:,} steps made again ({how}), {redone.compared:,} written ledgers are equal")
    for note in report.notes:
        print(f"note         {note}")
    for problem in report.problems:
        print(f"PROBLEM      {problem}")
    print(f"{report.run}: {'sound' if report.is_sound else f'NOT SOUND, {len(report.problems)} problems'}")


def _print_epoch(found: EpochCoverage) -> None:
    state = "complete" if found.complete else "under way"
    print(f"epoch        {found.source}, epoch {found.epoch} ({state}): {found.seen:,} of {found.rows:,} rows seen, "
          f"{found.repeated} repeated")  # fmt: skip
    parts = [("in the tail, not in this epoch", found.tail), ("skipped or damaged", found.left_out),
             ("to come", found.to_come), ("substitutes", found.substituted)]  # fmt: skip
    rest = ", ".join(f"{count:,} {name}" for name, count in parts if count)
    print(f"               {found.documents:,} of {found.all_documents:,} documents, "
          f"{found.tokens:,} of {found.all_tokens:,} tokens{'; rows: ' + rest if rest else ''}")  # fmt: skip


def _run_replay(args: argparse.Namespace) -> int:
    from dstrain.stages.replay import replay_step

    config = _pretraining(args)
    found = replay_step(config, step=args.step, rank=args.rank, world=args.world, max_documents=args.documents)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=1, ensure_ascii=False))
    else:
        _print_replay(found, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
    if found.written is not None and found.written != found.ledger:
        print(f"{args.run_folder}: step {found.step}: the run wrote ledger {found.written}, this data gives {found.ledger}: "
              "it was trained on something else; see `dstrain audit`", file=sys.stderr)  # fmt: skip
        return ExitCode.BAD_INPUT
    return ExitCode.COMPLETE


def _print_replay(found: ReplayedStep, *, colours: bool) -> None:
    from dstrain.stages.replay import marked_text

    def paint(kind: Kind, text: str) -> str:
        return f"\033[{_COLOURS[kind]}m{text}\033[0m" if colours and kind in _COLOURS else text

    share = "all ranks" if found.world == 1 else f"rank {found.rank} of {found.world}"
    print(f"step {found.step}, {share}")
    for document in found.documents:
        head = (
            f"slot {document.slot}  {document.source} epoch {document.epoch} [block {document.block}, row {document.row}]  "
            f"document {document.document} from token {document.start}: {document.tokens} tokens, {document.scored} to predict"
        )
        print(f"\n\033[1m{head}\033[0m" if colours else f"\n{head}")
        print(marked_text(document, paint))
    counts = found.counts
    left = found.num_documents - len(found.documents)
    print(
        f"\n{found.num_documents:,} documents ({left:,} not shown) in {found.rows:,} rows, {found.empty_slots} empty slots"
    )
    print(f"{counts['real']:,} tokens with frames, {counts['content']:,} without; {counts['scored']:,} to predict: "
          f"{counts['mask']:,} hidden, {counts['random']:,} replaced, {counts['kept']:,} kept")  # fmt: skip
    proof = {True: "as the run wrote it", False: "the run wrote another"}
    said = "not written down for this step" if found.written is None else proof[found.written == found.ledger]
    print(f"ledger {found.ledger} ({said if found.world == 1 else 'of this share'})")

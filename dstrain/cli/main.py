"""The `dstrain` command: one parser, one place where faults become messages and exit codes.

Nothing heavy is imported before a subcommand asks for it, so that `dstrain --help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from dstrain.base.errors import DstrainError, PeerError
from dstrain.base.secrets import redact
from dstrain.cli import audit, bench, demo, doctor, export, launch, plan, shards, status, tokenizer, training
from dstrain.cli.process_end import run_and_leave

_EPILOG = """
the way from text to a model:
  dstrain tokenizer train --input 'corpus/*.jsonl.gz' --vocab-size 32768 --out tok/
  dstrain shards build --input 'corpus/*.jsonl.gz' --tokenizer tok/ --out shards/
  dstrain plan configs/bert-base.yaml --gpus 8 --gpu-type h100      (memory, time and money before the run)
  deepspeed --num_gpus 8 launch/pretrain.py --config configs/bert-base.yaml data.path=shards/
  dstrain launch pretrain configs/bert-base.yaml --num-processes 8      (the same, restarted after failures)
  dstrain doctor configs/bert-base.yaml --hostfile hosts         (are these machines fit, and if not, what to do)
  dstrain export runs/bert-base --out hf/
  deepspeed --num_gpus 8 launch/finetune.py --config configs/finetune/sst2.yaml model.init_from=runs/bert-base
  dstrain status runs/bert-base --watch         (what is it doing?)
  tensorboard --logdir runs/
  dstrain audit runs/bert-base                  (what was it trained on?)

exit codes: 0 complete, 75 saved on request (start again to go on), 78 wrong configuration or data,
80 run folder in use, 81 nothing to resume; all of them in docs/exit-codes.md
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="dstrain",
        description="Pretrain an encoder on your own data, on your own cluster, for as little money as possible.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for module in (tokenizer, shards, plan, bench, training, launch, doctor, status, audit, export, demo):
        module.add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    args = _parse(argv)
    return guarded(lambda: int(args.run(args)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse; `key=value` may also stand behind an option, where argparse by itself no longer takes positionals."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    taking: str = getattr(args, "more_into", "")
    if rest and (not taking or any(item.startswith("-") for item in rest)):
        hint = ". A key of the configuration has no dashes and one =, as in train.max_steps=100" if taking else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if rest:
        setattr(args, taking, [*getattr(args, taking), *rest])
    return args


def guarded(action: Callable[[], int]) -> int:
    """Run an action; a user's fault becomes one message on stderr and its exit code, never a traceback."""
    try:
        return action()
    except PeerError as error:
        return int(error.exit_code)  # the rank that failed speaks
    except DstrainError as error:
        print(f"dstrain: error: {redact(str(error))}", file=sys.stderr, flush=True)
        return int(error.exit_code)
    except KeyboardInterrupt:
        print("dstrain: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def entry() -> None:
    """The console script."""
    run_and_leave(main)


def stage_entry(stage: str) -> None:
    """What launch/*.py call: the same as `dstrain STAGE`, with the launcher's own arguments accepted."""
    run_and_leave(lambda: main([stage, *sys.argv[1:]]))


if __name__ == "__main__":  # `python -m dstrain.cli.main`, and what launchers start with --module
    entry()

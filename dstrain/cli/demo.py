"""`dstrain demo`: the whole line on the embedded corpora, driven by the commands a person would type.

Trains nothing itself: each step is a child process, and its result on disk is what says that the step is done. So a second
run skips what exists, and an interrupted one goes on. Runs from an installed wheel and needs no network and no GPU; it
stays on the CPU everywhere, so that the same thing happens everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from dstrain.base.config import merge, parse_overrides, read_yaml
from dstrain.base.errors import ConfigError, DstrainError, ExitCode
from dstrain.base.storage import make_directory, read_json, remove_directory, write_json
from dstrain.base.world import free_port
from dstrain.checkpoint.layout import checkpoints_folder, published_steps
from dstrain.cli import demo_process, demo_report
from dstrain.health.lease import FILE_NAME as LEASE_FILE
from dstrain.health.lease import RunLease
from dstrain.monitor.events import current_curve, read_events

_CORPORA = Path(str(files("dstrain") / "corpora"))
_STATE_FILE = "demo.json"
_FILL_MASK_FILE = "fill_mask.json"
_STOP_SHARE = 2 / 3
"""Share of the pretraining steps after which the 2-process run is told to stop."""

_SENTENCES = (
    "it is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a [MASK].",
    "she was not [MASK] to see him again.",
    "mr. darcy bowed, and left the [MASK].",
)
_FILL_MASK = """
import json, sys
from transformers import pipeline
fill = pipeline("fill-mask", sys.argv[1], top_k=3)
print(json.dumps([{"text": t, "tokens": [[f["token_str"], f["score"]] for f in fill(t)]} for t in sys.argv[2:]]))
"""

_QUICK: dict[str, tuple[str, ...]] = {
    "tokenizer": ("--vocab-size", "1000"),
    "pretrain": (
        "train.max_steps=90", "train.global_batch=4", "train.micro_batch=2", "train.evaluate_rows=16", "monitor.log_every=4",
        "schedule.warmup_steps=5", "train.evaluate_every=1000", "checkpoint.every_steps=1000", "model.config.num_hidden_layers=1",
    ),
    "finetune": ("train.max_steps=4", "train.global_batch=8", "schedule.warmup_steps=1", "task.validation_fraction=0.02"),
    "scratch": ("model.config.num_hidden_layers=1",),
}  # fmt: skip


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="text to fine-tuned encoder on embedded corpora, minutes on two CPU cores",
        description="Train a tokenizer on Jane Austen's novels, build shards, pretrain a small encoder with DeepSpeed on two "
        "processes, stop it, resume it on one, export it to Hugging Face, fine-tune it on movie reviews, and compare with the "
        "same model fine-tuned from random weights. Each step prints the command it runs. Started again, it goes on where "
        "it was and repeats nothing.",
        epilog="examples:\n  dstrain demo\n  dstrain demo --folder /tmp/demo --fresh",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/demo"), help="everything goes here (default runs/demo)"
    )
    parser.add_argument("--fresh", action="store_true", help="remove what an earlier demo left in the folder first")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of everything: proves the way, learns nothing"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of data order, masks and weights (default 0)")
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    demo = Demo(args.folder, quick=args.quick, seed=args.seed)
    with demo_process.stoppable():
        try:
            with RunLease(args.folder):
                demo.claim(fresh=args.fresh)
                demo.run()
        except (KeyboardInterrupt, _StoppedError):
            again = shlex.join(["dstrain", "demo", "--folder", str(args.folder), *(["--quick"] * args.quick)])
            seed = f" --seed {args.seed}" if args.seed else ""
            print(f"\nstopped; what is finished is kept. Go on with: {again}{seed}", file=sys.stderr, flush=True)
            return ExitCode.SAVED_REQUEUE
    return ExitCode.COMPLETE


class _StoppedError(Exception):
    """A run was stopped by somebody else; it has saved."""


class StepError(DstrainError):
    """A step's command failed; its own message stands above."""

    def __init__(self, message: str, *, code: int) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.DEFECT


@dataclass(frozen=True)
class Step:
    """One thing the demo does."""

    name: str
    title: str
    seconds: int
    """How long it takes on two idle cores, roughly."""
    is_done: Callable[[], bool]
    action: Callable[[], None]


class Demo:
    """The steps and the folder they fill."""

    def __init__(self, folder: Path, *, quick: bool, seed: int) -> None:
        self.folder, self.quick, self.seed = folder, quick, seed
        pretrain = _merged("pretrain", self._quick("pretrain"))
        self.max_steps = int(pretrain["train"]["max_steps"])
        self.stop_step = round(self.max_steps * _STOP_SHARE)
        self.steps = self._steps()

    def claim(self, *, fresh: bool) -> None:
        """Make the folder this demo's, after emptying it if asked.

        Raises:
            ConfigError: the folder holds something else, or a demo with other settings.
        """
        mine = {"format": 1, "quick": self.quick, "seed": self.seed}
        path = self.folder / _STATE_FILE
        entries = [p for p in self.folder.iterdir() if p.name != LEASE_FILE and not p.name.startswith(f".{LEASE_FILE}")]
        if entries and not path.is_file():
            raise ConfigError(f"{self.folder}: holds files that are not a demo's; choose another --folder")
        if fresh:
            for entry in sorted(entries, key=lambda p: p == path):  # the mark that allows this goes last
                remove_directory(entry) if entry.is_dir() else entry.unlink()
        elif entries:
            found = read_json(path)
            different = [k for k in mine if found.get(k) != mine[k]]
            if different:
                was = ", ".join(f"{k} {found.get(k)}" for k in different)
                raise ConfigError(
                    f"{self.folder}: holds a demo with {was}; give the same options, --fresh or another --folder"
                )
            return
        write_json(path, {**mine, "steps": {}})

    def run(self) -> None:
        """Do what is not done, then show the table."""
        total = sum(step.seconds for step in self.steps if not step.is_done())
        length = (
            f"about {max(1, round(total / 60))} minutes on two idle cores" if total else "everything is done already"
        )
        if self.quick and total:
            length = "a few steps of everything"
        print(f"dstrain demo in {self.folder}: {length}", flush=True)
        for number, step in enumerate(self.steps, start=1):
            head = f"[{number}/{len(self.steps) + 1}] {step.title}"
            if step.is_done():
                print(f"\n{head}: already done", flush=True)
                continue
            print(f"\n{head}" + ("" if self.quick else f" (about {step.seconds} s)"), flush=True)
            with self._timed(step.name):
                step.action()
            if not step.is_done():
                raise _StoppedError
        print(f"\n[{len(self.steps) + 1}/{len(self.steps) + 1}] What came out", flush=True)
        spent = read_json(self.folder / _STATE_FILE)["steps"]
        print(demo_report.report(self.folder, spent=spent, quick=self.quick), flush=True)

    def _steps(self) -> list[Step]:
        at = self.folder
        encoder, reviews = at / "pretrain", "Fine-tune on movie reviews with DeepSpeed on 2 processes"
        return [
            Step("tokenizer", "Train a tokenizer on Jane Austen's six novels", 4,
                 (at / "tokenizer" / "tokenizer.json").is_file, self._tokenizer),
            Step("shards", "Tokenise them into WebDataset shards, a part held out", 3,
                 (at / "shards" / "train" / "manifest.json").is_file, self._shards),
            Step("pretrain", f"Pretrain with DeepSpeed ZeRO-1 on 2 processes, told to stop at step {self.stop_step}", 100,
                 lambda: self._saved_step() >= self.stop_step, self._pretrain),
            Step("resume", "Resume it on 1 process, to the end", 50,
                 lambda: self._saved_step() >= self.max_steps, self._resume),
            Step("export", "Export to Hugging Face and fill in masks with plain transformers", 10,
                 (at / _FILL_MASK_FILE).is_file, self._export),
            Step("finetune", f"{reviews}, from the pretrained encoder", 60,
                 (at / "finetune" / "metrics.json").is_file,
                 lambda: self._finetune("finetune", f"model.init_from={_quoted(encoder)}")),
            Step("scratch", f"{reviews}, from random weights", 60,
                 (at / "scratch" / "metrics.json").is_file,
                 lambda: self._finetune("scratch", f"tokenizer={_quoted(at / 'tokenizer')}")),
        ]  # fmt: skip

    def _tokenizer(self) -> None:
        options = self._quick("tokenizer") or ["--vocab-size", "8192"]
        self._data(
            "tokenizer", "train", "--input", str(_CORPORA / "austen.jsonl.gz"), "--kind", "wordpiece", "--lowercase",
            "--model-max-length", "128", *options, "--out", str(self.folder / "tokenizer"),
        )  # fmt: skip

    def _shards(self) -> None:
        self._data(
            "shards", "build", "--input", str(_CORPORA / "austen.jsonl.gz"), "--tokenizer", str(self.folder / "tokenizer"),
            "--validation-fraction", "0.05", "--block-tokens", "16384", "--out", str(self.folder / "shards"),
        )  # fmt: skip

    def _pretrain(self) -> None:
        self._train(2, "pretrain", *self._pretrain_arguments(2), preempt=self._has_reached_stop)
        if self._saved_step() < self.max_steps:
            print(f"      told to stop as a scheduler does (SIGTERM); saved step {self._saved_step()}", flush=True)

    def _resume(self) -> None:
        self._train(1, "pretrain", *self._pretrain_arguments(1))

    def _pretrain_arguments(self, num_processes: int) -> list[str]:
        return self._run_arguments("pretrain", num_processes, [f"data.path={_quoted(self.folder / 'shards')}"])

    def _finetune(self, name: str, start: str) -> None:
        task = f"task.train={_quoted(_CORPORA / 'movie_reviews.tsv.gz')}"
        quick = self._quick("finetune") + (self._quick(name) if name != "finetune" else [])
        self._train(2, "finetune", *self._run_arguments(name, 2, [task, start], quick=quick))

    def _export(self) -> None:
        export = self.folder / "pretrain" / "export"
        if not (export / "config.json").is_file():
            self._data("export", str(self.folder / "pretrain"))
        answer = self.folder / "logs" / f"fill-mask-{os.getpid()}.json"
        make_directory(answer.parent)
        print("      $ python -c \"from transformers import pipeline; pipeline('fill-mask', ...)\"", flush=True)
        command = [sys.executable, "-c", _FILL_MASK, str(export), *_SENTENCES]
        self._check(demo_process.run(command, stdout=answer), "fill-mask")
        filled = read_json(answer)
        for entry in filled:
            words = ", ".join(f"{token} {score:.0%}" for token, score in entry["tokens"])
            print(f"      {entry['text']}\n          {words}", flush=True)
        write_json(self.folder / _FILL_MASK_FILE, filled)

    def _run_arguments(
        self, name: str, num_processes: int, overrides: Sequence[str], *, quick: Sequence[str] | None = None
    ) -> list[str]:
        # Many threads on few numbers only wait for each other.
        threads = max(1, min(4, len(os.sched_getaffinity(0)) // num_processes))
        chosen = [
            f"run_folder={_quoted(self.folder / name)}",
            *overrides,
            "engine.device=cpu",
            f"engine.threads={threads}",
        ]
        seed = [f"seed={self.seed}"] if self.seed else []
        extra = self._quick(name) if quick is None else quick
        return ["--config", str(_CORPORA / "configs" / f"{name}.yaml"), *chosen, *seed, *extra]

    def _data(self, *arguments: str) -> None:
        command = demo_process.dstrain_command(*arguments)
        _show(command)
        self._check(demo_process.run(command), arguments[0])

    def _train(self, num_processes: int, *arguments: str, preempt: Callable[[], bool] | None = None) -> None:
        log = self.folder / "logs" / f"{arguments[0]}.log"
        make_directory(log.parent)
        command = demo_process.dstrain_command(*arguments)
        if num_processes > 1:
            command = demo_process.launcher_command(*arguments, num_processes=num_processes, port=free_port())
        _show(command)
        code = demo_process.run(command, stdout=log, stop_signal=signal.SIGTERM, preempt=preempt)
        if code != ExitCode.SAVED_REQUEUE:
            self._check(code, arguments[0], log)

    def _check(self, code: int, what: str, log: Path | None = None) -> None:
        if code:
            where = f" (see also {log})" if log is not None else ""
            how = f"was killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
            raise StepError(
                f"demo: {what} {how}; its message stands above{where}. The same command tries again", code=code
            )

    def _quick(self, name: str) -> list[str]:
        return list(_QUICK.get(name, ())) if self.quick else []

    def _saved_step(self) -> int:
        published = published_steps(checkpoints_folder(self.folder / "pretrain"))
        return published[0][0] if published else -1

    def _has_reached_stop(self) -> bool:
        path = self.folder / "pretrain" / "events.jsonl"
        if not path.is_file():
            return False
        return any(e["event"] == "step" and e["step"] >= self.stop_step for e in current_curve(read_events(path)))

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        """Add a step's wall and CPU seconds to the demo's state, also when it is interrupted."""
        started, cpu = time.perf_counter(), _children_cpu_s()
        try:
            yield
        finally:
            state = read_json(self.folder / _STATE_FILE)
            spent = state["steps"].setdefault(name, {"seconds": 0.0, "cpu_seconds": 0.0})
            spent["seconds"] = round(spent["seconds"] + time.perf_counter() - started, 2)
            spent["cpu_seconds"] = round(spent["cpu_seconds"] + _children_cpu_s() - cpu, 2)
            write_json(self.folder / _STATE_FILE, state)


def _merged(name: str, overrides: Sequence[str]) -> dict[str, Any]:
    return merge(read_yaml(_CORPORA / "configs" / f"{name}.yaml"), parse_overrides(overrides))


def _quoted(path: Path) -> str:
    """A path as a YAML value; plain where that is safe, so that the commands shown stay readable."""
    text = str(path)
    return text if re.fullmatch(r"[\w./-]*/[\w./-]*", text) else json.dumps(text, ensure_ascii=False)


def _show(command: Sequence[str]) -> None:
    """Print a command as a person would type it."""
    plain = demo_process.dstrain_command()
    words = ["dstrain", *command[len(plain) :]] if list(command[: len(plain)]) == plain else command
    print(f"      $ {shlex.join([Path(words[0]).name, *words[1:]])}", flush=True)


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

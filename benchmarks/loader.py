"""dstrain's loader against webdataset, LitData, MosaicML Streaming, HF datasets and a torch memmap: same tokens, one run.

    pip install -r benchmarks/requirements-peers.txt
    python -m venv peers/mosaicml && peers/mosaicml/bin/pip install -r benchmarks/requirements-peers-mosaicml.txt   # its pins clash
    python benchmarks/loader.py --work scratch --python mosaicml=peers/mosaicml/bin/python                # the embedded novels
    python benchmarks/loader.py --corpus 'corpus/*.jsonl.gz' --work scratch --python mosaicml=peers/mosaicml/bin/python

A peer that is not installed is reported as such. Each measurement is a fresh process; the order of the variants alternates
from round to round; the table gives medians with the least and the greatest. Conversions and the states at half of the data
are kept below --work and found again. Raw delivery hands out arrays of tokens, `train` a batch ready for the model. How each
peer is set up is said in `loader_peers/peer_*.py`, which follow the peers' own documentation.

Lost and repeated rows are counted on 9,600 numbered rows, 96 a global batch: two processes stop at step 47 of 100; two, or
three, go on from what they kept. The numbers divide evenly, so that an uninterrupted epoch is complete for everyone.
The result goes to benchmarks/results/ as Markdown and JSON, losses included.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "loader_peers"))

import corpus  # noqa: E402
from header import Facts  # noqa: E402
from report import render  # noqa: E402
from variants import VARIANTS  # noqa: E402

ROW_LENGTH, GLOBAL_BATCH = 512, 64
COUNT_BATCH, COUNT_STOP = 96, 47
PEERS = sorted({variant.peer for variant in VARIANTS.values()})
Figures = dict[str, Any]


class Bench:
    """Starts measuring processes and keeps what they answer."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work: Path = args.work.resolve()
        self.python = dict(entry.split("=", 1) for entry in args.python)
        self.missing: dict[str, str] = {}
        self.versions: dict[str, dict[str, str]] = {}
        self.failures: dict[str, str] = {}

    def run(self, tasks: list[Figures], *, timeout: float) -> list[Figures] | str:
        """Run one process a task, side by side; their answers, or the last line of what went wrong."""
        with tempfile.TemporaryDirectory(dir=self.work) as scratch, socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            probe.close()
            running = []
            for number, task in enumerate(tasks):
                task["out"] = f"{scratch}/{number}.out"
                Path(f"{scratch}/{number}.json").write_text(json.dumps(task))
                running.append(self._start(task, f"{scratch}/{number}.json", port))
            errors = [_finish(process, timeout) for process in running]
            if any(errors):
                return next(error for error in errors if error)
            return [json.loads(Path(task["out"]).read_text()) for task in tasks]

    def _start(self, task: Figures, job: str, port: int) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1",
            "LITDATA_DISABLE_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        rank, world = str(task.get("rank", 0)), str(task.get("world", 1))
        if world != "1":
            environment |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        command = [self.python.get(task["peer"], sys.executable), str(HERE / "loader_peers" / "process.py"), job]
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def task(self, kind: str, name: str, *, count: bool = False, **more: Any) -> Figures:
        """A job for `process.py`."""
        variant = VARIANTS[name]
        data = "count" if count else "speed"
        return {
            "task": kind, "variant": name, "peer": variant.peer, "form": variant.form, "workers": variant.workers,
            "folder": str(self.folder / data / f"as-{variant.converted}"), "corpus": str(self.folder / data), "seed": 1,
            "row_length": corpus.COUNT_LENGTH if count else ROW_LENGTH, "batch": COUNT_BATCH if count else GLOBAL_BATCH, **more,
        }  # fmt: skip

    def prepare(self) -> Figures:
        """Corpus, installed peers, conversions; returns the conversions' figures."""
        self.work.mkdir(parents=True, exist_ok=True)
        self.folder = corpus.prepare(self.args.corpus, work=self.work, mtok=self.args.mtok, vocab=self.args.vocab)
        for peer in PEERS:
            name = next(n for n, v in VARIANTS.items() if v.peer == peer)
            answer = self.run([self.task("check", name)], timeout=120)
            if isinstance(answer, str):
                self.missing[peer] = answer
            else:
                self.versions[peer] = answer[0]
        return {peer: self._convert(peer) for peer in PEERS if peer not in self.missing}

    def _convert(self, peer: str) -> Figures:
        name = next(n for n, v in VARIANTS.items() if v.peer == peer and v.converted == peer)
        done: Figures = {}
        for count in (True, False):
            task = self.task("convert", name, count=count)
            note = Path(task["folder"] + ".json")
            if not note.exists():
                say(f"converting for {peer}")
                shutil.rmtree(task["folder"], ignore_errors=True)
                answer = self.run([task], timeout=900)
                if isinstance(answer, str):
                    self.missing[peer] = answer
                    return {}
                note.write_text(json.dumps(answer[0]))
            done = json.loads(note.read_text())
        return done

    def names(self) -> list[str]:
        chosen = [n for n, v in VARIANTS.items() if v.peer not in self.missing and VARIANTS[n].peer in self.versions]
        return [name for name in chosen if self.args.only in name]

    def speed(self, name: str) -> Figures | None:
        seconds = {"seconds": self.args.seconds, "warmup_s": min(0.5, self.args.seconds / 4)}
        return self._one(name, self.task("speed", name, **seconds))

    def resume(self, name: str) -> Figures | None:
        """Seconds to the first batch from the state at half of the data, made once."""
        state = self.folder / "speed" / f"state-{name.replace(' ', '-').replace(',', '')}.json"
        if not state.exists():
            say(f"{name}: walking to half of the data")
            half = self._epoch_batches(name)
            if self._one(name, self.task("walk", name, half=half, keep=str(state))) is None:
                return None
        return self._one(name, self.task("first", name, state=str(state)))

    def _epoch_batches(self, name: str) -> int:
        """Batches of an epoch for peers that do not tell: documents in batches, or blocks."""
        loaded = corpus.load(self.folder / "speed")
        if VARIANTS[name].form == "blocks":
            return -(-len(loaded.tokens) // 131072)
        return len(loaded.ends) // GLOBAL_BATCH

    def _one(self, name: str, task: Figures) -> Figures | None:
        answer = self.run([task], timeout=300)
        if isinstance(answer, str):
            self.failures[f"{name}, {task['task']}"] = answer
            say(f"{name}: {task['task']} FAILED: {answer}")
            return None
        return answer[0]

    def count(self, name: str) -> Figures | None:
        """Lost and repeated rows of an epoch: uninterrupted, resumed by two, resumed by three."""
        whole = self._walk(name, world=2)
        with tempfile.TemporaryDirectory(dir=self.work) as states:
            before = self._walk(name, world=2, stop_after=COUNT_STOP, keep=states)
            if whole is None or before is None:
                return None
            result: Figures = {"whole": _missed(whole)}
            for world in (2, 3):
                after = self._walk(name, world=world, states=states)
                result[f"to_{world}"] = None if after is None else _missed(before + after)
        return result

    def _walk(self, name: str, *, world: int, keep: str = "", states: str = "", **more: Any) -> list[int] | None:
        tasks = []
        for rank in range(world):
            task = self.task("walk", name, count=True, rank=rank, world=world, **more) | {"count": True}
            if keep:
                task["keep"] = f"{keep}/{rank}.json"
            if states:  # a rank that was not there takes the first one's state
                own = Path(f"{states}/{rank}.json")
                task["state"] = str(own if own.exists() and world == 2 else Path(f"{states}/0.json"))
            tasks.append(task)
        answers = self.run(tasks, timeout=120)
        if isinstance(answers, str):
            self.failures[f"{name}, counting with {world} ranks"] = answers
            say(f"{name}: counting with {world} ranks FAILED: {answers}")
            return None
        return [number for answer in answers for number in answer["numbers"]]


def _missed(numbers: list[int]) -> dict[str, int]:
    seen = Counter(numbers)
    return {"lost": corpus.COUNT_ROWS - len(seen), "repeated": sum(seen.values()) - len(seen)}


def _finish(process: subprocess.Popen[bytes], timeout: float) -> str:
    """What went wrong, empty if nothing did."""
    try:
        error = process.communicate(timeout=timeout)[1].decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"no end after {timeout:.0f} s"
    if process.returncode == 0:
        return ""
    return error.splitlines()[-1][:300] if error else f"exit status {process.returncode}"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(bench: Bench) -> Figures:
    """All rounds; the same variants in turn, forwards and backwards."""
    names = bench.names()
    results: Figures = {name: {"speed": [], "resume": []} for name in names}
    for round_ in range(bench.args.rounds):
        for name in names if round_ % 2 == 0 else names[::-1]:
            say(f"round {round_ + 1}: {name}")
            for kind in ("speed", "resume") if VARIANTS[name].resumes else ("speed",):
                found = bench.speed(name) if kind == "speed" else bench.resume(name)
                if found is not None:
                    results[name][kind].append(found)
    for name in names if bench.args.rounds else []:
        if VARIANTS[name].counted:
            say(f"counting: {name}")
            results[name]["count"] = bench.count(name)
    return results


def main() -> None:
    args = parse()
    facts = Facts.now(
        __file__, packages=("dstrain",), inputs=[f for pattern in args.corpus for f in sorted(glob.glob(pattern))]
    )
    bench = Bench(args)
    conversions = bench.prepare()
    if args.prepare_only:
        return
    data = {
        "head": facts.to_json(), "head_text": facts.text(), "rounds": args.rounds, "mtok": args.mtok, "seconds": args.seconds,
        "conversions": conversions, "results": measure(bench), "missing": bench.missing, "versions": bench.versions,
        "failures": bench.failures,
    }  # fmt: skip
    text = render(data)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"{facts.date}-{args.name}"
    stem.with_suffix(".md").write_text(text)
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    embedded = [str(files("dstrain") / "corpora" / "austen.jsonl.gz")]
    parser.add_argument("--corpus", nargs="+", default=embedded, help="files with text (default: the embedded novels)")
    parser.add_argument("--work", type=Path, required=True, help="scratch folder, kept between runs")
    parser.add_argument("--mtok", type=float, default=50, help="million tokens; the text repeats in another order")
    parser.add_argument("--vocab", type=int, default=8000, help="of the tokenizer that is trained")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2, help="of each timed stretch")
    parser.add_argument(
        "--python", nargs="*", default=[], metavar="PEER=PYTHON", help=f"interpreter of a peer ({', '.join(PEERS)})"
    )
    parser.add_argument("--only", default="", help="only variants with this in their name")
    parser.add_argument("--prepare-only", action="store_true", help="convert, measure nothing")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result files")
    parser.add_argument("--name", default="loader", help="of the result files")
    return parser.parse_args()


if __name__ == "__main__":
    main()

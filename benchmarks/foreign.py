"""Unmodified WebDataset tars, one document a sample: dstrain's index in random order against webdataset in file order.

    python benchmarks/foreign.py                        # 40,000 documents, 5 runs; a tokenizer trained on the embedded novels

Writes per-document npy and txt tars with lognormal lengths (median 402 tokens, as in docs/data-format.md), indexes
them, and times, interleaved run by run in one process each with one thread: the header walk, webdataset's plain
sequential iteration with its own npy decoder, dstrain's blocks in random order, the same with a fresh page cache mapping
(a new process), and on-the-fly tokenising with 0 and 1 workers. Medians with the spread (least to greatest), by wall and by CPU
time; the result goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from header import Facts

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


HERE = Path(__file__).resolve().parent


def write_sets(folder: Path, tokenizer_folder: Path, *, documents: int, shards: int) -> dict[str, int]:
    from dstrain.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tokenizer_folder)
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(402), 1.0, size=documents)), 8, 20000).astype(np.int64)
    words = [tokenizer.token(i) for i in range(tokenizer.vocab_size) if tokenizer.token(i).isalpha()]
    totals = {"npy": 0, "txt": 0}
    size = -(-documents // shards)
    for number in range(shards):
        part = lengths[number * size : (number + 1) * size]
        ids = [rng.integers(200, tokenizer.vocab_size, size=int(n)).astype("<u2") for n in part]
        totals["npy"] += int(part.sum())
        _tar(folder / f"npy/{number:03d}.tar", "tokens.npy", [_npy(x) for x in ids])
        texts = [" ".join(words[k % len(words)] for k in x.tolist()) for x in ids[: size // 20]]
        _tar(folder / f"txt/{number:03d}.tar", "txt", [t.encode() for t in texts])
    return totals


def _npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _tar(path: Path, extension: str, payloads: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for index, data in enumerate(payloads):
            info = tarfile.TarInfo(f"{path.stem}{index:07d}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class Timed:
    """Wall and CPU seconds since it was made, children's CPU included."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), _cpu_seconds()

    def stop(self, amount: float, unit: str) -> dict[str, Any]:
        return {
            "amount": amount,
            "unit": unit,
            "wall": time.perf_counter() - self._wall,
            "cpu": _cpu_seconds() - self._cpu,
        }


def _cpu_seconds() -> float:
    import psutil

    # The system counts other processes in hundredths of a second, too coarse for what takes a few of them.
    children = (process.cpu_times() for process in psutil.Process().children(recursive=True))
    return time.process_time() + sum(times.user + times.system for times in children)


def walk(folder: Path) -> dict[str, Any]:
    from dstrain.foreign.tar_walk import walk_tar

    timed = Timed()
    return timed.stop(sum(len(walk_tar(path).names) for path in sorted((folder / "npy").glob("*.tar"))), "members")


def tarfile_walk(folder: Path) -> dict[str, Any]:
    timed, count = Timed(), 0
    for path in sorted((folder / "npy").glob("*.tar")):
        with tarfile.open(path) as tar:
            count += sum(1 for member in tar if member.isreg())
    return timed.stop(count, "members")


def webdataset_npy(folder: Path) -> dict[str, Any]:
    import webdataset

    urls = [str(path) for path in sorted((folder / "npy").glob("*.tar"))]
    dataset = webdataset.WebDataset(urls, shardshuffle=False).decode()
    timed = Timed()
    return timed.stop(sum(len(sample["tokens.npy"]) for sample in dataset), "tokens")


def _blocks(split: Path, *, workers: int = 0) -> dict[str, Any]:
    """Every block once at random; opening, and loading the tokenizer in each process, come before the clock starts."""
    from dstrain.foreign.dataset import ForeignDataset

    dataset = ForeignDataset(split, workers=workers)
    order = list(range(len(dataset.blocks)))
    random.Random(1).shuffle(order)
    dataset.will_need(order[:1])
    dataset.read(order[0])
    timed, tokens = Timed(), 0
    for at, block in enumerate(order[1:], start=1):
        dataset.will_need(order[at : at + 64])
        tokens += len(dataset.read(block).tokens)
    found = timed.stop(tokens, "tokens")
    dataset.close()
    return found


def dstrain_npy(folder: Path) -> dict[str, Any]:
    return _blocks(folder / "npy/dstrain-index/train")


def dstrain_txt(folder: Path) -> dict[str, Any]:
    return _blocks(folder / "txt/dstrain-index/train")


def dstrain_txt_worker(folder: Path) -> dict[str, Any]:
    return _blocks(folder / "txt/dstrain-index/train", workers=1)


MEASURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "header walk": walk,
    "header walk, Python's tarfile": tarfile_walk,
    "webdataset npy, file order": webdataset_npy,
    "dstrain npy, random order": dstrain_npy,
    "dstrain txt, random order, calling thread": dstrain_txt,
    "dstrain txt, random order, 1 worker process": dstrain_txt_worker,
}


def child(name: str, folder: Path) -> None:
    if "txt" not in name:
        MEASURES[name](folder)  # imports and page cache; tokenising is long enough not to need it
    print(json.dumps(MEASURES[name](folder)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=40000)
    parser.add_argument("--shards", type=int, default=6)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer folder (default: WordPiece, trained on the embedded novels)"
    )
    parser.add_argument("--vocab", type=int, default=16000, help="of the tokenizer that is trained")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the result file")
    parser.add_argument("--child", nargs=2)
    args = parser.parse_args()
    facts = Facts.now(__file__, packages=("dstrain", "webdataset", "numpy", "tokenizers"))
    with tempfile.TemporaryDirectory(prefix="dstrain-foreign-") as scratch:
        args.tokenizer = args.tokenizer or trained_tokenizer(Path(scratch), args.vocab)
        run(Path(scratch), args, facts)


def trained_tokenizer(folder: Path, vocab: int) -> Path:
    from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
    from dstrain.data.tokenizer import train_tokenizer

    sources = find_sources([str(files("dstrain") / "corpora" / "austen.jsonl.gz")])
    texts = (document.text for document in read_documents(sources, CorpusConfig()))
    return train_tokenizer(texts, kind="wordpiece", vocab_size=vocab, lowercase=True, out=folder / "tok", quiet=True)


def run(folder: Path, args: argparse.Namespace, facts: Facts) -> None:
    from dstrain.foreign.index import IndexConfig, index_tars

    totals = write_sets(folder, args.tokenizer, documents=args.documents, shards=args.shards)
    index_lines = []
    for kind in ("npy", "txt"):
        report = index_tars(
            [folder / kind], tokenizer=args.tokenizer, config=IndexConfig(validation_fraction=0), quiet=True
        )
        size = sum(path.stat().st_size for path in (folder / kind).glob("*.tar"))
        tables = sum(path.stat().st_size for path in (report.path / "train").glob("*.idx"))
        index_lines.append(
            f"| index {kind} | {report.train.num_documents:,} documents, {report.train.num_tokens / 1e6:.1f} Mtok, "
            f"{size / 1e6:.0f} MB | {report.seconds:.1f} s, {size / 1e6 / report.seconds:.0f} MB/s, index {tables / 1e6:.2f} MB |"
        )
    rates: dict[str, list[float]] = {name: [] for name in MEASURES}
    cpus: dict[str, list[float]] = {name: [] for name in MEASURES}
    units: dict[str, str] = {}
    names = list(MEASURES)
    for number in range(args.runs):
        for name in names if number % 2 == 0 else reversed(names):
            done = subprocess.run(
                [sys.executable, __file__, "--tokenizer", "-", "--child", name, str(folder)],
                capture_output=True, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            rates[name].append(found["amount"] / found["wall"])
            cpus[name].append(found["amount"] / max(found["cpu"], 1e-9))
            units[name] = found["unit"]
    print_result(args, facts, totals, index_lines, rates, cpus, units)


def print_result(
    args: argparse.Namespace,
    facts: Facts,
    totals: dict[str, int],
    index_lines: list[str],
    rates: dict[str, list[float]],
    cpus: dict[str, list[float]],
    units: dict[str, str],
) -> None:
    from dstrain.data.tokenizer import Tokenizer

    lines = ["| what | per CPU-second | per second |", "|---|---|---|"]
    for name, values in rates.items():
        scale, word = (1e3, "k members") if units[name] == "members" else (1e6, "Mtok")
        lines.append(f"| {name} | {_spread(cpus[name], scale)} {word} | {_spread(values, scale)} |")
    ours, theirs = "dstrain npy, random order", "webdataset npy, file order"
    pairs = [[a / b for a, b in zip(found[ours], found[theirs])] for found in (cpus, rates)]
    verdict = "met" if statistics.median(pairs[0]) >= 10 else "**missed**"
    text = "\n".join(
        [
            f"# Unmodified WebDataset tars: dstrain's index against webdataset, {facts.date}", "", facts.text(),
            f"{args.documents:,} documents, {totals['npy'] / 1e6:.1f} Mtok of npy in {args.shards} tars, a twentieth of them as text; "
            f"WordPiece tokenizer of {Tokenizer.load(args.tokenizer).vocab_size:,} ids; "
            f"{args.runs} interleaved runs, the order reversed every other run; a process and one thread for each figure, warm page cache; "
            "median (least to greatest).",
            "`webdataset` is its plain iteration with its own npy decoder, in file order, which it needs; dstrain reads the same files in",
            "random order, with every block's checksum verified.", "",
            *lines, "", *["| indexing, one process | set | time |", "|---|---|---|", *index_lines], "",
            f"dstrain in random order over webdataset in file order, same npy tars: {_spread(pairs[0])} times by CPU time, "
            f"{_spread(pairs[1])} by wall time; the target was 10: {verdict}.", "",
            "Text costs what the tokenizer costs, in the calling thread or in a worker: one worker gains nothing but leaves the training",
            "thread free; on long runs convert the set. Indexing passes over each npy tar three times, the later ones from the page cache:",
            "lengths, block checksums, SHA-256; `--workers` adds processes.",
        ]
    )  # fmt: skip
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{facts.date}-foreign.md").write_text(text + "\n", encoding="utf-8")


def _spread(values: list[float], scale: float = 1.0) -> str:
    median, least, greatest = (value / scale for value in (statistics.median(values), min(values), max(values)))
    return f"{median:,.2f} ({least:,.2f} to {greatest:,.2f})"


if __name__ == "__main__":
    if "--child" in sys.argv:
        place = sys.argv.index("--child")
        child(sys.argv[place + 1], Path(sys.argv[place + 2]))
    else:
        main()

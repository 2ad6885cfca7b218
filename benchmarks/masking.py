"""Masking, packing and collating: million tokens per CPU-second, against the Hugging Face collator, a word loop, a plain generator.

    python benchmarks/masking.py --input 'corpus/*.jsonl.gz'         # trains a tokenizer, builds shards, 7 rounds
    python benchmarks/masking.py --shards shards/ --rounds 3

All contenders run in one process with one thread, in turn, round after round, the order reversed every other round; the clock
is the CPU time of the thread. They get rows of the same corpus and mask 30 %, 80/10/10:

  dstrain            rows of the plan to a micro-batch: gather of packed pieces, longest first, masks, positions, tensors, ledger
  dstrain block      what each block costs once, when it is read: checksum, best-fit packing, layout by rows
  hf-collator        transformers.DataCollatorForLanguageModeling on full rows (run_mlm.py's group_texts), lists of ids
  hf-collator-array  the same on rows that are NumPy arrays already
  hf-whole-word      the same with whole_word_mask=True, on lists (it then shows [MASK] for all chosen tokens, by its own rule)
  word-loop          whole words in a Python loop over each row, as Megatron-LM's BERT dataset does it: masks only
  numpy-sequential   one numpy Generator over the whole batch: masks only; fast, but another batch or resume gets other masks
  torch-cpu          dstrain's law for tensors, on the CPU: masks only

Losses are printed too. Rows of the peers are full, so every token of theirs is a real one; dstrain counts real tokens only.
Results go to benchmarks/results/ as Markdown and JSON.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
from header import Facts

from dstrain.data.ledger import ledger_digest
from dstrain.data.micro_batch import make_micro_batch
from dstrain.data.reader import ShardDataset
from dstrain.data.row_index import rows_per_block
from dstrain.data.rows import RowSource, gather
from dstrain.data.tokenizer import Tokenizer
from dstrain.objectives.masking import Masking
from dstrain.objectives.masking_config import MaskingConfig
from dstrain.objectives.masking_torch import PieceTensors, TorchMasking

ROOT = Path(__file__).resolve().parents[1]
SEED, RATE = 1, 0.3
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {}, "whole words": {"whole_word": True}, "spans": {"spans": True},
    "spans of words": {"spans": True, "whole_word": True},
}  # fmt: skip
Timed = Callable[[], int]
"""Does its work and returns the real tokens of it."""


def prepare(folder: Path, inputs: list[str]) -> Path:
    """Tokenizer and shards."""
    from dstrain.corpus.build import ShardBuildConfig, build_shards
    from dstrain.corpus.documents import CorpusConfig, find_sources, read_documents
    from dstrain.data.tokenizer import train_tokenizer

    texts = (d.text for d in read_documents(find_sources(inputs), CorpusConfig()))
    train_tokenizer(texts, kind="wordpiece", vocab_size=30522, out=folder / "tok", quiet=True)
    build_shards(
        inputs,
        tokenizer=folder / "tok",
        out=folder / "shards",
        config=ShardBuildConfig(validation_fraction=0.0),
        quiet=True,
    )
    return folder / "shards"


class Bench:
    """One corpus at one row length: its rows, and what each contender does with a batch of them."""

    def __init__(self, shards: Path, *, length: int, rows: int, batches: int) -> None:
        self.tokenizer = Tokenizer.load(shards / "tokenizer")
        self.dataset = ShardDataset(shards / "train")
        self.length = length
        manifest = self.dataset.manifest
        counts = rows_per_block(
            self.dataset, num_blocks=manifest.num_blocks, fingerprint="", sequence_length=length,
            frame_length=len(manifest.frame_prefix) + len(manifest.frame_suffix), may_write=False,
        )  # fmt: skip
        everything = [(0, 0, block, row) for block, count in enumerate(counts.tolist()) for row in range(count)]
        order = np.random.default_rng(SEED).permutation(len(everything))
        rows = min(rows, len(everything))
        self.batches = [[everything[i] for i in np.resize(np.roll(order, -at * rows), rows)] for at in range(batches)]
        words = self.tokenizer.word_starts()
        self.word_starts = words
        plain, worded = (
            RowSource(self.dataset, sequence_length=length, word_starts=table, cache_bytes=1 << 34)
            for table in (None, words)
        )
        for number in range(manifest.num_blocks):  # every block is in the caches; what that costs is measured apart
            plain.block(number)
            worded.block(number)
        self.source = {kind: worded if "words" in kind else plain for kind in KINDS}
        self.masking = {kind: self._masking(kind) for kind in KINDS}
        self.flat = self._full_rows(rows * batches).reshape(batches, rows, length)
        self._peers()

    def _masking(self, kind: str) -> Masking:
        t = self.tokenizer
        return Masking(
            MaskingConfig(mask_rate=RATE, **KINDS[kind]), seed=SEED, stream="train", mask_id=t.mask_id,
            special_ids=t.special_ids, vocab_size=t.vocab_size,
        )  # fmt: skip

    def _full_rows(self, count: int) -> np.ndarray:
        """Documents with their frames, joined and cut into full rows, as group_texts does."""
        t, parts, size = self.tokenizer, [], 0
        for block in range(self.dataset.manifest.num_blocks):
            raw = self.dataset.read(block)
            for document in np.split(raw.tokens.astype(np.int64), raw.ends[:-1].astype(int)):
                parts += [np.array(t.frame_prefix), document, np.array(t.frame_suffix)]
                size += len(document) + len(t.frame_prefix) + len(t.frame_suffix)
            if size >= count * self.length:
                break
        return np.resize(np.concatenate(parts), count * self.length)

    def _peers(self) -> None:
        from transformers import AutoTokenizer, DataCollatorForLanguageModeling

        fast = AutoTokenizer.from_pretrained(str(self.tokenizer.folder), local_files_only=True)
        special = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        special[list(self.tokenizer.special_ids)] = 1
        self.special = special.astype(bool)
        settings: dict[str, Any] = {"mlm_probability": RATE, "seed": SEED}
        self.collator = DataCollatorForLanguageModeling(fast, **settings)
        self.word_collator = DataCollatorForLanguageModeling(fast, whole_word_mask=True, **settings)
        place = np.arange(self.length)
        self.lists, self.arrays, self.word_lists = [], [], []
        for batch in self.flat:
            ones = np.ones(self.length, dtype=np.int64)
            columns = [{"input_ids": row, "attention_mask": ones, "special_tokens_mask": special[row]} for row in batch]
            self.arrays.append(columns)
            self.lists.append([{k: v.tolist() for k, v in row.items()} for row in columns])
            # Offsets of characters, one a token: a token that goes on with a word starts where the one before it ended.
            starts = [2 * place + self.word_starts[row] for row in batch]
            ends = [np.append(s[1:] - self.word_starts[row][1:], s[-1] + 1) for s, row in zip(starts, batch)]
            offsets = [np.stack([s, e], axis=1).tolist() for s, e in zip(starts, ends)]
            self.word_lists.append([{**row, "offset_mapping": o} for row, o in zip(self.lists[-1], offsets)])

    # --- dstrain ---

    def whole(self, kind: str, at: int, parts: int) -> int:
        rows, tokens = self.batches[at], 0
        size = -(-len(rows) // parts)
        for first in range(0, len(rows), size):
            tokens += make_micro_batch([self.source[kind]], rows[first : first + size], self.masking[kind], step=0)[
                0
            ].num_tokens
        return tokens

    def stages(self, kind: str, at: int) -> dict[str, tuple[float, int]]:
        """Seconds and tokens of each stage."""
        clock = time.thread_time
        begin = clock()
        pieces, _ = gather([self.source[kind]], self.batches[at])
        gathered = clock()
        corrupted = self.masking[kind](pieces, step=0)
        masked = clock()
        ledger_digest(pieces, corrupted, step=0)
        done = clock()
        tokens = len(pieces.tokens)
        return {
            "gather": (gathered - begin, tokens),
            "mask": (masked - gathered, tokens),
            "ledger": (done - masked, tokens),
        }

    def blocks(self, kind: str, at: int) -> int:
        """Read, pack and lay out three blocks anew."""
        source = RowSource(
            self.dataset,
            sequence_length=self.length,
            word_starts=self.word_starts if "words" in kind else None,
            cache_bytes=1,
        )
        numbers = [(3 * at + i) % self.dataset.manifest.num_blocks for i in range(3)]
        return sum(len(source.block(number).tokens) for number in numbers)

    # --- peers ---

    def hf(self, collator: Any, batches: list[Any], at: int) -> int:
        batch = [dict(row) for row in batches[at]]
        return int(collator(batch)["input_ids"].numel())

    def numpy_sequential(self, at: int, rng: np.random.Generator) -> int:
        tokens = self.flat[at].copy()
        labels = np.full_like(tokens, -100)
        chosen = (rng.random(tokens.shape, dtype=np.float32) < RATE) & ~self.special[tokens]
        labels[chosen] = tokens[chosen]
        lot = rng.random(tokens.shape, dtype=np.float32)
        tokens[chosen & (lot < 0.8)] = self.tokenizer.mask_id
        random = chosen & (lot >= 0.8) & (lot < 0.9)
        tokens[random] = rng.integers(0, self.tokenizer.vocab_size, int(random.sum()))
        return int(tokens.size)

    def word_loop(self, at: int) -> int:
        """create_masked_lm_predictions of Megatron-LM without n-grams: words in a list, shuffled, taken until there are enough."""
        starts, special, mask_id, vocab = (
            self.word_starts,
            self.special,
            self.tokenizer.mask_id,
            self.tokenizer.vocab_size,
        )
        for number, row in enumerate(self.flat[at]):
            rng = np.random.RandomState(SEED + number)
            tokens = row.tolist()
            words: list[list[int]] = []
            for position, token in enumerate(tokens):
                if special[token]:
                    continue
                if words and not starts[token]:
                    words[-1].append(position)
                else:
                    words.append([position])
            rng.shuffle(words)
            labels: dict[int, int] = {}
            wanted, output = int(len(tokens) * RATE), list(tokens)
            for word in words:
                if len(labels) >= wanted:
                    break
                for position in word:
                    lot = rng.random_sample()
                    labels[position] = tokens[position]
                    output[position] = (
                        mask_id if lot < 0.8 else rng.randint(0, vocab) if lot < 0.9 else tokens[position]
                    )
            torch.tensor(output)
        return int(self.flat[at].size)

    def torch_cpu(self, kind: str, at: int) -> Timed:
        law = TorchMasking(self.masking[kind], "cpu")
        pieces = PieceTensors.of(gather([self.source[kind]], self.batches[at])[0], "cpu")
        return lambda: int(law(pieces, law.limits(0))[0].numel())


def contenders(bench: Bench, at: int) -> dict[str, Timed]:
    rng = np.random.default_rng(SEED)
    table: dict[str, Timed] = {}
    for kind in KINDS:
        table[f"dstrain, {kind}"] = partial(bench.whole, kind, at, 1)
    table["dstrain, tokens, 8 micro-batches"] = lambda: bench.whole("tokens", at, 8)
    table["dstrain block"] = lambda: bench.blocks("tokens", at)
    table["dstrain block with words"] = lambda: bench.blocks("whole words", at)
    table["hf-collator"] = lambda: bench.hf(bench.collator, bench.lists, at)
    table["hf-collator-array"] = lambda: bench.hf(bench.collator, bench.arrays, at)
    table["hf-whole-word"] = lambda: bench.hf(bench.word_collator, bench.word_lists, at)
    table["word-loop"] = lambda: bench.word_loop(at)
    table["numpy-sequential"] = lambda: bench.numpy_sequential(at, rng)
    for kind in ("tokens", "spans"):
        table[f"torch-cpu, {kind}"] = bench.torch_cpu(kind, at)
    return table


def measure(bench: Bench, rounds: int) -> dict[str, list[float]]:
    """Million tokens per CPU-second of each contender and stage, one value a round."""
    found: dict[str, list[float]] = {}
    for round_ in range(rounds + 1):  # the first one fills caches and counts for nothing
        at = round_ % len(bench.batches)
        table = contenders(bench, at)
        names = list(table) if round_ % 2 else list(table)[::-1]
        for name in names:
            begin = time.thread_time()
            tokens = table[name]()
            seconds = time.thread_time() - begin
            if round_:
                found.setdefault(name, []).append(tokens / seconds / 1e6)
        for kind in KINDS:
            for stage, (seconds, tokens) in bench.stages(kind, at).items():
                if round_:
                    found.setdefault(f"{kind}: {stage}", []).append(tokens / seconds / 1e6)
        print(f"S={bench.length} round {round_}/{rounds}", flush=True)
    return found


def path(found: dict[str, list[float]], kind: str) -> list[float]:
    """The whole path: a block's share and the micro-batch, as if each row were trained on once."""
    block = found["dstrain block with words" if "words" in kind else "dstrain block"]
    return [1 / (1 / a + 1 / b) for a, b in zip(found[f"dstrain, {kind}"], block)]


def text_of(values: list[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def ratio(one: list[float], other: list[float]) -> str:
    ratios = [a / b for a, b in zip(one, other)]
    return f"{statistics.median(ratios):.3g}× ({min(ratios):.3g} to {max(ratios):.3g})"


def report(
    results: dict[int, dict[str, list[float]]], args: argparse.Namespace, bench: Bench, facts: Facts
) -> tuple[str, dict[str, Any]]:
    manifest = bench.dataset.manifest
    lines = [
        f"# Masking, packing and collating, {facts.date}", "", facts.text(),
        f"No GPU is used. {manifest.num_documents:,} documents, {manifest.num_tokens:,} tokens, WordPiece vocabulary {manifest.vocab_size:,}; "
        f"{args.rows} rows a batch, one thread; {RATE:.0%} masked, 80/10/10. {args.rounds} interleaved rounds; million tokens per "
        "CPU-second, median (min to max); ratios round by round.", "",
    ]  # fmt: skip
    for length, found in results.items():
        lines += [
            f"## Rows of {length}",
            "",
            "| dstrain masks | whole path | rows to micro-batch | gather | mask | ledger | block, once |",
            "|---|---|---|---|---|---|---|",
        ]
        for kind in KINDS:
            block = found["dstrain block with words" if "words" in kind else "dstrain block"]
            cells = [
                path(found, kind),
                found[f"dstrain, {kind}"],
                *(found[f"{kind}: {s}"] for s in ("gather", "mask", "ledger")),
                block,
            ]
            lines.append(f"| {kind} | " + " | ".join(text_of(cell) for cell in cells) + " |")
        micro = found["dstrain, tokens, 8 micro-batches"]
        lines += [
            "",
            f"As 8 micro-batches of {args.rows // 8} rows: {text_of(micro)}.",
            "",
            "| peer | Mtok per CPU-second | dstrain against it |",
            "|---|---|---|",
        ]
        for peer, kind in (
            ("hf-collator", "tokens"),
            ("hf-collator-array", "tokens"),
            ("hf-whole-word", "whole words"),
        ):
            lines.append(
                f"| {peer} | {text_of(found[peer])} | whole path, {kind}: {ratio(path(found, kind), found[peer])} |"
            )
        for peer, kind in (
            ("word-loop", "whole words"),
            ("numpy-sequential", "tokens"),
            ("torch-cpu, tokens", "tokens"),
            ("torch-cpu, spans", "spans"),
        ):
            lines.append(
                f"| {peer} | {text_of(found[peer])} | masks only, {kind}: {ratio(found[f'{kind}: mask'], found[peer])} |"
            )
        lines.append("")
    lines += [
        "Whole path = checksum, packing and layout of a block (once for each row) + gather, masks, positions, tensors and ledger.",
        "The peers neither pack whole documents nor keep a ledger; hf-collator and numpy-sequential draw from one stream, so their masks",
        "depend on what was drawn before. hf-whole-word compares every token of a row with every other.", "",
    ]  # fmt: skip
    data = {"head": facts.to_json(), "results": results}
    return "\n".join(lines), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", help="corpus files (default: the embedded Austen corpus)")
    parser.add_argument("--shards", type=Path, help="shards that exist already, instead of --input")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rows", type=int, default=256, help="rows of a batch")
    parser.add_argument("--batches", type=int, default=8, help="batches taken in turn")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--name", default="masking", help="of the result files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[int, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        inputs = args.input or [str(files("dstrain") / "corpora" / "austen.jsonl.gz")]
        read = [] if args.shards else [file for pattern in inputs for file in sorted(glob.glob(pattern))]
        facts = Facts.now(__file__, packages=("dstrain", "numpy", "torch", "transformers"), inputs=read)
        shards = args.shards or prepare(Path(temporary), inputs)
        for length in args.lengths:
            bench = Bench(shards, length=length, rows=args.rows, batches=args.batches)
            results[length] = measure(bench, args.rounds)
        text, data = report(results, args, bench, facts)
    print(text)
    target = ROOT / "benchmarks" / "results"
    target.mkdir(parents=True, exist_ok=True)
    stem = f"{facts.date}-{args.name}"
    (target / f"{stem}.md").write_text(text)
    (target / f"{stem}.json").write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Published training runs and what the planner's model says about them: the back-tests, and the table of docs/planner.md.

    python -m tests.support.published_runs        (`make docs`: renews the table in docs/planner.md)

Each run names its stack, an efficiency class with few settings that is the same for all of its runs: never a factor for one row. A row that
the model cannot reach keeps its error and says why in `out_of_reach`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from dstrain.models.anatomy import Anatomy, Product
from dstrain.models.config import ModelConfig
from dstrain.models.huggingface import anatomy_without_weights
from dstrain.planner.devices import find_device, find_interconnect
from dstrain.planner.network import Cluster
from dstrain.planner.steptime import Stack, step_time
from dstrain.train.footprint import Batch
from dstrain.train.traffic import Sharding

PAGE = Path(__file__).resolve().parents[2] / "docs/planner.md"
BEGIN, END = "<!-- back-tests: begin (make docs) -->", "<!-- back-tests: end -->"
TOLERANCE = 0.15

STACKS = {
    stack.name: stack
    for stack in (
        Stack("MLPerf, half precision", fused=True, efficiency=0.95, launch_factor=0.2, overlap=0.8, dropout=True),
        Stack("MLPerf, FP8", fused=True, efficiency=0.95, product_speed=1.35, attention_speed=1.3, launch_factor=0.2,
              overlap=0.8, dropout=True),
        Stack("DeepSpeed kernels, V100", fused=True, efficiency=0.95, launch_factor=0.3, dropout=True),
        Stack("NVIDIA DeepLearningExamples", efficiency=0.90, dropout=True),
        Stack("ModernBERT repository", fused=True, efficiency=0.85, overlap=0.8),
        Stack("llm-foundry", efficiency=0.92, overlap=0.8),
        Stack("BioNeMo, Transformer Engine", fused=True, efficiency=0.95, overlap=0.8),
        Stack("Hugging Face, amp", efficiency=0.55, dropout=True),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Published:
    """A run as its source tells it; `value` is what the planner must predict."""

    name: str
    source: str
    stack: str
    model: str
    device: str
    gpus: int
    value: float
    """Thousand useful tokens a second and GPU, or an efficiency in percent where `baseline` is given."""
    tokens: int
    """Of one forward of one GPU."""
    context: float
    scored: float = 0.15
    accumulation: int = 1
    interconnect: str = "ib400"
    baseline: tuple[int, int] | None = None
    """(GPUs, accumulation) that the efficiency is relative to."""
    out_of_reach: str = ""


def _bert(layers: int, hidden: int, **more: Any) -> Anatomy:
    config = {
        "model_type": "bert", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden, **more,
    }  # fmt: skip
    return anatomy_without_weights(ModelConfig(config=config), vocab_size=30522)


def _modern(layers: int, hidden: int, intermediate: int) -> Anatomy:
    config = {
        "model_type": "modernbert", "num_hidden_layers": layers, "hidden_size": hidden,
        "num_attention_heads": hidden // 64, "intermediate_size": intermediate,
    }  # fmt: skip
    return anatomy_without_weights(ModelConfig(config=config), vocab_size=50368)


def _decoder(layers: int, hidden: int, *, vocab: int = 50368) -> Anatomy:
    """A GPT with four times wider feed-forward and a tied head."""
    products = (*(Product(hidden, hidden),) * 4, Product(hidden, 4 * hidden), Product(4 * hidden, hidden))
    tensors = ((vocab * hidden, True), *((12 * hidden**2 + 13 * hidden, True),) * layers)
    return Anatomy(
        family="gpt", layers=layers, hidden=hidden, intermediate=4 * hidden, heads=hidden // 64, vocab=vocab, gated=False,
        tensors=tensors, layer_products=products, head_products=(Product(hidden, vocab),), window=None, local_layers=0,
        dropout=0.0,
    )  # fmt: skip


@cache
def model(name: str) -> Anatomy:
    """The anatomy of a published model."""
    built = {
        "BERT-base": lambda: _bert(12, 768),
        "BERT-large": lambda: _bert(24, 1024),
        "ModernBERT-base": lambda: _modern(22, 768, 1152),
        "Ettin-17M": lambda: _modern(7, 256, 384),
        "Ettin-32M": lambda: _modern(10, 384, 576),
        "Ettin-68M": lambda: _modern(19, 512, 768),
        "Ettin-400M": lambda: _modern(28, 1024, 2624),
        "Ettin-1B": lambda: _modern(28, 1792, 3840),
        "ESM-2 650M": lambda: _decoder(33, 1280, vocab=33),
        "ESM-2 3B": lambda: _decoder(36, 2560, vocab=33),
        "MPT-125M": lambda: _decoder(12, 768),
        "MPT-350M": lambda: _decoder(24, 1024),
        "MPT-760M": lambda: _decoder(24, 1536),
        "MPT-1B": lambda: _decoder(24, 2048),
        "MPT-3B": lambda: _decoder(32, 2560),
    }
    return built[name]()


_MLPERF = "MLCommons training logs"
_MPT = "llm-foundry benchmarking README"
_NARROW = (
    "models of 256 to 512 width run far below the roofline of this stack; the repository makes its batches in one thread of the main "
    "process (ModernBERT#236), and no source says which share of the time that is"
)
_EARLY = (
    "first submissions on a new chip: 32.6 % of the peak where the same model reaches 48 % on H100; FP8 gains little at this width "
    "on B300 (5 to 13 % are published), while the class takes 1.35"
)
RUNS = (
    Published("BERT-large v3.0", _MLPERF, "MLPerf, half precision", "BERT-large", "a100", 8, 81.3, 56 * 254, 336),
    Published("BERT-large v3.0", _MLPERF, "MLPerf, FP8", "BERT-large", "h100", 8, 246.6, 96 * 254, 336),
    Published("BERT-large v3.0, another vendor", _MLPERF, "MLPerf, FP8", "BERT-large", "h100", 8, 241.8, 96 * 254, 336),
    Published("BERT-large v5.0", _MLPERF, "MLPerf, FP8", "BERT-large", "h200", 8, 258.6, 96 * 254, 336),
    Published("BERT-large v5.0", _MLPERF, "MLPerf, FP8", "BERT-large", "b200", 8, 378.0, 96 * 254, 336,
              out_of_reach=_EARLY),
    Published("BERT-large v4.0", _MLPERF, "MLPerf, FP8", "BERT-large", "h100", 64, 223.0, 72 * 254, 336),
    Published("BERT-large v3.0", _MLPERF, "MLPerf, FP8", "BERT-large", "h100", 512, 69.0, 6 * 254, 336),
    Published("BERT-large v3.1", _MLPERF, "MLPerf, FP8", "BERT-large", "h100", 3472, 56.0, 4 * 254, 336),
    Published("fastest BERT, s128", "DeepSpeed blog 2020", "DeepSpeed kernels, V100", "BERT-large", "v100", 1, 34.8,
              64 * 128, 128),
    Published("fastest BERT, s512", "DeepSpeed blog 2020", "DeepSpeed kernels, V100", "BERT-large", "v100", 1, 26.6,
              16 * 512, 512),
    Published("DLE, s128", "DeepLearningExamples README", "NVIDIA DeepLearningExamples", "BERT-large", "a100", 1, 74.0,
              256 * 128, 128, accumulation=32),
    Published("DLE 8 to 256, s128, global batch 64k", "DeepLearningExamples README", "NVIDIA DeepLearningExamples",
              "BERT-large", "a100", 256, 94.9, 256 * 128, 128, interconnect="ib200", baseline=(8, 32)),
    Published("BERT-base, Composer, s128", "mosaicml/examples", "Hugging Face, amp", "BERT-base", "a100", 8, 110.8,
              512 * 128, 128, scored=1.0),
    Published("bert-base, Trainer", "transformers#14615", "Hugging Face, amp", "BERT-base", "a100", 8, 112.0, 128 * 128,
              128, scored=1.0),
    Published("ModernBERT-base", "ModernBERT#236", "ModernBERT repository", "ModernBERT-base", "h100", 8, 307.0,
              96 * 1024, 1024, scored=0.3),
    Published("Ettin 17M", "ettin README", "ModernBERT repository", "Ettin-17M", "h100", 4, 985.0, 96 * 1024, 1024, 0.3,
              out_of_reach=_NARROW),
    Published("Ettin 32M", "ettin README", "ModernBERT repository", "Ettin-32M", "h100", 4, 655.0, 96 * 1024, 1024, 0.3,
              out_of_reach=_NARROW),
    Published("Ettin 68M", "ettin README", "ModernBERT repository", "Ettin-68M", "h100", 4, 463.0, 96 * 1024, 1024, 0.3,
              out_of_reach=_NARROW),
    Published("Ettin 150M", "ettin README", "ModernBERT repository", "ModernBERT-base", "h100", 4, 295.0, 96 * 1024,
              1024, 0.3),
    Published("Ettin 400M", "ettin README", "ModernBERT repository", "Ettin-400M", "h100", 4, 146.0, 48 * 1024, 1024, 0.3),
    Published("Ettin 1B", "ettin README", "ModernBERT repository", "Ettin-1B", "h100", 4, 64.0, 32 * 1024, 1024, 0.3),
    Published("MPT-125M s512", _MPT, "llm-foundry", "MPT-125M", "a100", 8, 165.7, 32 * 2048, 256, 1.0),
    Published("MPT-125M s1024", _MPT, "llm-foundry", "MPT-125M", "a100", 8, 156.0, 32 * 2048, 512, 1.0),
    Published("MPT-125M s2048", _MPT, "llm-foundry", "MPT-125M", "a100", 8, 142.0, 32 * 2048, 1024, 1.0),
    Published("MPT-350M s512", _MPT, "llm-foundry", "MPT-350M", "a100", 8, 69.3, 32 * 1024, 256, 1.0),
    Published("MPT-350M s1024", _MPT, "llm-foundry", "MPT-350M", "a100", 8, 64.8, 32 * 1024, 512, 1.0),
    Published("MPT-760M s512", _MPT, "llm-foundry", "MPT-760M", "h100", 8, 83.7, 32 * 1024, 256, 1.0),
    Published("MPT-1B s512", _MPT, "llm-foundry", "MPT-1B", "h100", 8, 52.3, 32 * 1024, 256, 1.0),
    Published("MPT-3B s512", _MPT, "llm-foundry", "MPT-3B", "h100", 8, 28.0, 16 * 1024, 256, 1.0),
    Published("MPT-125M 8 to 128 A100-40, local batch 26", _MPT, "llm-foundry", "MPT-125M", "a100-40", 128, 91.0,
              26 * 2048, 1024, 1.0, interconnect="ib200", baseline=(8, 1)),
    Published("ESM-2 650M", "bionemo-framework docs", "BioNeMo, Transformer Engine", "ESM-2 650M", "a100", 1, 42.9,
              32 * 1024, 1024),
    Published("ESM-2 650M (chart)", "bionemo-framework docs", "BioNeMo, Transformer Engine", "ESM-2 650M", "h100", 1,
              96.0, 32 * 1024, 1024),
    Published("ESM-2 3B, 8 to 256, weak", "bionemo-framework docs", "BioNeMo, Transformer Engine", "ESM-2 3B", "a100",
              256, 96.85, 16 * 1024, 1024, interconnect="ib200", baseline=(8, 1)),
)  # fmt: skip


def _seconds(run: Published, gpus: int, accumulation: int) -> float:
    cluster = Cluster(find_device(run.device), gpus, 8, find_interconnect(run.interconnect))
    batch = Batch(run.tokens, round(run.tokens * run.scored), run.context)
    sharding = Sharding(1, "bf16", gpus, accumulation, multi_rank_buckets=False)
    return step_time(model(run.model), batch, sharding, cluster, stack=STACKS[run.stack]).total


def predict(run: Published) -> float:
    """The planner's number for a run, in the unit of its value."""
    seconds = _seconds(run, run.gpus, run.accumulation)
    if run.baseline is None:
        return run.accumulation * run.tokens / seconds / 1e3
    gpus, accumulation = run.baseline
    alone = _seconds(run, gpus, accumulation) / accumulation
    return 100 * alone * run.accumulation / seconds


def error(run: Published) -> float:
    """Relative error of the prediction; 0.1 is 10 % too fast."""
    return predict(run) / run.value - 1


def table() -> str:
    """All runs as a Markdown table, and the reasons below it."""
    lines = [
        "| stack | run | devices | published | planned | error |",
        "|---|---|---|---|---|---|",
    ]
    reasons: dict[str, int] = {}
    for run in RUNS:
        unit = "%" if run.baseline is not None else "k"
        note = f" [{reasons.setdefault(run.out_of_reach, len(reasons) + 1)}]" if run.out_of_reach else ""
        lines.append(
            f"| {run.stack} | {run.name} | {run.gpus} {run.device} | {run.value:g} {unit} | {predict(run):.1f} {unit} | "
            f"{error(run):+.1%}{note} |"
        )
    lines += ["", *(f"[{number}] {reason}." for reason, number in reasons.items())]
    return "\n".join(lines)


def render(page: str) -> str:
    """The page with its table renewed."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{table()}\n\n{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

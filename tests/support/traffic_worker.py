"""One rank that counts the bytes its collectives work on in a step, for each ZeRO stage, precision and accumulation.

Started by tests/dist/test_traffic.py. The functions of torch.distributed are wrapped before DeepSpeed is imported, so every call
of DeepSpeed and of dstrain is seen; agreements of a few numbers are told apart by their size and type.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
from torch import Tensor, distributed

AGREEMENT_ELEMENTS = 16
"""Agreements, norms and flags have no more elements, or are integers; the smallest parameter of the counted models has more."""
OPERATIONS = (
    "all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "_all_gather_base", "reduce_scatter",
    "reduce_scatter_tensor", "_reduce_scatter_base", "all_to_all", "all_to_all_single", "gather", "all_reduce_coalesced",
    "all_gather_coalesced",
)  # fmt: skip
VOCABULARY = 211


def count_collectives(sent: Counter[str]) -> None:
    """Wrap what torch.distributed offers; call it before DeepSpeed is imported, which keeps some of the functions."""
    for name in OPERATIONS:
        if hasattr(distributed, name):
            setattr(distributed, name, _counted(name, getattr(distributed, name), sent))


def _counted(name: str, call: Callable[..., Any], sent: Counter[str]) -> Callable[..., Any]:
    kind = name.lstrip("_").replace("_base", "").replace("_into_tensor", "").replace("_tensor", "")

    @functools.wraps(call)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        operands = _operands((*args, *kwargs.values()))
        # The largest argument is the whole of what a collective works on, be it its input or its output.
        size, elements = max(_size(tensors) for tensors in operands)
        is_agreement = elements <= AGREEMENT_ELEMENTS or not operands[0][0].is_floating_point()
        sent["agreement" if is_agreement else kind] += size
        return call(*args, **kwargs)

    return wrapped


def _operands(values: tuple[Any, ...]) -> list[list[Tensor]]:
    lists = [[value] if isinstance(value, Tensor) else value for value in values]
    return [list(v) for v in lists if isinstance(v, (list, tuple)) and v and isinstance(v[0], Tensor)]


def _size(tensors: list[Tensor]) -> tuple[int, int]:
    """(bytes, elements)."""
    return sum(t.numel() * t.element_size() for t in tensors), sum(t.numel() for t in tensors)


def build(control: Any, case: dict[str, Any]) -> Any:
    """An engine as a run builds it; `zero` overrides keys of the JSON that dstrain does not let users set."""
    from dstrain.models.config import ModelConfig
    from dstrain.models.huggingface import build_masked_lm
    from dstrain.objectives.mlm import MlmObjective
    from dstrain.optim.config import OptimizerConfig
    from dstrain.train import ds_config, engine

    def overridden(*args: Any, **kwargs: Any) -> dict[str, Any]:
        config = ds_config.deepspeed_config(*args, **kwargs)
        return {**config, "zero_optimization": {**config["zero_optimization"], **case["zero"]}}

    engine.deepspeed_config = overridden
    torch.manual_seed(1)
    model = build_masked_lm(
        ModelConfig(config=case["model"], pad_vocab_to=1), vocab_size=VOCABULARY, special={"pad_token_id": 0}
    )
    return engine.Engine(
        model, MlmObjective(), config=ds_config.EngineConfig(zero_stage=case["stage"], bucket_elements=case["bucket"]),
        optimizer=OptimizerConfig(), control=control, device="cpu", precision=case["precision"], micro_batch=1,
        accumulation=case["accumulation"], seed=1,
    )  # fmt: skip


def micro_batch(rank: int) -> Any:
    from dstrain.base.protocols import MicroBatch

    tokens = torch.arange(24) % (VOCABULARY - 5) + 5 + rank
    targets = torch.arange(0, 24, 4)
    return MicroBatch(
        tokens=tokens, positions=torch.cat([torch.arange(14), torch.arange(10)]), lengths=(14, 10), targets=targets,
        labels=tokens[targets], num_targets=len(targets), num_tokens=24,
    )  # fmt: skip


def main(out: Path, cases: list[dict[str, Any]]) -> None:
    sent: Counter[str] = Counter()
    count_collectives(sent)
    from dstrain.base.world import world_from_environment
    from dstrain.train.engine import start_processes, stop_processes
    from tests.support.tiny_models import step_data

    torch.set_num_threads(1)
    world = world_from_environment()
    control = start_processes(world, device="cpu", timeout_s=120)
    found = []
    for case in cases:
        built = build(control, case)
        data = step_data([micro_batch(world.rank)] * case["accumulation"])
        for step in range(3):  # the first steps also make state
            sent.clear()
            built.train_step(data, step=step, learning_rate=1e-3)
        found.append({**case, "sent": dict(sent)})
    if world.is_first:
        out.write_text(json.dumps(found), encoding="utf-8")
    stop_processes(world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

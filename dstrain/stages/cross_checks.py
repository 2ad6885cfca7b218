"""What the ranks compare with each other: at the start that they run the same thing, every so often that their weights are
still equal bit for bit and that none of them is slow.

Collective by nature: every rank makes one and calls it at the same steps. Judging is `health.consistency` and
`health.stragglers`; here are only the facts and the moments.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from dstrain.base.config import to_plain
from dstrain.base.control import ControlPlane
from dstrain.base.errors import MachineError
from dstrain.base.logs import get_logger
from dstrain.base.protocols import RunState, StepReport
from dstrain.health.consistency import Divergence, ReplicaCheck, check_agreement, code_fingerprint
from dstrain.health.stragglers import COMMUNICATION, StragglerJudge, balance
from dstrain.monitor.monitor import Monitor
from dstrain.stages.assembly import AnyConfig
from dstrain.stages.environment import package_versions

_LOG = get_logger(__name__)
_VERSIONS = ("torch", "deepspeed", "transformers", "numpy")


def agree_on_start(control: ControlPlane, config: AnyConfig, data: Mapping[str, Any]) -> None:
    """Collective. Refuse to start when ranks differ in configuration, data, code or library versions.

    Args:
        control: agreements between ranks.
        config: of the run.
        data: the loader's state, which pins the data and its order.

    Raises:
        ConfigError: configuration or data differ; MachineError: code or versions do.
    """
    check_agreement(
        control, {"configuration": _digest(to_plain(config)), "data": _digest(dict(data)), **installation()}
    )


def installation() -> dict[str, str]:
    """What must be installed alike on every host: dstrain's code and the libraries that numbers depend on."""
    installed = package_versions()
    return {"code": code_fingerprint(), **{name: installed[name] for name in _VERSIONS}}


def _digest(data: Any) -> str:
    text = json.dumps(data, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tell_mixed_devices(devices: Sequence[str], monitor: Monitor, *, is_first: bool) -> None:
    """Local. Say where ranks compute on devices of different kinds: that works, but neither as fast nor as repeatably as on one.

    Args:
        devices: names, of rank 0, 1, ...
        monitor: is told of them.
        is_first: whether this is rank 0.
    """
    kinds = Counter(devices)
    if len(kinds) == 1 or not is_first:
        return
    named = ", ".join(f"{count} on {kind}" for kind, count in kinds.most_common())
    monitor.event("mixed_devices", devices=dict(kinds))
    _LOG.warning(
        "ranks compute on devices of different kinds (%s): every step takes as long as on the slowest, and a resume repeats the "
        "same bits only where each rank has the same kind again; ask the scheduler for one kind, e.g. --gpus-per-node=h100:8",
        named,
    )


class CrossChecks:
    """An observer that compares ranks; put it before those that write, so that a diverged state is neither told nor saved."""

    def __init__(
        self, config: AnyConfig, control: ControlPlane, *, weights: Callable[[], Iterable[Tensor]], monitor: Monitor,
        hosts: list[str],
    ) -> None:  # fmt: skip
        """Prepare; compares nothing.

        Args:
            config: of the run.
            control: agreements between ranks.
            weights: the parameters that training computes with, in the same order on every rank.
            monitor: is told of stragglers and differences.
            hosts: of rank 0, 1, ...
        """
        self._control, self._monitor = control, monitor
        self.replicas = ReplicaCheck(
            config.consistency, control, parameters=weights, is_partitioned=config.engine.zero_stage == 3
        )
        self._judge = StragglerJudge(config.stragglers, hosts=hosts)
        self._window = config.stragglers.every_steps
        self._parts: dict[str, float] = {}
        self._steps = 0

    def on_step(self, state: RunState, report: StepReport) -> None:
        """Collective. Compare what is due after this step.

        Raises:
            MachineError: weights that should be copies of each other are not.
        """
        if self._control.world.size == 1:
            return
        divergence = self.replicas.after_step(report.step)
        if divergence is not None:
            self._refuse(report.step, divergence)
        self._add(report)
        if self._steps >= self._window:
            self._look_for_stragglers(report.step)

    def on_end(self, state: RunState) -> None:
        """Nothing to close."""

    def _refuse(self, step: int, divergence: Divergence) -> None:
        self._monitor.event("weights_diverged", step=step, ranks=list(divergence.ranks), hosts=list(divergence.hosts))
        raise MachineError(
            f"step {step}: {divergence.describe()}: start again without that host; the run goes on from the last checkpoint "
            "before"
        )

    def _add(self, report: StepReport) -> None:
        data = report.seconds.get("data", 0.0)
        busy = report.seconds.get("forward_backward", 0.0) + report.seconds.get("step", 0.0)
        parts = {"data": data, "compute": report.forward_s, COMMUNICATION: max(0.0, busy - report.forward_s)}
        for name, seconds in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + seconds
        self._steps += 1

    def _look_for_stragglers(self, step: int) -> None:
        means = {name: seconds / self._steps for name, seconds in self._parts.items()}
        self._parts, self._steps = {}, 0
        of_ranks = self._control.gather_json(means)
        self._monitor.ranks(step, balance(of_ranks))
        found = self._judge.judge(of_ranks)
        if found is not None:
            self._monitor.event(
                "straggler", step=step, rank=found.rank, host=found.host, cause=found.cause, score=found.score,
                lost_s=found.lost_s, share=found.share,
            )  # fmt: skip
            if self._control.world.is_first:
                _LOG.warning("%s", found.describe())

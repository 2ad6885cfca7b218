"""Guards: is a step's loss or gradient sound, and if not, is the update left out, the run rolled back, or stopped?

Judged once a step, before the weights change, from numbers that are the same on every rank, without chance or clock, so that
all ranks decide alike and a resumed run decides as the whole one. Only judges: leaving an update out is the engine's work,
going back the stage's. Two jumps of scale that are no faults are known: an overflow under fp16's loss scaling, and the
beginning of another phase of the data.

What others do, and what the defaults come from: PaLM (Chowdhery et al. 2022, section 5.1) met about 20 loss spikes, went
back about 100 steps and stepped over 200 to 500 batches, after which the spike did not come back; OLMo-core's SkipStepOptimizer
leaves out a step whose loss or gradient norm lies 6 deviations above the last 128 steps; llm-foundry calls it a spike when the
loss stays high for several steps. A single high loss is usually one odd batch, and clipping bounds what it does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from dstrain.base.config import Config
from dstrain.health.guard_history import History

Policy = Literal["ignore", "skip", "roll_back", "stop"]
Action = Literal["go_on", "skip", "roll_back", "stop"]
Kind = Literal["non_finite_loss", "non_finite_gradient", "loss_spike", "gradient_outlier"]

_SEVERITY: dict[str, int] = {"go_on": 0, "ignore": 0, "skip": 1, "roll_back": 2, "stop": 3}


class GuardConfig(Config):
    """What is done about losses and gradients that are not finite or far above those before them."""

    non_finite: Policy = "skip"
    """Loss or gradients hold a NaN or an infinity: `skip` leaves the update out, `roll_back` goes back to a checkpoint and
    steps over the data, `stop` ends the run (exit code 79); `ignore` counts as skip, since nothing may be learnt from it."""
    loss_spike: Policy = "roll_back"
    """The loss lies far above the steps before: `skip` acts on each such step; `roll_back` and `stop` when it lasts
    `sustained_steps`; `ignore` only records it."""
    gradient_outlier: Policy = "ignore"
    """The gradient norm lies far above the steps before, as `loss_spike`; clipping bounds its effect, so it is only recorded."""
    sigmas: float = Field(default=6.0, gt=0.0)
    """Robust deviations above the median from which a loss or the logarithm of a gradient norm is an outlier."""
    history_steps: int = Field(default=128, ge=4)
    """Good steps that a new one is compared with."""
    least_history: int = Field(default=64, ge=2)
    """Good steps that must be known before anything is called an outlier."""
    least_deviation: float = Field(default=0.02, gt=0.0)
    """Smallest deviation of the loss, as a share of its median; times `sigmas`, the rise that is never called a spike."""
    least_log_deviation: float = Field(default=0.2, gt=0.0)
    """Smallest deviation of the natural logarithm of the gradient norm."""
    sustained_steps: int = Field(default=5, ge=1)
    """Outliers in a row before `roll_back` or `stop` acts on them."""
    back_steps: int = Field(default=100, ge=0)
    """A roll-back goes to a checkpoint at least this many steps before the trouble began, where there is one."""
    skip_before: int = Field(default=100, ge=0)
    """Steps before the trouble whose data is stepped over after a roll-back."""
    skip_after: int = Field(default=100, ge=0)
    """Steps after the last bad one whose data is stepped over after a roll-back."""
    skips_limit: int = Field(default=25, ge=1)
    """Updates left out in a row before the run stops (loss scaling in fp16 does not count)."""
    roll_backs_limit: int = Field(default=3, ge=0)
    """Roll-backs within `roll_backs_steps` before the run stops instead of another one."""
    roll_backs_steps: int = Field(default=2000, ge=1)
    """Steps within which roll-backs are counted together."""


@dataclass(frozen=True)
class Fault:
    """Something wrong with a step."""

    kind: Kind
    value: float
    """The loss or the gradient norm."""
    usual: float
    """The median it was compared with; 0 where it was not compared."""
    score: float
    """Robust deviations above it; infinite where it is not finite."""


@dataclass(frozen=True)
class RollBack:
    """Where to go back to, and which data to step over. Steps are counted as optimizer steps done before them."""

    onset: int
    """The first step of the trouble; no state after it may be gone back to."""
    before: int
    """The newest state that is wanted: `back_steps` before the onset, at least 0."""
    first: int
    """First step whose data is stepped over (later, if the state gone back to is later)."""
    last: int
    """One past the last one."""


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a step; the same on every rank."""

    step: int
    """Steps done before the judged one."""
    action: Action
    faults: tuple[Fault, ...] = ()
    reason: str = ""
    """In words, for a person; empty for a sound step."""
    roll_back: RollBack | None = None

    def to_json(self) -> dict[str, Any]:
        """For an event."""
        return {
            "action": self.action,
            "reason": self.reason,
            "faults": [{k: v if isinstance(v, str) else _text(v) for k, v in asdict(f).items()} for f in self.faults],
            **({"roll_back": asdict(self.roll_back)} if self.roll_back else {}),
        }


class Guards:
    """Judges steps in order, and remembers what it needs for that in a few numbers."""

    def __init__(
        self, config: GuardConfig, *, loss_scaling: bool = False, phase_of: Callable[[int], int] = lambda step: 0
    ) -> None:
        """Begin without history.

        Args:
            config: the policies.
            loss_scaling: gradients may overflow without fault (fp16).
            phase_of: which phase of the data a step belongs to; losses of two phases are not compared.
        """
        self.config = config
        self._loss_scaling, self._phase_of = loss_scaling, phase_of
        self._losses, self._norms = (
            History(length=config.history_steps, at_least=config.least_history) for _ in range(2)
        )
        self._phase = 0
        self._outliers: dict[str, int] = {"loss_spike": 0, "gradient_outlier": 0}
        self._skips = 0
        self._roll_backs: list[int] = []
        self.verdict = Verdict(-1, "go_on")
        """Of the last step judged."""

    def judge(self, step: int, *, loss: float, gradient_norm: float, overflowed: bool = False) -> Verdict:
        """Judge a step before its update; each step once, in order.

        Args:
            step: steps done before it.
            loss: global mean.
            gradient_norm: global, before clipping; 0 where it is not known.
            overflowed: the engine has found gradients that are not finite and leaves the update out already.
        """
        if self._phase_of(step) != self._phase:
            self._phase = self._phase_of(step)
            self._forget()
        faults = self._faults(loss, gradient_norm, overflowed)
        for kind in self._outliers:
            self._outliers[kind] = self._outliers[kind] + 1 if any(f.kind == kind for f in faults) else 0
        worst = max(faults, key=lambda fault: _SEVERITY[self._action(fault)], default=None)
        action: Action = "go_on" if worst is None else self._action(worst)
        verdict = self._bounded(step, action, tuple(faults), worst, scaling=overflowed and self._loss_scaling)
        if verdict.action == "go_on" and not overflowed:
            self._remember(loss, gradient_norm)
        self.verdict = verdict
        return verdict

    def rolled_back(self, state: Mapping[str, Any]) -> None:
        """The run went back to a checkpoint: judge on from what was known there, but do not forget the roll-back.

        Args:
            state: `state_dict()` as that checkpoint holds it; empty for a fresh start.
        """
        done = self._roll_backs  # holds those of the checkpoint and what came since
        self.load_state_dict(state)
        self._roll_backs = done

    def state_dict(self) -> dict[str, Any]:
        """JSON-able, a few kilobytes."""
        return {
            "losses": self._losses.values(), "log_norms": self._norms.values(), "phase": self._phase,
            "outliers": dict(self._outliers), "skips": self._skips, "roll_backs": list(self._roll_backs),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; an empty one (a checkpoint of before guards) begins without history."""
        self._losses.restore(state.get("losses", []))
        self._norms.restore(state.get("log_norms", []))
        self._phase = int(state.get("phase", 0))
        self._outliers = {kind: int(state.get("outliers", {}).get(kind, 0)) for kind in self._outliers}
        self._skips = int(state.get("skips", 0))
        self._roll_backs = [int(onset) for onset in state.get("roll_backs", [])]

    def _faults(self, loss: float, gradient_norm: float, overflowed: bool) -> list[Fault]:
        faults = []
        if not math.isfinite(loss):
            faults.append(Fault("non_finite_loss", loss, self._losses.middle(), math.inf))
        elif (score := self._losses.score(loss, floor=self._loss_floor())) is not None and score > self.config.sigmas:
            faults.append(Fault("loss_spike", loss, self._losses.middle(), score))
        if overflowed or not math.isfinite(gradient_norm):
            if not self._loss_scaling:
                faults.append(Fault("non_finite_gradient", gradient_norm, math.exp(self._norms.middle()), math.inf))
        elif gradient_norm > 0:
            score = self._norms.score(math.log(gradient_norm), floor=self.config.least_log_deviation)
            if score is not None and score > self.config.sigmas:
                faults.append(Fault("gradient_outlier", gradient_norm, math.exp(self._norms.middle()), score))
        return faults

    def _loss_floor(self) -> float:
        return max(self.config.least_deviation * abs(self._losses.middle()), 1e-6)

    def _action(self, fault: Fault) -> Action:
        """What the policy says about a fault, taken alone."""
        config = self.config
        if fault.kind in self._outliers:
            policy: Policy = config.loss_spike if fault.kind == "loss_spike" else config.gradient_outlier
            if policy == "ignore":
                return "go_on"
            lasting = self._outliers[fault.kind] >= config.sustained_steps
            return policy if policy == "skip" or lasting else "go_on"
        return "skip" if config.non_finite == "ignore" else config.non_finite

    def _bounded(
        self, step: int, action: Action, faults: tuple[Fault, ...], worst: Fault | None, *, scaling: bool
    ) -> Verdict:
        """The action within its limits."""
        self._skips = self._skips + 1 if action == "skip" else self._skips if scaling else 0
        if worst is None:
            return Verdict(step, action)
        reason = describe(worst)
        if action == "skip" and self._skips >= self.config.skips_limit:
            return Verdict(
                step, "stop", faults, f"{self._skips} updates in a row were left out, the last because {reason}"
            )
        if action != "roll_back":
            return Verdict(step, action, faults, reason)
        lately = [onset for onset in self._roll_backs if onset > step - self.config.roll_backs_steps]
        if len(lately) >= self.config.roll_backs_limit:
            return Verdict(step, "stop", faults, f"{reason}, after {len(lately)} roll-backs within "
                                                 f"{self.config.roll_backs_steps} steps")  # fmt: skip
        onset = step - max(0, self._outliers.get(worst.kind, 1) - 1)
        self._roll_backs.append(onset)
        config = self.config
        back = RollBack(
            onset=onset, before=max(0, onset - config.back_steps), first=max(0, onset - config.skip_before),
            last=step + 1 + config.skip_after,
        )  # fmt: skip
        return Verdict(step, action, faults, reason, back)

    def _remember(self, loss: float, gradient_norm: float) -> None:
        """A step that was taken is what later ones are compared with, also where it was high: a level that stays is no spike."""
        self._losses.add(loss)
        if 0 < gradient_norm < math.inf:
            self._norms.add(math.log(gradient_norm))

    def _forget(self) -> None:
        self._losses.clear()
        self._norms.clear()
        self._outliers = dict.fromkeys(self._outliers, 0)


def describe(fault: Fault) -> str:
    """A fault in words."""
    if fault.kind == "non_finite_loss":
        return f"the loss is {fault.value}"
    if fault.kind == "non_finite_gradient":
        return "a gradient is not finite"
    what = "loss" if fault.kind == "loss_spike" else "gradient norm"
    return f"the {what} {fault.value:.4g} lies {fault.score:.1f} deviations above the usual {fault.usual:.4g}"


def _text(number: float) -> float | str:
    """JSON has no words for what is not finite."""
    return number if math.isfinite(number) else str(number)

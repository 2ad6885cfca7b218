"""Where ZeRO keeps the fp32 state: the door to DeepSpeed's internals for saving and loading, stages 0 to 3.

A fragment is a contiguous 1-D range of one parameter's fp32 master weight or of one optimizer moment, as this rank holds
it. Everything here is a view of DeepSpeed's own memory, so loading is `copy_` in place, followed by one `refresh` that makes
the low-precision parameters follow. Tested with DeepSpeed 0.19.8; a missing internal is named with the version found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

from dstrain.base.errors import MachineError
from dstrain.checkpoint.manifest import MASTER, Fragment

Place = tuple[str, int, Tensor, int, int]
"""(name, offset in the flattened parameter, the optimizer's tensor, start in it, elements)."""


class EngineState:
    """The fragments of one DeepSpeed engine with one of dstrain's optimizers."""

    def __init__(self, engine: Any, *, prefix: str) -> None:
        """Look at an engine; creates the moments, at zero, where DeepSpeed would only create them at the first step.

        Args:
            engine: a DeepSpeedEngine with an optimizer.
            prefix: dropped from parameter names.

        Raises:
            MachineError: this DeepSpeed lacks an internal that is needed.
        """
        self._engine = engine
        self._stage = int(engine.zero_optimization_stage())
        self._parameters = {
            name.removeprefix(prefix): p for name, p in engine.module.named_parameters() if p.requires_grad
        }
        self._outer = engine.optimizer
        self._inner = engine.basic_optimizer
        self._groups = list(
            self._inner.param_groups
        )  # DeepSpeed shows its optimizer one of them at a time while it steps
        self._check_internals()
        self._create_moments()

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shape of every trained parameter."""
        return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in self._parameters.items()}

    @property
    def moments(self) -> dict[str, tuple[str, ...]]:
        """Names of the optimizer's state tensors of every trained parameter; the same on every rank."""
        of = {p: tuple(group["moments"]) for parameters, group in self._grouped() for p in parameters}
        return {name: of[p] for name, p in self._parameters.items()}

    def tensors(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """The optimizer's own tensors (partitions, or at stage 0 parameters) and the names of their moments.

        As many on every rank, in the same order.
        """
        if self._stage == 3:
            flat = enumerate(self._outer.fp32_partitioned_groups_flat)
            return [(t, tuple(self._groups[self._outer.sub_group_to_group_id[i]]["moments"])) for i, t in flat]
        return [(t, tuple(group["moments"])) for group in self._groups for t in group["params"]]

    def places(self) -> Iterator[Place]:
        """Where in the optimizer's tensors the masters lie that this rank holds; the moments lie alike."""
        if self._stage == 0:
            return self._replicated()
        return self._stage_3() if self._stage == 3 else self._mapped()

    def held(self) -> Iterator[Fragment]:
        """All this rank holds and must fill when loading."""
        for name, offset, tensor, start, numel in self.places():
            moments = [(key, value) for key, value in self._inner.state[tensor].items() if key != "step"]
            for key, value in [(MASTER, tensor), *moments]:
                yield Fragment(name, key, offset, value.detach().view(-1)[start : start + numel])

    def owned(self, *, rank: int, world_size: int) -> Iterator[Fragment]:
        """What this rank writes: its own fragments, or at stage 0 its balanced share of what all ranks hold."""
        if self._stage != 0:
            yield from self.held()
            return
        for fragment in self.held():
            n = fragment.tensor.numel()
            a, b = rank * n // world_size, (rank + 1) * n // world_size
            if a < b:
                yield Fragment(fragment.name, fragment.state, a, fragment.tensor[a:b])

    @torch.no_grad()
    def refresh(self) -> None:
        """Collective. Make the low-precision parameters follow the masters after a load."""
        if self._stage == 0:
            for group, masters in zip(*self._unfused_groups()):
                for parameter, master in zip(group, masters):
                    parameter.copy_(master)
        elif self._stage == 3:
            # Gathered copies are stale: give them back, copy masters into the partitions as a step does, gather again.
            self._outer.checkpoint_event_prologue()
            for group in range(len(self._outer.fp32_partitioned_groups_flat)):
                self._outer._reassign_or_swap_out_partitioned_parameters(group)
            self._outer.checkpoint_event_epilogue()
        else:
            self._outer.update_lp_params()

    @torch.no_grad()
    def fill_masters(self, weights: Mapping[str, Tensor]) -> None:
        """Collective. Write whole fp32 weights into the masters, which DeepSpeed starts from rounded values in bf16."""
        for fragment in self.held():
            if fragment.state == MASTER:
                n = fragment.tensor.numel()
                fragment.tensor.copy_(weights[fragment.name].reshape(-1)[fragment.offset : fragment.offset + n])
        self.refresh()

    def optimizer_step(self) -> int:
        """How many times the optimizer has stepped; the same for every parameter."""
        return max((int(state["step"]) for state in self._inner.state.values() if "step" in state), default=0)

    def set_optimizer_step(self, step: int) -> None:
        """Write the optimizer's step counter (bias correction depends on it)."""
        for state in self._inner.state.values():
            if "step" in state:
                state["step"].fill_(float(step))

    def loss_scale(self) -> dict[str, float] | None:
        """The dynamic loss scaler of fp16, or None."""
        scaler = getattr(self._outer, "loss_scaler", None)
        if not self._engine.fp16_enabled() or scaler is None:
            return None
        return {key: float(getattr(scaler, key)) for key in _SCALER_FIELDS if hasattr(scaler, key)}

    def set_loss_scale(self, saved: dict[str, float] | None) -> None:
        """Restore the dynamic loss scaler of fp16."""
        scaler = getattr(self._outer, "loss_scaler", None)
        for key, value in (saved or {}).items():
            if scaler is not None and key in _SCALER_FIELDS and hasattr(scaler, key):
                setattr(scaler, key, type(getattr(scaler, key))(value))

    def _replicated(self) -> Iterator[Place]:
        masters = self._stage_0_masters()
        for name, parameter in self._parameters.items():
            yield name, 0, masters[parameter], 0, parameter.numel()

    def _mapped(self) -> Iterator[Place]:
        for name, parameter in self._parameters.items():
            mapping = parameter._hp_mapping
            if mapping is not None:
                tensor, place = self._groups[mapping.param_group_index]["params"][0], mapping.hp_fragment_address
                yield name, int(mapping.lp_fragment_address.start), tensor, int(place.start), int(place.numel)

    def _stage_3(self) -> Iterator[Place]:
        rank = torch.distributed.get_rank()
        for name, parameter in self._parameters.items():
            number, at, size = self._outer.grad_position[self._outer.get_param_id(parameter)]
            start = rank * size
            count = min(size, int(parameter.ds_numel) - start)  # the last partition ends in padding
            if count > 0:
                yield name, start, self._outer.fp32_partitioned_groups_flat[number], at, count

    def _grouped(self) -> list[tuple[list[nn.Parameter], dict[str, Any]]]:
        """The model's own parameters, by optimizer group."""
        if self._stage == 3:
            numbers = self._outer.sub_group_to_group_id
            return [(list(some), self._groups[numbers[i]]) for i, some in enumerate(self._outer.fp16_groups)]
        for name in ("bit16_groups", "bf16_groups", "fp16_groups"):
            if hasattr(self._outer, name):
                return list(zip(getattr(self._outer, name), self._groups))
        return [(group["params"], group) for group in self._groups]

    def _stage_0_masters(self) -> dict[nn.Parameter, Tensor]:
        groups, masters = self._unfused_groups()
        if not groups:
            return {p: p for p in self._parameters.values()}
        return {p: m for group, copies in zip(groups, masters) for p, m in zip(group, copies)}

    def _unfused_groups(self) -> tuple[list[Any], list[Any]]:
        """Low-precision parameters and their fp32 masters at stage 0; empty lists in fp32, where they are the same."""
        return getattr(self._outer, "fp16_groups", []), getattr(self._outer, "fp32_groups", [])

    def _create_moments(self) -> None:
        for tensor, moments in self.tensors():
            state = self._inner.create_state(tensor, moments)
            if self._stage == 0:
                # DeepSpeed's unfused wrapper takes a real first step on zero gradients when it is built; undo its count.
                for value in state.values():
                    value.zero_()
        if self._stage in (1, 2):
            self._outer._lazy_init_hp_params_optimizer_state()

    def _check_internals(self) -> None:
        needs = {
            1: ("update_lp_params", "_lazy_init_hp_params_optimizer_state"),
            2: ("update_lp_params", "_lazy_init_hp_params_optimizer_state"),
            3: (
                "fp32_partitioned_groups_flat", "sub_group_to_group_id", "grad_position", "get_param_id", "fp16_groups",
                "checkpoint_event_prologue", "checkpoint_event_epilogue", "_reassign_or_swap_out_partitioned_parameters",
            ),
        }  # fmt: skip
        missing = [name for name in needs.get(self._stage, ()) if not hasattr(self._outer, name)]
        if self._stage in (1, 2):
            missing += (
                [] if all(hasattr(p, "_hp_mapping") for p in self._parameters.values()) else ["param._hp_mapping"]
            )
        if missing:
            raise MachineError(
                f"DeepSpeed {deepspeed.__version__} at ZeRO stage {self._stage} has no {', '.join(missing)}: "
                "install the version in constraints.txt"
            )


_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")

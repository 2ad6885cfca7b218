"""The optimizer of all kinds that need whole parameters, on tensors that hold only a rank's part of them.

DeepSpeed hands it flat partitions (ZeRO 1 to 3) or the parameters themselves (stage 0); `bind` tells it what lies where. Each
group has a rule; the arithmetic is in `layerwise` and `muon`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from dstrain.base.control import ControlPlane
from dstrain.optim.gates import Gated, Guarded
from dstrain.optim.layerwise import adamw, lamb, stable_adamw
from dstrain.optim.layout import Layout, Piece
from dstrain.optim.muon import muon

Rule = Callable[[list[Tensor], Sequence[Mapping[str, Tensor]], Mapping[str, Any], Layout], None]

RULES: dict[str, Rule] = {"adamw": adamw, "stable_adamw": stable_adamw, "lamb": lamb, "muon": muon}


class FragmentOptimizer(Gated):
    """Updates each group by its rule."""

    layout: Layout | None = None

    def __init__(self, groups: Any) -> None:
        super().__init__(groups, {"lr": 0.0})

    def update(self) -> None:
        """Collective. Before `bind` there is nothing to update (DeepSpeed tries while it is built)."""
        if self.layout is None:
            return
        for group in self.param_groups:
            tensors = [t for t in group["params"] if t.grad is not None]
            if tensors:
                states = [self.create_state(t, group["moments"]) for t in tensors]
                RULES[group["rule"]](tensors, states, group, self.layout)

    def bind(self, layout: Layout) -> None:
        """Say what the tensors are parts of."""
        self.layout = layout


class GuardedFragmentOptimizer(Guarded, FragmentOptimizer):
    """With its own clipping and guard."""


class Fragments(Protocol):
    """Where an engine's parameters lie (`checkpoint.fragments.EngineState`)."""

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of the parameters, in the model's order."""
        ...

    def tensors(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """The optimizer's, as many on every rank; the second of each pair is not used."""
        ...

    def places(self) -> Iterable[tuple[str, int, Tensor, int, int]]:
        """(name, offset in the parameter, optimizer's tensor, start in it, elements) of what this rank holds."""
        ...


def bind_if_needed(optimizer: Gated, fragments: Fragments, control: ControlPlane, *, replicated: bool) -> None:
    """Collective. Tell an optimizer that needs it where whole parameters lie.

    Args:
        optimizer: from `build_optimizer`.
        fragments: of the engine that drives it.
        control: agreements between ranks.
        replicated: every rank holds everything.
    """
    if isinstance(optimizer, FragmentOptimizer):
        optimizer.bind(find_layout(fragments, control, replicated=replicated))


def find_layout(fragments: Fragments, control: ControlPlane, *, replicated: bool) -> Layout:
    """Collective. The layout of all ranks, from what each of them holds."""
    shapes = fragments.shapes
    numbers = {name: number for number, name in enumerate(shapes)}
    tensors = [tensor for tensor, _ in fragments.tensors()]
    order = {tensor: number for number, tensor in enumerate(tensors)}
    pieces: dict[Tensor, list[Piece]] = {tensor: [] for tensor in tensors}
    for name, offset, tensor, start, numel in fragments.places():
        pieces[tensor].append(Piece(numbers[name], offset, start, numel))
    mine = [[order[t], p.parameter, p.offset, p.numel] for t, some in pieces.items() for p in some]
    everyone = control.gather_json(mine)
    members: list[set[int]] = [set() for _ in tensors]
    for rank in everyone:
        for number, parameter, *_ in rank:
            members[number].add(parameter)
    return Layout(
        names=tuple(shapes),
        shapes=tuple(tuple(shape) for shape in shapes.values()),
        pieces={t: tuple(sorted(some, key=lambda p: p.start)) for t, some in pieces.items()},
        members={t: tuple(sorted(members[order[t]])) for t in tensors},
        held=tuple(tuple((parameter, offset, numel) for _, parameter, offset, numel in rank) for rank in everyone),
        rank=control.world.rank,
        replicated=replicated,
    )

"""Muon: the momentum of a matrix, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon; arXiv 2502.16982).

Each matrix is put together on one rank from its parts, orthogonalised there, and the parts of the result are sent to those who
hold the parts of the matrix: one exchange there, one back, the work shared out evenly. So it is right at every ZeRO stage and
world size. A fused query-key-value matrix counts as three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, distributed

from dstrain.optim.layout import Layout, parameters_in

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's quintic: steepest at 0, singular values end between 0.7 and 1.2
_EPS = 1e-7
_BATCH_ELEMENTS = 1 << 26  # matrices of one shape are orthogonalised together, up to this many elements


@dataclass(frozen=True)
class Matrix:
    """A matrix, or some rows of one, as a range of its flattened parameter."""

    parameter: int
    first: int
    rows: int
    columns: int

    @property
    def numel(self) -> int:
        """Elements."""
        return self.rows * self.columns

    @property
    def cost(self) -> int:
        """Of an orthogonalisation, up to a factor."""
        return self.numel * min(self.rows, self.columns)


@dataclass(frozen=True)
class Part:
    """What one rank holds of a matrix."""

    matrix: int
    """Number in the list of matrices."""
    begin: int
    """First element, counted in the matrix."""
    numel: int
    offset: int
    """First element, counted in the parameter."""


@dataclass(frozen=True)
class Exchange:
    """Who orthogonalises what, and who holds what."""

    matrices: tuple[Matrix, ...]
    owners: tuple[int, ...]
    """Of each matrix."""
    parts: tuple[tuple[Part, ...], ...]
    """Of each rank, by matrix."""

    def gathered(self, source: int, owner: int, *, replicated: bool) -> list[Part]:
        """Parts that `source` sends to `owner`; where all hold all, an owner needs nobody."""
        if replicated and source != owner:
            return []
        return [part for part in self.parts[source] if self.owners[part.matrix] == owner]

    def returned(self, owner: int, holder: int) -> list[Part]:
        """Parts of the results that `owner` sends to `holder`."""
        return [part for part in self.parts[holder] if self.owners[part.matrix] == owner]


def muon(tensors: list[Tensor], states: Sequence[Mapping[str, Tensor]], group: Mapping[str, Any], layout: Layout) -> None:  # fmt: skip
    """Collective, in a world of several ranks. One Muon step on what this rank holds of some matrices."""
    looks = []
    for tensor, state in zip(tensors, states):
        assert tensor.grad is not None
        state["step"].add_(1)
        momentum = state["momentum_buffer"]
        momentum.lerp_(tensor.grad, 1 - group["momentum"])
        looks.append(tensor.grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum)
    chosen, split_qkv = parameters_in(tensors, layout), group["split_qkv"]
    plan = layout.once(("muon", chosen), lambda: plan_exchange(layout, chosen, split_qkv=split_qkv))
    dtype = torch.bfloat16 if tensors[0].is_cuda else torch.float32  # Jordan's on GPUs; CPUs are slow at it
    whole = _gather(plan, looks, tensors, layout, dtype)
    results = orthogonalised(whole, steps=group["newton_schulz_steps"])
    found = _return(plan, results, tensors, layout, dtype)
    for tensor in tensors:
        tensor.mul_(1 - group["lr"] * group["weight_decay"])
    for part, values, target in found:
        matrix = plan.matrices[part.matrix]
        target.add_(values, alpha=-group["lr"] * update_scale(group["scale"], matrix.rows, matrix.columns))


def update_scale(scale: str, rows: int, columns: int) -> float:
    """Factor on an orthogonal update: arXiv 2502.16982 equation 4, or Jordan's."""
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def orthogonalised(matrices: Mapping[int, Tensor], *, steps: int) -> dict[int, Tensor]:
    """Nearly orthogonal matrices with the same singular vectors, by Newton-Schulz.

    Args:
        matrices: (r, c) each, by number.
        steps: iterations.
    """

    def kind(number: int) -> tuple[int, ...]:
        return tuple(matrices[number].shape)

    done: dict[int, Tensor] = {}
    for shape, same in groupby(sorted(matrices, key=lambda n: (kind(n), n)), key=kind):
        numbers = list(same)
        size = max(1, _BATCH_ELEMENTS // max(1, shape[0] * shape[1]))
        for at in range(0, len(numbers), size):
            some = numbers[at : at + size]
            done.update(zip(some, newton_schulz(torch.stack([matrices[n] for n in some]), steps=steps)))
    return done


def newton_schulz(batch: Tensor, *, steps: int) -> Tensor:
    """(n, r, c) matrices with their singular values moved to about 1, in the dtype given."""
    a, b, c = _COEFFICIENTS
    tall = batch.shape[1] > batch.shape[2]
    x = batch.transpose(1, 2) if tall else batch
    x = x / x.flatten(1).norm(dim=1).clamp(min=_EPS)[:, None, None]
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


def plan_exchange(layout: Layout, parameters: Sequence[int], *, split_qkv: bool) -> Exchange:
    """Who does what; the same on every rank."""
    matrices = tuple(
        m for p in parameters for m in matrices_of(layout.names[p], layout.shapes[p], p, split_qkv=split_qkv)
    )
    loads = [0] * layout.world_size
    owners = [0] * len(matrices)
    for number in sorted(range(len(matrices)), key=lambda n: (-matrices[n].cost, n)):
        owners[number] = min(range(layout.world_size), key=lambda rank: (loads[rank], rank))
        loads[owners[number]] += matrices[number].cost
    parts = tuple(tuple(_parts(matrices, held)) for held in layout.held)
    return Exchange(matrices, tuple(owners), parts)


def matrices_of(name: str, shape: Sequence[int], parameter: int, *, split_qkv: bool) -> list[Matrix]:
    """A parameter as the matrices that are orthogonalised: itself, or its query, key and value."""
    rows, columns = shape
    fused = split_qkv and rows == 3 * columns and name.removesuffix(".weight").lower().endswith("qkv")
    each = rows // 3 if fused else rows
    return [Matrix(parameter, at * columns, each, columns) for at in range(0, rows, each)]


def _parts(matrices: Sequence[Matrix], held: Sequence[tuple[int, int, int]]) -> list[Part]:
    found = []
    ranges: dict[int, list[tuple[int, int]]] = {}
    for parameter, offset, numel in held:
        ranges.setdefault(parameter, []).append((offset, offset + numel))
    for number, matrix in enumerate(matrices):
        for first, last in ranges.get(matrix.parameter, ()):
            begin, end = max(first, matrix.first), min(last, matrix.first + matrix.numel)
            if begin < end:
                found.append(Part(number, begin - matrix.first, end - begin, begin))
    return found


def _gather(
    plan: Exchange, looks: Sequence[Tensor], tensors: Sequence[Tensor], layout: Layout, dtype: torch.dtype
) -> dict[int, Tensor]:  # fmt: skip
    """Collective. The matrices that this rank orthogonalises, put together."""
    views = _views(plan, looks, tensors, layout)
    ranks = range(layout.world_size)
    sends = [plan.gathered(layout.rank, to, replicated=layout.replicated) for to in ranks]
    receives = [plan.gathered(source, layout.rank, replicated=layout.replicated) for source in ranks]
    chosen = [views[part].to(dtype) for parts in sends for part in parts]
    received = _swap(chosen, sends, receives, like=tensors[0], dtype=dtype)
    whole = {
        number: torch.zeros(plan.matrices[number].numel, dtype=dtype, device=tensors[0].device)
        for number, owner in enumerate(plan.owners)
        if owner == layout.rank
    }
    for part, values in zip([part for parts in receives for part in parts], received):
        whole[part.matrix][part.begin : part.begin + part.numel] = values
    return {n: flat.view(plan.matrices[n].rows, plan.matrices[n].columns) for n, flat in whole.items()}


def _return(
    plan: Exchange, results: Mapping[int, Tensor], tensors: Sequence[Tensor], layout: Layout, dtype: torch.dtype
) -> list[tuple[Part, Tensor, Tensor]]:  # fmt: skip
    """Collective. For each part that this rank holds: the part, its update, and where it belongs."""
    views = _views(plan, tensors, tensors, layout)
    ranks = range(layout.world_size)
    sends = [plan.returned(layout.rank, holder) for holder in ranks]
    receives = [plan.returned(owner, layout.rank) for owner in ranks]
    flat = {number: result.reshape(-1) for number, result in results.items()}
    chosen = [flat[p.matrix][p.begin : p.begin + p.numel] for parts in sends for p in parts]
    received = _swap(chosen, sends, receives, like=tensors[0], dtype=dtype)
    parts = [part for some in receives for part in some]
    return [(part, values.to(views[part].dtype), views[part]) for part, values in zip(parts, received)]


def _views(plan: Exchange, values: Sequence[Tensor], tensors: Sequence[Tensor], layout: Layout) -> dict[Part, Tensor]:
    """The stretch of this rank's values that each of its parts is."""
    where = {}
    for value, tensor in zip(values, tensors):
        for piece in layout.pieces[tensor]:
            where[piece.parameter] = piece, value.view(-1)
    found = {}
    for part in plan.parts[layout.rank]:
        piece, flat = where[plan.matrices[part.matrix].parameter]
        at = piece.start + part.offset - piece.offset
        found[part] = flat[at : at + part.numel]
    return found


def _swap(
    chosen: Sequence[Tensor], sends: Sequence[Sequence[Part]], receives: Sequence[Sequence[Part]], *, like: Tensor,
    dtype: torch.dtype,
) -> Sequence[Tensor]:  # fmt: skip
    """Collective. Exchange parts of all ranks at once."""
    if len(sends) == 1:
        return chosen
    out = torch.cat(list(chosen)) if chosen else torch.empty(0, dtype=dtype, device=like.device)
    into = torch.empty(sum(p.numel for parts in receives for p in parts), dtype=dtype, device=like.device)
    distributed.all_to_all_single(
        into, out, [sum(p.numel for p in parts) for parts in receives], [sum(p.numel for p in parts) for parts in sends]
    )  # fmt: skip
    return torch.split(into, [p.numel for parts in receives for p in parts])

"""One sum for all: what a rank brings comes back added up, and whoever has nothing is heard by everyone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.control import ControlPlane
from dstrain.base.errors import DataError, MachineError
from dstrain.base.protocols import Interrupted, StepData, StepFlags
from dstrain.base.world import World
from dstrain.train.agreement import AnyData, agree
from tests.support.tiny_models import documents, packed


class Peers(ControlPlane):
    """Rank 0 of several ranks, the others' numbers given."""

    def __init__(self, others: Sequence[Sequence[int]]) -> None:
        super().__init__(World())
        self.world = World(rank=0, size=1 + len(others))
        self._others = others

    def sum(self, numbers: Sequence[int]) -> list[int]:
        return [sum(column) for column in zip(numbers, *self._others)]


class Listening(ControlPlane):
    """Keeps what a rank would send."""

    def sum(self, numbers: Sequence[int]) -> list[int]:
        self.sent = list(numbers)
        return super().sum(numbers)


def sent(data: AnyData, flags: StepFlags = StepFlags(), *, left_out: bool = False) -> list[int]:  # noqa: B008
    control = Listening(World())
    try:
        agree(control, data, flags, left_out=left_out)
    except (DataError, Interrupted):
        pass
    return control.sent


def share(**fields: Any) -> StepData:
    batch = packed(documents((5, 4)), targets=torch.tensor([0, 6]))
    return StepData([batch], **{"num_rows": 3, "padded_tokens": 48, "ledger": 7, "epoch": 0.5, **fields})


def test_counts_of_all_ranks_are_added() -> None:
    agreed = agree(Peers([sent(share()), sent(share(num_rows=2))]), share(), StepFlags(), left_out=False)
    assert (agreed.num_rows, agreed.padded_tokens, agreed.ledger) == (8, 144, 21)
    assert (agreed.num_targets, agreed.num_tokens) == (6, 27)


@given(st.lists(st.integers(0, (1 << 63) - 1), min_size=1, max_size=5))
def test_ledgers_add_up_modulo_2_to_the_63(ledgers: list[int]) -> None:
    mine, *others = ledgers
    agreed = agree(Peers([sent(share(ledger=n)) for n in others]), share(ledger=mine), StepFlags(), left_out=False)
    assert agreed.ledger == sum(ledgers) % (1 << 63)


@given(st.lists(st.tuples(*[st.booleans()] * 4), min_size=1, max_size=4))
def test_a_flag_of_any_rank_is_a_flag_of_all_and_flags_are_not_mixed_up(asked: list[tuple[bool, ...]]) -> None:
    mine, *others = (StepFlags(*flags) for flags in asked)
    agreed = agree(Peers([sent(share(), flags) for flags in others]), share(), mine, left_out=False)
    assert agreed.flags == StepFlags(*map(any, zip(*asked)))


def test_a_rank_that_will_not_wait_takes_all_with_it() -> None:
    with pytest.raises(Interrupted):
        agree(Peers([sent(Interrupted())]), share(), StepFlags(), left_out=False)


def test_a_data_fault_is_the_ranks_own() -> None:
    with pytest.raises(DataError, match="shard 3"):
        agree(ControlPlane(World()), DataError("shard 3 is damaged"), StepFlags(), left_out=False)


@pytest.mark.parametrize(("mine", "others"), [(True, [False, False]), (False, [False, True])])
def test_ranks_that_judged_a_step_differently_are_found_at_the_next(mine: bool, others: list[bool]) -> None:
    with pytest.raises(MachineError, match="1 of 3 ranks left out the last update"):
        agree(Peers([sent(share(), left_out=out) for out in others]), share(), StepFlags(), left_out=mine)


def test_ranks_that_judged_alike_go_on() -> None:
    for out in (True, False):
        agree(Peers([sent(share(), left_out=out)] * 2), share(), StepFlags(), left_out=out)

import dataclasses
import random
import socket

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError, MachineError
from dstrain.base.world import World
from dstrain.health import consistency as module
from dstrain.health.consistency import (
    ConsistencyConfig,
    ReplicaCheck,
    check_agreement,
    code_fingerprint,
    compare,
    weights_fingerprint,
)

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HOST = socket.gethostname()


class Others:
    """A control plane on which the other ranks' answers are known."""

    def __init__(self, *others):
        self.others = others
        self.world = World(size=1 + len(others))
        self.asked = 0

    def gather_json(self, value):
        self.asked += 1
        return [value, *self.others]


def weights(*, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    # One is larger than a chunk, one empty, one a scalar.
    shapes = [(70_000,), (0,), (), (33, 7), (5, 3, 2)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def flip(tensors, draw):
    """Flip one random bit in place; gives a function that flips it back."""
    tensor = draw.choice([t for t in tensors if t.numel()])
    raw = tensor.view(-1).view(torch.uint8)
    place, bit = draw.randrange(len(raw)), 1 << draw.randrange(8)

    def toggle():
        raw[place] ^= bit

    toggle()
    return toggle


@pytest.mark.parametrize("dtype", TYPES)
def test_a_thousand_flips_of_one_bit_are_all_found(dtype):
    draw = random.Random(1)
    tensors = weights(dtype=dtype)
    clean = weights_fingerprint(tensors)
    for _ in range(1000 // len(TYPES)):
        back = flip(tensors, draw)
        assert weights_fingerprint(tensors) != clean
        back()
    assert weights_fingerprint(tensors) == clean


@pytest.mark.parametrize("dtype", TYPES)
def test_every_bit_of_a_number_counts_at_every_place(dtype):
    tensors = [torch.zeros(3, dtype=dtype), torch.ones(2, dtype=dtype)]
    clean = weights_fingerprint(tensors)
    for tensor in tensors:
        raw = tensor.view(torch.uint8)
        for place in range(len(raw)):
            for bit in range(8):
                raw[place] ^= 1 << bit
                assert weights_fingerprint(tensors) != clean
                raw[place] ^= 1 << bit
    assert weights_fingerprint(tensors) == clean


def test_ten_thousand_clean_checks_raise_no_alarm():
    draw = random.Random(2)
    for _ in range(10_000):
        tensors = [torch.randn(draw.randrange(1, 50)) for _ in range(2)]
        mine = weights_fingerprint(tensors)
        assert compare(Others([weights_fingerprint([t.clone() for t in tensors]), HOST]), mine) is None


def test_order_places_and_sizes_count():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    base = weights_fingerprint([one, two])
    assert 0 <= base < 1 << 64
    assert weights_fingerprint([two, one]) != base
    assert weights_fingerprint([one.flip(0), two]) != base
    swapped = weights()
    swapped[0][[0, 69_999]] = swapped[0][[69_999, 0]]
    assert weights_fingerprint(swapped) != weights_fingerprint(weights())


def test_bits_are_compared_and_not_values():
    assert weights_fingerprint([torch.tensor([0.0])]) != weights_fingerprint([torch.tensor([-0.0])])
    nan = torch.tensor([float("nan")])
    assert weights_fingerprint([nan]) == weights_fingerprint([nan.clone()])
    other = nan.clone()
    other.view(torch.int32)[0] ^= 1
    assert weights_fingerprint([other]) != weights_fingerprint([nan])


def test_layout_in_memory_does_not_count():
    tensor = torch.randn(30, 20)
    assert weights_fingerprint([tensor.t().contiguous().t()]) == weights_fingerprint([tensor])
    parameter = torch.nn.Parameter(tensor.clone())
    assert weights_fingerprint([parameter]) == weights_fingerprint([tensor])
    assert weights_fingerprint([]) == 0


@given(st.integers(0, 1 << 40))
def test_every_chunks_number_is_odd_and_fits(place):
    odd = module._odd(place)
    assert odd % 2 == 1
    assert -(1 << 63) <= odd < 1 << 63
    assert odd != module._odd(place + 1)


def test_the_rank_outside_the_majority_is_named_with_its_host():
    found = compare(Others([7, "a"], [9, "b"], [7, "c"]), 7)
    assert (found.ranks, found.hosts, found.majority) == ((2,), ("b",), 7)
    assert "rank 2 on b" in found.describe()


def test_this_rank_may_be_the_one():
    found = compare(Others([7, "a"], [7, "b"]), 1)
    assert (found.ranks, found.hosts) == ((0,), (HOST,))


@pytest.mark.parametrize("others", [[[8, "a"]], [[7, "a"], [8, "b"], [8, "c"]], [[8, "a"], [9, "b"]]])
def test_without_a_majority_nobody_is_accused(others):
    found = compare(Others(*others), 7)
    assert found.majority is None
    assert found.ranks == tuple(range(1 + len(others)))
    assert "no majority says whose are right" in found.describe()


def check(control, *, every=100, is_partitioned=False, tensors=None):
    return ReplicaCheck(
        ConsistencyConfig(check_every=every), control, parameters=lambda: tensors or weights(), is_partitioned=is_partitioned
    )  # fmt: skip


def test_weights_are_compared_when_it_is_due_and_only_then():
    control = Others([weights_fingerprint(weights()), "a"])
    checked = check(control)
    assert [step for step in range(1, 301) if checked.is_due(step)] == [100, 200, 300]
    assert [checked.after_step(step) for step in (99, 100, 101)] == [None, None, None]
    assert control.asked == 1
    assert checked.not_applicable is None


def test_a_flipped_bit_is_found_at_the_next_check():
    control = Others([weights_fingerprint(weights()), "a"])
    tensors = weights()
    flip(tensors, random.Random(3))
    assert check(control, tensors=tensors).after_step(200).ranks == (0, 1)


@pytest.mark.parametrize(
    ("control", "changes", "why"),
    [
        (Others(), {}, "single rank"),
        (Others([1, "a"]), {"is_partitioned": True}, "ZeRO 3"),
        (Others([1, "a"]), {"every": None}, None),
    ],
)
def test_where_there_is_nothing_to_compare_nothing_is_asked(control, changes, why):
    checked = check(control, **changes)
    assert checked.after_step(100) is None
    assert control.asked == 0
    assert (why is None) == (checked.not_applicable is None)
    assert why is None or why in checked.not_applicable


def other(host="b", **facts):
    return {"host": host, "facts": {"config": "c1", "code": "1+a", "data": "d", **facts}}


MINE = {"config": "c1", "code": "1+a", "data": "d"}


def test_ranks_that_agree_may_start():
    check_agreement(Others(other(), other(host="c")), MINE)
    check_agreement(Others(), MINE)


@pytest.mark.parametrize(
    ("name", "kind", "code"), [("config", ConfigError, 78), ("data", ConfigError, 78), ("code", MachineError, 77)]
)
def test_what_differs_is_named_with_ranks_hosts_and_both_values(name, kind, code):
    with pytest.raises(kind) as caught:
        check_agreement(Others(other(**{name: "x9"}), other()), MINE)
    message = str(caught.value)
    assert f"the ranks do not agree on {name}: '{MINE[name]}' on ranks 0, 2" in message
    assert "'x9' on rank 1 (b)" in message
    assert HOST in message
    assert caught.value.exit_code == code


def test_a_fact_that_one_rank_does_not_give_differs():
    with pytest.raises(ConfigError, match=r"'\(not given\)' on rank 0"):
        check_agreement(Others(other(extra="1")), MINE)


def test_all_ranks_raise_alike():
    answers = []
    everybody = [
        {"host": f"n{r}", "facts": {**MINE, "config": "c2" if r == 1 else "c1", "torch": str(r)}} for r in range(3)
    ]
    for rank in range(3):
        control = Others()
        control.gather_json = lambda _value: everybody
        with pytest.raises(ConfigError) as caught:
            check_agreement(control, everybody[rank]["facts"])
        answers.append(str(caught.value))
    assert len(set(answers)) == 1
    assert "config" in answers[0]  # before the machine's fault


def test_the_codes_fingerprint_changes_with_the_code(tmp_path, monkeypatch):
    room = tmp_path / "dstrain" / "health"
    room.mkdir(parents=True)
    (room / "consistency.py").write_text("a = 1\n")
    monkeypatch.setattr(module, "__file__", str(room / "consistency.py"))
    first = code_fingerprint()
    assert code_fingerprint() == first
    (room / "consistency.py").write_text("a = 2\n")
    second = code_fingerprint()
    (room / "more.py").write_text("")
    assert len({first, second, code_fingerprint()}) == 3
    assert first.split("+")[0] == code_fingerprint().split("+")[0]


def test_a_divergence_is_data():
    found = compare(Others([7, "a"], [9, "b"]), 7)
    assert dataclasses.asdict(found) == {"ranks": (2,), "majority": 7, "hosts": ("b",)}

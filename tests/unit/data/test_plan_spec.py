"""The whole plan as a `data:` section makes it: mixtures, phases, tails, skipped steps and rows, eras, worlds."""

import json
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.base.config import validate
from dstrain.base.errors import ConfigError
from dstrain.data.config import DataConfig
from dstrain.data.plan import rank_slots
from dstrain.data.plan_spec import check_repeats, plan_spec, planned_tokens, step_of_tokens
from dstrain.data.timeline import Phase

NAMES = ["books", "code", "wiki"]


def validated(data):
    return validate(DataConfig, data, source="run.yaml")


def spec_of(rows, *, global_batch=12, seed=3, **data):
    weights = data.pop("weights", {name: 1.0 for name in rows})
    sources = [{"name": name, "path": name, "weight": weights[name]} for name in rows]
    config = validated({"sources": sources, "window_rows": 5, **data})
    return plan_spec(
        config, {name: np.array(counts) for name, counts in rows.items()}, global_batch=global_batch, seed=seed
    )


def steps_of(plan, first, last):
    """(source, epoch, block, row) of each slot, a list for each step."""
    found = []
    for step in range(first, last):
        planned = plan.slots(step, 0, plan.global_batch(step))
        columns = (planned.source, planned.epoch, planned.block, planned.row)
        found.append(list(zip(*(column.tolist() for column in columns))))
    return found


@st.composite
def specs(draw):
    lanes = draw(st.integers(1, 4))
    batch = st.integers(1, 4).map(lambda n: n * lanes)
    names = NAMES[: draw(st.integers(1, 3))]
    rows = {name: draw(st.lists(st.integers(1, 9), min_size=2, max_size=8)) for name in names}
    global_batch = draw(batch)
    counted = {name: max(sum(counts), 1) for name, counts in rows.items()}
    weight = st.sampled_from([0.0, 0.1, 1.0, 3.0])
    weights = {name: draw(weight) for name in names}
    weights[names[0]] = 1.0
    phases = []
    for start in sorted(draw(st.sets(st.integers(1, 25), max_size=2))):
        again = {name: draw(weight) for name in names} | {names[-1]: 2.0}
        phases.append({"from_step": start, "weights": again, "global_batch": draw(batch)})
    if min(counted.values()) < lanes or sum(counted.values()) < max(
        [global_batch, *(p["global_batch"] for p in phases)]
    ):
        lanes = 1
    batches = [global_batch, *(p["global_batch"] for p in phases)]
    if sum(counted.values()) < max(batches):
        rows[names[0]] = [*rows[names[0]], max(batches)]
    skip = [
        (first, first + n) for first, n in draw(st.lists(st.tuples(st.integers(0, 25), st.integers(1, 4)), max_size=2))
    ]
    return spec_of(
        rows, global_batch=global_batch, weights=weights, phases=phases, lanes=lanes, skip_steps=skip,
        tail=draw(st.sampled_from(["rotate", "exact"])), seed=draw(st.integers(0, 2**40)),
    )  # fmt: skip


# --- exactly once, any world, any moment --------------------------------------------------------------------------


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(specs())
def test_no_row_comes_twice_in_an_epoch_and_finished_epochs_lack_only_the_tail(spec):
    plan = spec.build()
    seen = Counter(row for step in steps_of(plan, 0, 40) for row in step if row[2] >= 0)
    assert set(seen.values()) <= {1}
    taken = plan.source_turns(40).min(axis=0)
    skipped = {number: set(plan._skipped[number].numbers.tolist()) for number in range(len(plan.orders))}
    for number, order in enumerate(plan.orders):
        for epoch in range(int(taken[number]) // order.turns_per_epoch):
            rows = {row[2:] for row in seen if row[:2] == (number, epoch)}
            missing = order.rows_per_epoch - len(rows)
            assert missing == 0 or 0 < missing <= len(skipped[number]), (number, epoch)


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(specs(), st.integers(0, 40), st.integers(1, 40))
def test_any_world_sees_the_same_global_batch(spec, step, size):
    plan = spec.build()
    [whole] = steps_of(plan, step, step + 1)
    joined = []
    for rank in range(size):
        first, last = rank_slots(plan.global_batch(step), rank=rank, world_size=size)
        part = plan.slots(step, first, last)
        joined += list(zip(part.source.tolist(), part.epoch.tolist(), part.block.tolist(), part.row.tolist()))
    assert joined == whole


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(specs(), st.lists(st.integers(0, 60), min_size=1, max_size=5))
def test_a_plan_built_anew_gives_the_same_steps_in_any_order_of_asking(spec, steps):
    one, other = spec.build(), spec.build()
    expected = [steps_of(one, step, step + 1) for step in steps]
    assert [steps_of(other, step, step + 1) for step in reversed(steps)] == expected[::-1]


# --- mixing ---------------------------------------------------------------------------------------------------------


def rows_by_lane(spec, name, steps):
    """The rows of a source in the order in which each lane took them."""
    plan, found = spec.build(), defaultdict(list)
    number = spec.names.index(name)
    for step in range(steps):
        batch = plan.global_batch(step)
        for slot, row in enumerate(steps_of(plan, step, step + 1)[0]):
            if row[0] == number:
                found[slot // (batch // plan.lanes)].append(row[1:])
    return found


def test_another_source_or_weight_reorders_no_source():
    rows = {"books": [5] * 30, "wiki": [7] * 20}
    alone = rows_by_lane(spec_of({"wiki": rows["wiki"]}, lanes=4), "wiki", 60)
    for spec in (
        spec_of(rows, lanes=4), spec_of(rows, lanes=4, weights={"books": 5.0, "wiki": 1.0}),
        spec_of(rows | {"code": [3] * 50}, lanes=4), spec_of(rows, lanes=4, weights={"books": 0.0, "wiki": 1.0}),
        spec_of(rows, lanes=4, phases=[{"from_step": 9, "weights": {"books": 1.0, "wiki": 9.0}, "global_batch": 24}]),
    ):  # fmt: skip
        mixed = rows_by_lane(spec, "wiki", 60)
        for lane in range(4):
            together = min(len(mixed[lane]), len(alone[lane]))
            assert together > 10
            assert mixed[lane][:together] == alone[lane][:together]


def test_counts_follow_the_weights_and_their_phases_exactly():
    weights = {"books": 0.5, "code": 0.3, "wiki": 0.2}
    later = {"from_step": 20, "weights": {"books": 0.0, "code": 1.0, "wiki": 1.0}}
    spec = spec_of({name: [50] * 10 for name in NAMES}, weights=weights, phases=[later], global_batch=10, lanes=5)
    plan = spec.build()
    counts = [Counter(row[0] for row in step) for step in steps_of(plan, 0, 40)]
    first, second = sum(counts[:20], Counter()), sum(counts[20:], Counter())
    assert [first[i] for i in range(3)] == [100, 60, 40]
    assert [second[i] for i in range(3)] == [0, 100, 100]


def test_a_small_source_wraps_on_its_own():
    spec = spec_of({"books": [4] * 100, "wiki": [4, 4]}, lanes=4, global_batch=8)
    plan = spec.build()
    seen = Counter((row[0], row[1]) for step in steps_of(plan, 0, 50) for row in step)
    assert seen[(1, 0)] == seen[(1, 24)] == 8
    assert {epoch for source, epoch in seen if source == 0} == {0}
    assert plan.epochs(50) == [0.5, 25.0]


def test_epochs_instead_of_weights_give_each_source_its_share():
    config = validated(
        {"sources": [{"name": "a", "path": "a", "epochs": 1.0}, {"name": "b", "path": "b", "epochs": 3.0}]}
    )
    spec = plan_spec(config, {"a": np.array([60]), "b": np.array([20])}, global_batch=4, seed=0)
    assert spec.phases[0].shares == (1, 1)


def test_more_epochs_than_allowed_are_refused_with_the_number():
    sources = [{"name": "a", "path": "a", "weight": 1.0}, {"name": "b", "path": "b", "weight": 1.0, "max_epochs": 2}]
    config = validated({"sources": sources})
    spec = plan_spec(config, {"a": np.array([64]), "b": np.array([16])}, global_batch=4, seed=0)
    assert check_repeats(config, spec, max_steps=16) == {"a": 0.5, "b": 2.0}
    with pytest.raises(ConfigError, match=r"source.* 'b': 17 steps take 2\.12 epochs of it, max_epochs is 2"):
        check_repeats(config, spec, max_steps=17)


def test_weights_that_add_up_to_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"data\.sources: the weights of 'a', 'b' add up to 0"):
        spec_of({"a": [9], "b": [9]}, weights={"a": 0.0, "b": 0.0}, global_batch=4)
    with pytest.raises(ConfigError, match=r"data\.phases from_step=4: the weights of 'a', 'b' add up to 0"):
        spec_of({"a": [9], "b": [9]}, phases=[{"from_step": 4, "weights": {"a": 0.0, "b": 0.0}}], global_batch=4)


def test_an_empty_source_is_refused_by_name():
    with pytest.raises(ConfigError, match="source 'b' has no rows"):
        spec_of({"a": [9], "b": [0, 0]}, global_batch=4)


def test_fewer_blocks_than_lanes_lose_nothing():
    plan = spec_of({"a": [40, 24]}, lanes=8, global_batch=8).build()
    rows = {row[2:] for step in steps_of(plan, 0, 8) for row in step}
    assert len(rows) == 64


# --- stepping over --------------------------------------------------------------------------------------------------


def test_steps_stepped_over_are_never_trained_on_and_nothing_else_moves():
    rows = {"a": [6] * 20}
    plain = spec_of(rows, lanes=4, global_batch=8).build()
    skipping = spec_of(rows, lanes=4, global_batch=8, skip_steps=[(5, 8)]).build()
    assert steps_of(skipping, 0, 5) == steps_of(plain, 0, 5)
    assert steps_of(skipping, 5, 12) == steps_of(plain, 8, 15)
    gone = {row[2:] for step in steps_of(plain, 5, 8) for row in step}
    later = [row[2:] for step in steps_of(skipping, 5, 200) for row in step]
    assert not gone & set(later)
    assert (-1, -1) in later  # their turns in later epochs are empty
    assert len(gone) == 24


def test_rows_named_are_never_trained_on_from_their_step_on():
    rows = {"a": [6] * 8}
    plain = spec_of(rows, lanes=4, global_batch=8).build()
    named = [list(row[2:]) for row in steps_of(plain, 3, 4)[0][:3]]
    spec = spec_of(rows, lanes=4, global_batch=8, skip_rows=[{"source": "a", "from_step": 4, "rows": named}])
    assert steps_of(spec.build(), 0, 4) == steps_of(plain, 0, 4)
    pairs = {tuple(pair) for pair in named}
    for old, new in zip(steps_of(plain, 4, 40), steps_of(spec.build(), 4, 40)):
        assert new == [(*row[:2], -1, -1) if row[2:] in pairs else row for row in old]


def test_a_row_that_does_not_exist_is_refused():
    with pytest.raises(ConfigError, match=r"data\.skip_rows: source 'a' has no block 2 with a row 0"):
        spec_of({"a": [6, 6]}, global_batch=4, skip_rows=[{"source": "a", "rows": [[0, 5], [2, 0]]}]).build()


# --- eras -----------------------------------------------------------------------------------------------------------


def test_a_new_era_begins_its_data_at_its_origin_in_an_order_of_its_own():
    spec = spec_of({"a": [6] * 20}, lanes=4, global_batch=8)
    old, new = spec.build(), spec.build(origin=7, era=1)
    rows = [row for step in steps_of(new, 7, 7 + 15) for row in step]
    assert len(set(rows)) == 120
    assert {row[1] for row in rows} == {0}
    assert steps_of(new, 7, 9) != steps_of(old, 0, 2)


# --- what never changes ---------------------------------------------------------------------------------------------


def test_known_steps_of_a_mixture_never_change(repository):
    # A change here needs a new PLAN_VERSION: it would give every running job another order.
    later = {"from_step": 4, "weights": {"books": 1.0, "wiki": 4.0}, "global_batch": 8}
    plan = spec_of({"books": [5, 3, 9], "wiki": [4, 8]}, lanes=4, global_batch=4, phases=[later], seed=1).build()
    found = [(s, e, b, r) for step in (0, 3, 5, 1000) for s, e, b, r in steps_of(plan, step, step + 1)[0]]
    assert found == [tuple(row) for row in json.loads((repository / "tests/golden/plan.json").read_text())["mixture"]]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(specs(), st.integers(0, 30), st.integers(1, 20), st.integers(1, 7), st.data())
def test_many_steps_at_once_are_the_steps_one_by_one(spec, first, count, size, data):
    plan, rank = spec.build(), data.draw(st.integers(0, size - 1))
    together = plan.shares(first, first + count, rank=rank, world_size=size)
    for step, found in zip(range(first, first + count), together, strict=True):
        alone = plan.slots(step, *rank_slots(plan.global_batch(step), rank=rank, world_size=size))
        for name in ("source", "epoch", "block", "row"):
            assert getattr(found, name).tolist() == getattr(alone, name).tolist()


def test_a_phase_may_begin_at_tokens_which_are_rows_times_their_length():
    rows = {"books": [40] * 8}
    by_tokens = spec_of(rows, sequence_length=64, phases=[
        {"from_tokens": 12 * 64 * 5, "global_batch": 24}, {"from_tokens": 12 * 64 * 5 + 24 * 64 * 3 - 1, "global_batch": 36},
    ])  # fmt: skip
    by_steps = spec_of(rows, sequence_length=64, phases=[
        {"from_step": 5, "global_batch": 24}, {"from_step": 8, "global_batch": 36},
    ])  # fmt: skip
    assert by_tokens.phases == by_steps.phases
    assert by_tokens.pinned(20) == by_steps.pinned(20)
    longer = spec_of(rows, sequence_length=128, phases=[{"from_tokens": 12 * 64 * 5, "global_batch": 24}])
    assert longer.phases[1].first_step == 3, "half of 5, and not before so many are done"


@given(
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=4), gaps=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    tokens=st.integers(1, 20_000),
)  # fmt: skip
def test_steps_and_tokens_are_each_others_inverse(batches, gaps, tokens):
    starts = [0, *np.cumsum(gaps).tolist()]
    phases = [Phase(start, batch, (1,)) for start, batch in zip(starts, batches)]
    step = step_of_tokens(phases, tokens, sequence_length=16)
    if step > phases[-1].first_step:
        assert planned_tokens(phases, step, sequence_length=16) >= tokens
        assert planned_tokens(phases, step - 1, sequence_length=16) < tokens
    counted = sum(next(p.global_batch for p in reversed(phases) if p.first_step <= s) * 16 for s in range(step))
    assert planned_tokens(phases, step, sequence_length=16) == counted


def test_a_phase_has_one_beginning():
    for phase in ({"global_batch": 12}, {"from_step": 3, "from_tokens": 99}):
        with pytest.raises(ConfigError, match="give from_step or from_tokens, and not both"):
            spec_of({"books": [40]}, phases=[phase])

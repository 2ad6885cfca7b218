import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.stragglers import StragglerConfig, StragglerJudge, balance

HOSTS = ["n0", "n0", "n1", "n1", "n2", "n2", "n3", "n3"]


def synchronous(works, *, transfer=0.05):
    """What ranks measure that wait for each other: everybody's step ends when the slowest has arrived and data has passed."""
    last = max(sum(w.values()) for w in works)
    return [{**w, "communication": last - sum(w.values()) + transfer} for w in works]


def windows(count, *, size=8, slow=None, part="compute", factor=1.0, noise=0.05, seed=0, transfer=0.05):
    draw = random.Random(seed)
    for _ in range(count):
        works = [
            {"data": 0.02 * draw.lognormvariate(0, noise), "compute": 0.5 * draw.lognormvariate(0, noise)} for _ in range(size)
        ]  # fmt: skip
        if slow is not None:
            works[slow][part] *= factor
        yield synchronous(works, transfer=transfer * draw.lognormvariate(0, noise))


def judge(size=8, **changes):
    return StragglerJudge(StragglerConfig(**changes), hosts=HOSTS[:size])


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", [1, 2, 8])
def test_no_false_alarm_in_a_thousand_clean_windows(seed, size):
    clean = judge(size)
    assert [r for w in windows(1000, size=size, seed=seed) if (r := clean.judge(w))] == []


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize(("part", "factor"), [("compute", 1.5), ("data", 30.0)])
def test_a_slow_rank_is_named_with_host_and_cause_at_the_third_window(size, part, factor):
    slow = size - 1
    judged = judge(size)
    reports = [judged.judge(w) for w in windows(3, size=size, slow=slow, part=part, factor=factor)]
    assert reports[:2] == [None, None]
    found = reports[2]
    assert (found.rank, found.host, found.cause, found.windows) == (slow, HOSTS[slow], part, 3)
    assert 0.4 < found.score < 0.8
    assert f"rank {slow} on {HOSTS[slow]} is slow in {part}" in found.describe()
    assert "always was" in found.describe()


def test_the_slow_rank_waits_least_and_the_others_communication_does_not_accuse_them():
    """The trap: judged by communication, every rank but the slow one would look bad."""
    works = [{"data": 0.01, "compute": 0.5}] * 3 + [{"data": 0.01, "compute": 1.0}]
    parts = synchronous(works)
    assert min(range(4), key=lambda rank: parts[rank]["communication"]) == 3
    assert max(p["communication"] for p in parts[:3]) > 0.5
    judged = judge(4, windows=1)
    assert judged.judge(parts).rank == 3


def test_a_rank_that_became_slow_is_measured_against_its_own_best():
    judged = judge()
    for window in windows(20):
        assert judged.judge(window) is None
    reports = [judged.judge(w) for w in windows(3, slow=5, factor=2.0, seed=1)]
    assert 0.4 < reports[-1].own_score < 0.6
    assert "of its own best" in reports[-1].describe()


def test_a_slow_network_accuses_no_rank():
    judged = judge()
    for window in windows(20):
        judged.judge(window)
    reports = [judged.judge(w) for w in windows(3, transfer=0.5, seed=1)]
    assert (reports[-1].rank, reports[-1].cause) == (None, "communication")
    assert "the network is slow in communication" in reports[-1].describe()


def test_slowness_that_costs_next_to_nothing_is_nobodys_fault():
    works = [{"data": 0.0001, "compute": 0.0}, {"data": 0.01, "compute": 0.0}]
    judged = judge(2, windows=1)
    assert judged.judge(synchronous(works, transfer=10.0)) is None


def test_slowness_that_goes_from_rank_to_rank_is_nobodys_fault():
    judged = judge()
    for n in range(50):
        [window] = windows(1, slow=n % 8, factor=2.0, seed=n)
        assert judged.judge(window) is None


def test_a_pause_begins_the_count_anew():
    judged = judge()
    pattern = [True, True, False] * 10
    for n, slow in enumerate(pattern):
        [window] = windows(1, slow=2 if slow else None, factor=2.0, seed=n)
        assert judged.judge(window) is None


def test_a_lasting_straggler_is_repeated_ever_more_rarely():
    judged = judge()
    said = [n for n, w in enumerate(windows(50, slow=1, factor=2.0), start=1) if judged.judge(w)]
    assert said == [3, 6, 12, 24, 48]


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=8), st.floats(0, 1e3))
def test_any_numbers_are_judged_without_a_fault(works, transfer):
    judged = judge(len(works), windows=1)
    report = judged.judge(synchronous([{"compute": w} for w in works], transfer=transfer))
    if report is not None:
        assert report.rank == max(range(len(works)), key=works.__getitem__)
        assert 0 <= report.score < 0.75
        assert 0 <= report.share <= 1 + 1e-9


@given(st.lists(st.tuples(*[st.floats(0, 100)] * 3), min_size=1, max_size=9))
def test_balance_is_a_few_figures_however_many_ranks(parts):
    found = balance([{"data": d, "compute": c, "communication": n} for d, c, n in parts])
    works = [d + c for d, c, _ in parts]
    assert works[int(found["slowest"])] == max(works)
    assert found["work_over_median"] >= 1 or max(works) == 0
    assert found["data_excess"] >= 0
    assert 0 <= found["communication_least"] <= found["communication_most"] <= 1
    assert len(found) == 5


@pytest.mark.parametrize("size", [2, 3, 64])
def test_balance_names_the_slow_rank_and_by_how_much(size):
    even = {"data": 0.1, "compute": 0.9}
    slow = {"data": 0.6, "compute": 0.9}
    found = balance(synchronous([even] * (size - 1) + [slow]))
    assert found["slowest"] == size - 1
    median_work = 1.25 if size == 2 else 1.0  # of two, half way
    assert found["work_over_median"] == pytest.approx(1.5 / median_work)
    assert found["data_excess"] == pytest.approx((0.25 if size == 2 else 0.5) / 1.55)
    assert found["communication_least"] == pytest.approx(0.05 / 1.55)
    assert found["communication_most"] == pytest.approx(0.55 / 1.55)


def test_ranks_that_measured_nothing_are_even():
    nothing = balance([{"data": 0.0, "compute": 0.0, "communication": 0.0}] * 2)
    assert (nothing["work_over_median"], nothing["data_excess"]) == (1.0, 0.0)

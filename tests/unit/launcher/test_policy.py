"""The restart policy, as a pure machine: bounded, ends always, and says why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ExitCode
from dstrain.launcher.hosts import Host, num_processes
from dstrain.launcher.outcome import Outcome
from dstrain.launcher.policy import FINAL, Decision, Ended, RestartPolicy, Standing, decide

HOSTS = tuple(Host(f"n{i}", 4) for i in range(4))
CRASH = Outcome(ExitCode.DEFECT, "boom", (1,), ("n1",))
KILLED = Outcome(None, "rank 1 ended without a word", (1,))

outcomes = st.builds(
    Outcome,
    code=st.sampled_from([None, *ExitCode]),
    cause=st.just("cause"),
    hosts=st.lists(st.sampled_from([h.name for h in HOSTS]), max_size=2).map(tuple),
    deliberate=st.booleans(),
)
endings = st.builds(
    Ended,
    outcome=outcomes,
    checkpoint=st.integers(-1, 50),
    num_checkpoints=st.integers(0, 4),
    reached=st.integers(-1, 60),
    asked=st.sampled_from([False, False, False, True]),
)
policies = st.builds(
    RestartPolicy,
    max_restarts=st.integers(0, 12),
    min_processes=st.none() | st.integers(1, 16),
    idle_limit=st.integers(1, 4),
    unhealthy_retries=st.integers(0, 3),
)


def _play(policy: RestartPolicy, ends: list[Ended], **standing: Any) -> list[tuple[Standing, Decision]]:
    now, steps = Standing(**standing), []
    for ended in ends:
        now, decision = decide(policy, now, ended, seed=3)
        steps.append((now, decision))
        if decision.code is not None:
            break
    return steps


@given(policy=policies, ends=st.lists(endings, min_size=20, max_size=20), hosts=st.sampled_from([(), HOSTS]))
def test_every_job_ends_within_its_restarts_whatever_happens(
    policy: RestartPolicy, ends: list[Ended], hosts: tuple[Host, ...]
) -> None:
    steps = _play(policy, ends, hosts=hosts)
    assert steps[-1][1].code is not None
    restarts = sum(decision.code is None for _, decision in steps)
    assert restarts == steps[-1][0].restarts or steps[-1][1].code is ExitCode.UNHEALTHY_NODE
    assert restarts <= policy.max_restarts
    for standing, decision in steps:
        assert 0 <= decision.wait_s <= 1.5 * policy.longest_wait_s
        if hosts and standing.hosts != hosts:
            assert policy.min_processes is not None
            assert num_processes(standing.hosts) >= policy.min_processes


@given(policy=policies, ended=endings)
def test_what_would_end_the_same_way_again_is_not_started_again(policy: RestartPolicy, ended: Ended) -> None:
    _, decision = decide(policy, Standing(), ended, seed=0)
    if ended.outcome.code in FINAL | {ExitCode.COMPLETE}:
        assert decision.code is ended.outcome.code
    if ended.asked:
        assert decision.code is not None


@given(ends=st.lists(st.builds(Ended, outcome=st.just(CRASH), checkpoint=st.just(8), num_checkpoints=st.just(3),
                               reached=st.just(9)), min_size=9, max_size=9))  # fmt: skip
def test_a_crash_loop_ends_with_79_after_one_try_from_further_back(ends: list[Ended]) -> None:
    steps = _play(RestartPolicy(max_restarts=50), ends)
    # The first end made progress, from nothing to step 9; then three without.
    assert [decision.step_back for _, decision in steps] == [False, False, True, False]
    assert [decision.code for _, decision in steps] == [None, None, None, ExitCode.NO_PROGRESS]
    assert "boom" in steps[-1][1].why


def test_with_one_checkpoint_nothing_is_set_aside() -> None:
    steps = _play(RestartPolicy(), [Ended(CRASH, 8, 1, 9)] * 9)
    assert not any(decision.step_back for _, decision in steps)
    assert steps[-1][1].code is ExitCode.NO_PROGRESS


def test_progress_begins_the_count_anew_and_a_second_loop_may_step_back_again() -> None:
    loop = [Ended(CRASH, 8, 3, 9)] * 3 + [Ended(CRASH, 16, 3, 17)] * 9
    steps = _play(RestartPolicy(max_restarts=50), loop)
    assert [decision.step_back for _, decision in steps] == [False, False, True, False, False, True, False]
    assert steps[-1][1].code is ExitCode.NO_PROGRESS


def test_waiting_doubles_without_progress_is_capped_and_is_the_same_for_a_seed() -> None:
    policy = RestartPolicy(max_restarts=50, idle_limit=20, first_wait_s=1, longest_wait_s=60)
    waits = [decision.wait_s for _, decision in _play(policy, [Ended(KILLED, 8, 1, 9)] * 12)]
    assert waits == [decision.wait_s for _, decision in _play(policy, [Ended(KILLED, 8, 1, 9)] * 12)]
    for doublings, wait in enumerate(waits):
        assert 0.5 * min(60, 2**doublings) <= wait <= 1.5 * min(60, 2**doublings)
    assert len({wait / min(60, 2**n) for n, wait in enumerate(waits)}) > 6


def test_a_bad_host_is_left_out_while_enough_ranks_remain() -> None:
    bad = [
        Ended(Outcome(ExitCode.UNHEALTHY_NODE, "no GPU", (0,), (name,)), 8, 2, 9) for name in ("n0", "n2.cluster", "n3")
    ]
    policy = RestartPolicy(min_processes=8, unhealthy_retries=0, idle_limit=9)
    steps = _play(policy, bad, hosts=HOSTS)
    assert [[h.name for h in standing.hosts] for standing, _ in steps[:2]] == [["n1", "n2", "n3"], ["n1", "n3"]]
    assert "without n0, with 12 ranks" in steps[0][1].why
    assert steps[2][1].code is ExitCode.UNHEALTHY_NODE
    assert "4 ranks elsewhere are too few" in steps[2][1].why


def test_an_unhealthy_machine_alone_is_tried_once_more() -> None:
    steps = _play(RestartPolicy(), [Ended(Outcome(ExitCode.UNHEALTHY_NODE, "no GPU", (0,), ("me",)), 8, 2, 9)] * 5)
    assert [decision.code for _, decision in steps] == [None, ExitCode.UNHEALTHY_NODE]


def test_a_stray_stop_goes_on_as_progress_and_a_deliberate_one_ends() -> None:
    stray = Ended(Outcome(ExitCode.SAVED_REQUEUE, "SIGTERM", deliberate=False), 8, 2, 8)
    steps = _play(RestartPolicy(max_restarts=5), [stray] * 9)
    assert [decision.code for _, decision in steps] == [None] * 5 + [ExitCode.SAVED_REQUEUE]
    assert all(standing.idle == 0 for standing, _ in steps)
    limit = Ended(Outcome(ExitCode.SAVED_REQUEUE, "3 hours are used up"), 8, 2, 8)
    assert _play(RestartPolicy(), [limit])[0][1].code is ExitCode.SAVED_REQUEUE


@pytest.mark.parametrize(
    ("outcome", "checkpoint", "reached", "code"),
    [
        (Outcome(ExitCode.SAVED_REQUEUE, "SIGTERM", deliberate=False), 8, 8, 75),
        (KILLED, 8, 8, 75),
        (KILLED, -1, -1, 75),
        (KILLED, 8, 11, 76),
        (Outcome(ExitCode.COMPLETE, "complete"), 12, 12, 0),
        (Outcome(ExitCode.BAD_INPUT, "bad"), -1, -1, 78),
    ],
)
def test_an_asked_supervisor_says_saved_only_when_nothing_is_lost(
    outcome: Outcome, checkpoint: int, reached: int, code: int
) -> None:
    [(_, decision)] = _play(RestartPolicy(), [Ended(outcome, checkpoint, 1, reached, asked=True)])
    assert decision.code == code


@pytest.mark.parametrize(("outcome", "code"), [(KILLED, 76), (CRASH, 1), (Outcome(ExitCode.RETRY_HERE, "disk"), 76)])
def test_used_up_restarts_give_the_last_end_s_code(outcome: Outcome, code: int) -> None:
    [(_, decision)] = _play(RestartPolicy(max_restarts=0), [Ended(outcome, 8, 1, 9)])
    assert decision.code == code
    assert "--max-restarts" in decision.why

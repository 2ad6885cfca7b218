import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.rank_hosts import describe_missing, expected_hosts, own_address, same_host
from dstrain.base.world import World

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "2,1"}


def test_slurm_says_where_each_rank_is():
    assert expected_hosts(World(size=3, launcher="srun"), SLURM) == ("n1", "n1", "n2")
    assert expected_hosts(World(size=4, local_size=2, launcher="srun"), {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}) == (
        "n1", "n1", "n2", "n2",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("world", "environment"),
    [
        (World(size=3, launcher="deepspeed"), SLURM),
        (World(size=4, launcher="srun"), SLURM),
        (World(size=3, launcher="srun"), {**SLURM, "SLURM_DISTRIBUTION": "cyclic"}),
        (World(size=3, launcher="srun"), {**SLURM, "SLURM_STEP_NODELIST": "n[1-"}),
        (World(size=3, launcher="srun"), {}),
    ],
)
def test_nothing_is_claimed_where_nobody_says(world, environment):
    assert expected_hosts(world, environment) == ()


@given(st.integers(1, 6), st.integers(1, 5), st.data())
def test_every_missing_rank_and_only_hosts_that_lack_one_are_named(num_hosts, local, data):
    size = num_hosts * local
    missing = sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1)))
    expected = tuple(f"node{rank // local + 1}x" for rank in range(size))
    heard = {rank: expected[rank] for rank in range(size) if rank not in missing}
    text = describe_missing(missing, heard=heard, expected=expected, local_size=local)
    shown = {host for host in expected if host in text}
    assert shown == {expected[rank] for rank in missing}
    if len(missing) <= 8:
        assert f" {', '.join(map(str, missing))} " in text


def test_a_layout_that_ranks_contradict_is_not_believed():
    text = describe_missing([1], heard={0: "n2"}, expected=("n1", "n2"), local_size=1)
    assert text == "rank 1 (on the launcher's host number 2)"


def test_a_host_that_another_rank_spoke_from_is_known_by_name():
    text = describe_missing([1, 2, 3], heard={0: "n1"}, expected=(), local_size=2)
    assert text == "ranks 1, 2, 3 (on n1, the launcher's host number 2)"
    assert describe_missing([1], heard={0: "n1"}, expected=(), local_size=2) == "rank 1"


def test_short_and_full_names_are_one_host():
    assert same_host("node1", "node1.cluster")
    assert not same_host("node1", "node10")
    assert not same_host("node1.a", "node1.b")


def test_an_address_is_judged_only_between_hosts_that_choose_no_interface():
    assert own_address(World(size=2, local_size=2), {}) == ""
    several = World(size=2, local_size=1, master_addr="10.0.0.1")
    assert own_address(several, {"GLOO_SOCKET_IFNAME": "eth0"}) == ""
    assert own_address(several, {}).count(".") == 3

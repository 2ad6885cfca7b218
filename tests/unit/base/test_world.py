import os
import shutil
import socket
import subprocess

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.base.world import World, expand_nodelist, world_from_environment

SLURM = {
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "5",
    "SLURM_STEP_ID": "0",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "gpu[07-09]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_ID": "1234567",
}


def test_plain_python_is_a_world_of_one_on_a_free_port():
    world = world_from_environment({})
    assert (world.rank, world.size, world.local_rank, world.local_size) == (0, 1, 0, 1)
    assert world.launcher == "python"
    assert world.is_first
    assert 1024 <= world.master_port < 65536


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_from_environment().rank == 1


def test_the_deepspeed_launcher_is_read():
    env = {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2",
        "MASTER_ADDR": "node1", "MASTER_PORT": "29501",
    }  # fmt: skip
    assert world_from_environment(env, local_rank=1) == World(
        rank=5, size=8, local_rank=1, local_size=4, master_addr="node1", master_port=29501, launcher="deepspeed"
    )


def test_torchrun_is_read():
    env = {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h",
        "MASTER_PORT": "1234", "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    world = world_from_environment(env)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (3, 4, 1, 2)
    assert world.launcher == "torchrun"


def test_rank_and_world_size_alone_are_one_node():
    world = world_from_environment({"RANK": "1", "WORLD_SIZE": "2"})
    assert (world.local_rank, world.local_size, world.launcher) == (1, 2, "environment")
    assert (world.master_addr, world.master_port) == ("127.0.0.1", 29500)


def test_srun_is_read_and_all_tasks_meet_at_the_first_node():
    world = world_from_environment(SLURM)
    assert (world.rank, world.size, world.local_rank, world.local_size) == (5, 6, 1, 2)
    assert (world.launcher, world.master_addr) == ("srun", "gpu07")
    first = world_from_environment({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"})
    assert (first.master_addr, first.master_port) == (world.master_addr, world.master_port)
    assert 20000 <= world.master_port < 40000


def test_two_slurm_jobs_use_different_ports():
    other = world_from_environment({**SLURM, "SLURM_JOB_ID": "1234568"})
    assert other.master_port != world_from_environment(SLURM).master_port


def test_a_chosen_meeting_point_beats_slurms():
    world = world_from_environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert (world.master_addr, world.master_port) == ("10.0.0.1", 5000)


@pytest.mark.parametrize(("node", "tasks"), [(0, 4), (1, 4), (2, 2), (3, 1), (9, 1)])
def test_uneven_tasks_per_node_are_counted_by_node(node, tasks):
    env = {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4(x2),2,1", "SLURM_NODEID": str(node)}
    assert world_from_environment(env).local_size == tasks


def test_an_allocation_without_a_step_is_plain_python():
    env = {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"}
    assert world_from_environment(env).launcher == "python"


def test_torchrun_inside_an_allocation_is_torchruns():
    env = {**SLURM, "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"}
    assert world_from_environment(env).size == 2


def test_a_local_rank_argument_that_contradicts_the_environment_is_refused():
    env = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    with pytest.raises(ConfigError, match=r"--local_rank=0 contradicts LOCAL_RANK=1"):
        world_from_environment(env, local_rank=0)
    assert world_from_environment(env, local_rank=-1) == world_from_environment(env, local_rank=1)


@pytest.mark.parametrize("rank", ["2", "-1"])
def test_a_rank_outside_the_world_is_refused(rank):
    with pytest.raises(ConfigError, match=rf"RANK={rank} is outside WORLD_SIZE=2"):
        world_from_environment({"RANK": rank, "WORLD_SIZE": "2"})


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_PORT"])
def test_a_variable_that_is_no_number_is_named(name):
    with pytest.raises(ConfigError, match=f"{name}='two' is not a number"):
        world_from_environment({"RANK": "0", "WORLD_SIZE": "2", name: "two"})


def test_tasks_per_node_that_cannot_be_read_are_shown():
    with pytest.raises(ConfigError, match=r"SLURM_TASKS_PER_NODE='many'"):
        world_from_environment({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "many"})


def test_export_writes_what_the_engines_read():
    env = {"OTHER": "kept"}
    World(rank=3, size=8, local_rank=1, local_size=2, master_addr="a", master_port=9).export(env)
    assert env == {
        "OTHER": "kept", "RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "a",
        "MASTER_PORT": "9",
    }  # fmt: skip
    assert world_from_environment(env).local_size == 2


ON_LOOPBACK = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


def exported(world, **before):
    env = dict(before)
    world.export(env)
    return {name: env.get(name) for name in ON_LOOPBACK}


@pytest.mark.parametrize(
    "world",
    [
        World(),
        World(size=2, local_size=2, launcher="deepspeed"),
        World(size=2, local_size=2, launcher="environment", master_addr="localhost"),
        World(size=2, local_size=2, launcher="srun", master_addr=socket.gethostname()),
    ],
)
def test_ranks_of_one_host_meet_and_talk_on_the_loopback_interface(world):
    assert world.is_on_one_host
    assert exported(world) == ON_LOOPBACK


@pytest.mark.parametrize(
    "world",
    [
        World(size=4, local_size=2),
        World(size=4, local_size=2, launcher="srun", master_addr=socket.gethostname()),
        World(size=2, local_size=2, launcher="torchrun", master_addr="10.0.0.1"),
        # Only RANK and WORLD_SIZE are known: the other rank may be elsewhere.
        World(size=2, local_size=2, launcher="environment", master_addr=socket.gethostname()),
    ],
)
def test_ranks_that_may_be_on_several_hosts_keep_their_meeting_point(world):
    assert not world.is_on_one_host
    assert exported(world) == {**dict.fromkeys(ON_LOOPBACK), "MASTER_ADDR": world.master_addr}


def test_an_interface_that_a_person_chose_stays():
    chosen = exported(World(size=2, local_size=2), GLOO_SOCKET_IFNAME="eth7", NCCL_SOCKET_IFNAME="ib0")
    assert chosen == {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "eth7", "NCCL_SOCKET_IFNAME": "ib0"}


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("one", ["one"]),
        ("a,b", ["a", "b"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-11,20]", ["gpu08", "gpu09", "gpu10", "gpu11", "gpu20"]),
        ("a[1-2]b,c-d", ["a1b", "a2b", "c-d"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("a[1-3,07]b,c", ["a1b", "a2b", "a3b", "a07b", "c"]),
    ],
)
def test_slurm_node_lists_are_expanded_in_order(text, hosts):
    assert expand_nodelist(text) == hosts


@pytest.mark.parametrize("text", ["", "a[1-2", "a[x-y]", "a[1-z]", "a[]", "a[3-1]"])
def test_a_node_list_that_cannot_be_read_is_refused(text):
    with pytest.raises(ConfigError, match="SLURM node list"):
        expand_nodelist(text)


@given(st.integers(0, 120), st.integers(0, 12), st.integers(1, 4))
def test_a_range_of_any_width_expands_to_its_numbers(low, count, width):
    text = f"n[{low:0{width}d}-{low + count:0{width}d}]"
    assert expand_nodelist(text) == [f"n{low + i:0{width}d}" for i in range(count + 1)]


_PREFIX = st.from_regex(r"[a-z]([a-z0-9-]{0,4}[a-z])?", fullmatch=True)


@st.composite
def _ranges(draw):
    """What stands in brackets, with and without leading zeros."""
    parts = []
    for _ in range(draw(st.integers(1, 3))):
        width, low, count = draw(st.integers(1, 3)), draw(st.integers(0, 120)), draw(st.integers(0, 5))
        parts.append(f"{low:0{width}d}" + (f"-{low + count:0{width}d}" if count else ""))
    return ",".join(parts)


_ITEM = st.builds(lambda names, numbers: "".join(f"{n}[{r}]" for n, r in zip(names, numbers)) or names[0],
                  st.lists(_PREFIX, min_size=2, max_size=2), st.lists(_ranges(), max_size=2))  # fmt: skip


@pytest.fixture(scope="module")
def scontrol(tmp_path_factory):
    """`scontrol show hostnames`, which needs a configuration but no controller."""
    program = shutil.which("scontrol")
    if program is None:
        pytest.skip("needs scontrol; the table above holds its answers")
    conf = tmp_path_factory.mktemp("slurm") / "slurm.conf"
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\n")

    def expand(text):
        done = subprocess.run(
            [program, "show", "hostnames", text], env={**os.environ, "SLURM_CONF": str(conf)}, capture_output=True, text=True, check=False
        )  # fmt: skip
        return None if done.returncode or "nvalid" in done.stdout + done.stderr else done.stdout.split()

    return expand


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(_ITEM, min_size=1, max_size=3))
def test_whatever_scontrol_expands_is_expanded_alike(scontrol, items):
    text = ",".join(items)
    theirs = scontrol(text)
    assert theirs, f"scontrol refuses {text}: the test makes what SLURM does not"
    assert expand_nodelist(text) == theirs


@given(st.text(alphabet=st.sampled_from("ab1029-[],.;$ \n\0é"), max_size=25))
def test_any_text_gives_host_names_or_a_refusal(text):
    try:
        hosts = expand_nodelist(text)
    except ConfigError:
        return
    assert hosts
    assert all(set(host) <= set("ab1029-.") and host[0] != "-" for host in hosts)

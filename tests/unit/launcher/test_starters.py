"""Golden argument lists of every launcher, and values that must not reach a shell or an option parser."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.launcher.hosts import Host
from dstrain.launcher.starters import ADDED, STARTERS, TOKEN, Layout, build_command, rank_log

RUN = ("pretrain", "--config", "/c/run.yaml", "train.max_steps=5")
HOSTS = (Host("n1", 4), Host("n2", 4))
STAGE = ["-m", "dstrain.cli.main", *RUN]


def _argv(layout: Layout) -> list[str]:
    return list(build_command(layout, RUN, port=1234, hostfile=Path("/r/hosts"), folder="/home/me").argv)


def test_python_starts_one_process() -> None:
    assert _argv(Layout("python", 1)) == [sys.executable, "-u", *STAGE]


def test_deepspeed_on_this_machine_reads_no_hostfile() -> None:
    assert _argv(Layout("deepspeed", 8)) == [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/dev/null", "--num_accelerators", "8",
        "--master_port", "1234", "--no_local_rank", "--log_level", "critical", "--module", *STAGE[1:],
    ]  # fmt: skip


def test_deepspeed_on_hosts_never_falls_back_to_this_machine() -> None:
    assert _argv(Layout("deepspeed", 8, HOSTS)) == [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", "/r/hosts", "--force_multi", "--launcher", "pdsh",
        "--master_addr", "n1", "--master_port", "1234", "--no_local_rank", "--module", *STAGE[1:],
    ]  # fmt: skip


def test_torchrun_passes_all_stop_signals_on_and_restarts_nothing_itself() -> None:
    assert _argv(Layout("torchrun", 2)) == [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "1", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", "1234", "--max-restarts", "0", "--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2",
        *STAGE,
    ]  # fmt: skip


def test_srun_names_its_nodes_and_ends_all_when_one_ends_badly() -> None:
    command = build_command(Layout("srun", 8, HOSTS), RUN, port=1234)
    assert list(command.argv) == [
        "srun", "--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=n1,n2", "--kill-on-bad-exit=1", "--export=ALL",
        sys.executable, "-u", *STAGE,
    ]  # fmt: skip
    assert command.added == {"MASTER_PORT": "1234"}
    smaller = Layout("srun", 8, HOSTS, cpus_per_rank=6).on(HOSTS[:1])
    words = build_command(smaller, RUN, port=1234).argv
    assert {"--nodes=1", "--ntasks=4", "--cpus-per-task=6"} <= set(words)


@pytest.mark.parametrize(
    ("logs", "option"),
    [
        ("/r/logs/attempt-0001", ["--output=/r/logs/attempt-0001-rank-%5t.log"]),
        ("/50%t/attempt-0001", ["--output=/50%%t/attempt-0001-rank-%5t.log"]),
        ("/back\\slash/attempt-0001", []),
    ],
)
def test_srun_writes_a_log_for_each_rank_where_it_can_name_one(logs: str, option: list[str]) -> None:
    argv = build_command(Layout("srun", 8, HOSTS), RUN, port=1234, rank_logs=Path(logs)).argv
    assert [word for word in argv if word.startswith("--output")] == option
    assert rank_log(Path(logs), 7) == Path(f"{logs}-rank-00007.log")


def test_the_environment_has_the_token_and_no_rank_of_a_surrounding_job() -> None:
    outer = {"PATH": "/bin", "RANK": "3", "WORLD_SIZE": "8", "MASTER_ADDR": "x", "SLURM_PROCID": "1", TOKEN: "outer"}
    environment = build_command(Layout("deepspeed", 2, device="cpu"), RUN, port=1).environment(outer, token="inner")
    assert environment == {"PATH": "/bin", "DS_ACCELERATOR": "cpu", TOKEN: "inner"}


@pytest.mark.parametrize("starter", STARTERS)
def test_only_variables_of_the_list_are_added(starter: str) -> None:
    layout = Layout(starter, 1, (Host("n1", 1),) if starter == "srun" else (), "cpu")  # type: ignore[arg-type]
    assert set(build_command(layout, RUN, port=1).added) <= set(ADDED)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout("python", 2), "--with python starts one process"),
        (Layout("deepspeed", 0), "at least 1"),
        (Layout("torchrun", 8, HOSTS), "starts one machine"),
        (Layout("srun", 8), "SLURM allocation"),
        (Layout("deepspeed", 1, (Host("-x", 1),)), "host '-x'"),
    ],
)
def test_a_layout_that_cannot_be_started_is_refused(layout: Layout, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_command(layout, RUN, port=1, hostfile=Path("/r/hosts"))


@pytest.mark.parametrize("word", ["", "a=b\n#SBATCH --x", "a\0b", "a=\x1b[2J", "a=\udcff"])
def test_control_characters_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="argument"):
        build_command(Layout("python", 1), ("pretrain", word), port=1)


@given(st.text(min_size=1, max_size=60))
def test_what_pdsh_gives_to_a_remote_shell_has_nothing_a_shell_acts_on(word: str) -> None:
    layout = Layout("deepspeed", 8, HOSTS)
    try:
        command = build_command(layout, ("pretrain", word), port=1, hostfile=Path("/r/hosts"), folder="/home/me")
    except ConfigError:
        return
    assert command.argv[-1] == word
    assert not set(word) & set(" \t\n'\"\\$`;&|<>(){}[]*?!#~")


def test_a_folder_that_a_remote_shell_would_misread_is_refused() -> None:
    with pytest.raises(ConfigError, match="pdsh"):
        build_command(Layout("deepspeed", 8, HOSTS), RUN, port=1, hostfile=Path("/r/hosts"), folder="/home/me;id")


@given(st.text(max_size=40))
def test_a_rank_log_in_any_folder_is_one_option_of_srun_whose_only_numbers_are_the_ranks(name: str) -> None:
    argv = build_command(Layout("srun", 8, HOSTS), RUN, port=1, rank_logs=Path("/r") / f"{name}x/attempt-0001").argv
    options = [word for word in argv[: argv.index(sys.executable)] if word.startswith("--output")]
    assert len(options) == (0 if "\\" in name else 1)
    for option in options:
        plain = option.removeprefix("--output=").replace("%%", "")
        assert plain.count("%") == 1
        assert plain.endswith("attempt-0001-rank-%5t.log")

"""The text of --dry-run: pasted into a shell it does what it says, and it shows names of variables without their values."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dstrain.base.errors import ConfigError
from dstrain.base.rank_settings import RankSettings
from dstrain.launcher import plan_text
from dstrain.launcher.choice import Choice
from dstrain.launcher.node_view import Cpu, NodeView
from dstrain.launcher.policy import RestartPolicy
from dstrain.launcher.starters import Command

NODE = NodeView(tuple(Cpu(0, 0, n, n) for n in range(4)), (), ("eth0", "lo"), Path("/scratch/x"))


@pytest.mark.parametrize("secret", ["it's $HOME; `id`", "a b"])
def test_a_plan_can_be_pasted_into_a_shell(secret: str) -> None:
    command = Command(("python", "-m", "x", f"k={secret}"), {"B": secret, "A": "1"}, ("RANK", "WORLD_SIZE"))
    lines = plan_text.command_text(Choice("python", "because"), command)
    assert lines[0] == "# python: because"
    assert lines[1] == "unset RANK WORLD_SIZE", "before what is set: a name may be in both"
    assert shlex.split(lines[2]) == ["export", "A=1"]
    assert shlex.split(lines[3]) == ["export", f"B={secret}"]
    assert shlex.split(lines[4]) == ["python", "-m", "x", f"k={secret}"]


def test_variables_are_named_and_their_values_are_not() -> None:
    environment = {"HOME": "/root", "AWS_SECRET_ACCESS_KEY": "hush", "MINE": "hush", "EDITOR": "hush", "RANK": "1"}
    text = plan_text.joined(plan_text.forwarding_text(environment, ["MINE"], Command(("x",), {}, ("RANK",))))
    assert text == (
        "# environment forwarded: AWS_SECRET_ACCESS_KEY HOME MINE\n# left out (--forward NAME adds one): EDITOR RANK\n"
    )
    assert "hush" not in text


def test_over_ssh_it_says_what_pdsh_takes_along() -> None:
    command = Command(("python", "--launcher", "pdsh"), {}, ())
    assert "pdsh takes to other hosts only" in plan_text.joined(plan_text.forwarding_text({}, [], command))


def test_ranks_here_are_shown_one_by_one() -> None:
    lines = plan_text.ranks_here_text(
        RankSettings(bind="cores"), launcher="deepspeed", processes=2, node=NODE, environment={"TRITON_CACHE_DIR": "/mine"}
    )  # fmt: skip
    assert "#   rank 0: 2 threads, cores 0-1 (its own), interface lo" in lines
    assert "#   rank 1: 2 threads, cores 2-3 (its own), interface lo" in lines
    assert "#   TRITON_CACHE_DIR=/mine" in lines, "what a person has set stays"
    assert "#   TORCH_EXTENSIONS_DIR=/scratch/x/torch_extensions" in lines


def test_a_missing_interface_is_a_fault_of_the_plan_too() -> None:
    with pytest.raises(ConfigError, match="ib0"):
        plan_text.ranks_here_text(
            RankSettings(interface="ib0"), launcher="python", processes=1, node=NODE, environment={}
        )


def test_ranks_elsewhere_are_told_by_their_rules() -> None:
    text = plan_text.joined(plan_text.ranks_elsewhere_text(RankSettings(threads=3, interface="ib0", timeout_s=77)))
    assert "OPENBLAS_NUM_THREADS: 3\n" in text
    assert "interface: ib0\n" in text
    assert "at most 77 s" in text


def test_restarts_and_script_close_the_text() -> None:
    assert plan_text.policy_text(RestartPolicy(max_restarts=4))[0].startswith("# restarts: at most 4;")
    assert plan_text.joined(plan_text.script_text("/s.sbatch", "a\nb\n")) == "# ---- /s.sbatch\na\nb\n"

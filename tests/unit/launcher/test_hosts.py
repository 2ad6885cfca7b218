"""Hostfiles and host names: read strictly, written as read, hosts left out by any name a rank may report."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError
from dstrain.launcher.hosts import (
    Host,
    check_host,
    num_processes,
    parse_hostfile,
    read_hostfile,
    render_hostfile,
    without,
)

NAMES = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,10}[a-z0-9])?", fullmatch=True)


@given(names=st.lists(NAMES, min_size=1, max_size=8, unique=True), slots=st.integers(1, 16))
def test_what_is_written_is_read_back(names: list[str], slots: int) -> None:
    hosts = tuple(Host(name, slots) for name in names)
    assert parse_hostfile("# ours\n\n" + render_hostfile(hosts), source="hosts") == hosts
    assert num_processes(hosts) == slots * len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("a slots=2\na slots=2", "stands twice"),
        ("a slots=2\nb slots=3", "same number of slots"),
        ("a slots=0", "at least 1"),
        ("a", "line 1"),
        ("a slots=2; reboot", "line 1"),
        ("-oProxyCommand=x slots=2", "host '-oProxyCommand=x'"),
        ("a$(id) slots=2", "host"),
        ("a`id` slots=2", "host"),
    ],
)
def test_a_hostfile_that_deepspeed_would_misread_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        parse_hostfile(text, source="hosts")


def test_a_missing_hostfile_is_refused_where_deepspeed_would_use_this_machine(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--hostfile .*nowhere"):
        read_hostfile(tmp_path / "nowhere")


@given(st.text(max_size=40))
def test_an_accepted_name_has_nothing_a_shell_or_an_option_parser_acts_on(name: str) -> None:
    try:
        check_host(name)
    except ConfigError:
        return
    assert name[0] != "-"
    assert set(name) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-")


def test_a_host_is_left_out_by_its_short_or_long_name_and_no_other_is() -> None:
    hosts = tuple(Host(name, 4) for name in ("node1", "node11", "node2.cluster", "10.0.0.1", "10.0.0.12"))
    assert [h.name for h in without(hosts, ["node1.cluster"])] == ["node11", "node2.cluster", "10.0.0.1", "10.0.0.12"]
    assert [h.name for h in without(hosts, ["node2"])] == ["node1", "node11", "10.0.0.1", "10.0.0.12"]
    assert [h.name for h in without(hosts, ["10.0.0.1"])] == ["node1", "node11", "node2.cluster", "10.0.0.12"]
    assert without(hosts, ["elsewhere"]) == hosts

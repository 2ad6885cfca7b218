import stat

import pytest

from dstrain.base.errors import ConfigError
from dstrain.launcher.hosts import Host
from dstrain.launcher.reachability import ask_hosts, command_for, meaning


def test_ssh_may_ask_no_question_and_wait_for_nothing_long():
    assert command_for("node1") == [
        "ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5", "-o", "ConnectionAttempts=1", "--", "node1", "true",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["-oProxyCommand=x", "a b", "a;b", "$(x)", "", "a@b"])
def test_a_name_that_is_none_becomes_no_word_of_a_command(name):
    with pytest.raises(ConfigError, match="host"):
        ask_hosts([Host("node1", 1), Host(name, 1)])


@pytest.mark.parametrize(
    ("said", "why", "fix"),
    [
        ("ssh: Could not resolve hostname n: Name or service not known", "its name is not known here", "hostfile"),
        ("ssh: connect to host n port 22: Connection timed out", "does not answer", "port 22"),
        ("ssh: connect to host n port 22: No route to host", "no way to it", "cable"),
        ("ssh: connect to host n port 22: Connection refused", "no ssh server", "start sshd"),
        ("Host key verification failed.", "has changed", "accept the key"),
        ("root@n: Permission denied (publickey,password).", "wants a password", "authorized_keys"),
        ("kex_exchange_identification: banner line\ncontains invalid", "ssh failed: kex_exchange", "by hand"),
    ],
)
def test_what_ssh_says_is_put_into_plain_words(said, why, fix):
    answer = meaning("n", 255, said)
    assert (answer.reached, why in answer.why, fix in answer.fix) == (False, True, True)


def test_a_shell_that_fails_over_there_is_told_from_ssh():
    assert "`true` ended with 3 there: bad rc" in meaning("n", 3, "bad rc\n").why


def test_all_are_asked_and_each_answers_for_itself(tmp_path, monkeypatch):
    fake = tmp_path / "ssh"
    fake.write_text('#!/bin/sh\nfor host; do case $host in down) echo "No route to host" >&2; exit 255;; esac; done\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    answers = ask_hosts([Host("up", 1), Host("down", 1), Host("also-up", 1)])
    assert [(answer.host, answer.reached) for answer in answers] == [("up", True), ("down", False), ("also-up", True)]


def test_a_machine_without_ssh_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (answer,) = ask_hosts([Host("up", 1)])
    assert answer.why == "ssh is not installed on this machine"

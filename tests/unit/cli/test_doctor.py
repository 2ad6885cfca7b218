"""`dstrain doctor`: what people read, what scripts read, and ranks that are really started."""

import json
import re
import subprocess
import sys

import pytest

from dstrain.cli.doctor import code_of, report_in, text_of
from dstrain.cli.main import main
from dstrain.health.sanity_findings import Finding

FINDINGS = [
    Finding("packages", "ok", "python 3.11.7, torch 2.13.0"),
    Finding("gpu", "skipped", "node1: nvidia-smi is not installed"),
    Finding(
        "clock", "warning", "node1: nothing keeps this host's clock in step", "start chronyd, ntpd or systemd-timesyncd"
    ),
    Finding(
        "shared folder", "failed", "rank 1 on node2 does not see it", "mount it there", ranks=(1,), hosts=("node2",)
    ),
]


def test_people_read_one_line_a_check_and_what_to_do_below_it():
    assert text_of(FINDINGS) == (
        "ok       packages: python 3.11.7, torch 2.13.0\n"
        "skipped  gpu: node1: nvidia-smi is not installed\n"
        "WARNING  clock: node1: nothing keeps this host's clock in step\n"
        "         what to do: start chronyd, ntpd or systemd-timesyncd\n"
        "FAILED   shared folder: rank 1 on node2 does not see it\n"
        "         what to do: mount it there\n"
        "1 failed, 1 to look at\n"
    )
    assert text_of(FINDINGS[:1]).endswith("\nall is well\n")


def test_the_exit_code_is_the_failed_ones_and_warnings_are_none():
    assert code_of(FINDINGS[:3]) == 0
    assert code_of(FINDINGS) == 77
    assert code_of([*FINDINGS, Finding("x", "failed", "y", code=78)]) == 78


def test_the_report_is_found_among_what_launchers_print():
    report = json.dumps([finding.to_json() for finding in FINDINGS])
    output = f"[INFO] starting\nnode1: dstrain-doctor-report: {report}\nnode2: bye\n"
    assert report_in(output, code=77, starter="deepspeed") == FINDINGS


def test_ranks_that_never_report_leave_the_launchers_last_words():
    (finding,) = report_in("first\n\nsrun: error: no such node\n", code=1, starter="srun")
    assert (finding.level, finding.code) == ("failed", 77)
    assert finding.text == "srun ended with 1 before the ranks could report: first | srun: error: no such node"


def test_a_host_that_ssh_does_not_reach_is_named_and_nothing_is_started(tmp_path, monkeypatch, capsys):
    fake = tmp_path / "bin/ssh"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nfor host; do case $host in node2) echo "No route to host" >&2; exit 255;; esac; done\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    (tmp_path / "hosts").write_text("node1 slots=1\nnode2 slots=1\n")
    assert main(["doctor", "--hostfile", str(tmp_path / "hosts"), "--json"]) == 77
    (finding,) = json.loads(capsys.readouterr().out)["findings"]
    assert (finding["check"], finding["hosts"], finding["text"]) == ("ssh", ["node2"], "node2: there is no way to it")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train.max_steps=1"], "give a configuration before its overrides"),
        (["--hostfile", "/no/such/file"], "cannot be read"),
    ],
)
def test_bad_input_is_one_line(arguments, said, capsys):
    assert main(["doctor", *arguments]) == 78
    assert said in capsys.readouterr().err


@pytest.mark.dist
def test_two_ranks_are_started_compared_and_reported_once(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "dstrain.cli.main", "doctor", "--num-processes", "2", "--folder", str(tmp_path)],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    checks = re.findall(r"^(?:ok|skipped|WARNING)\s+([a-z ]+): ", done.stdout, re.MULTILINE)
    assert {"packages", "accelerator", "tools", "versions", "shared folder", "disk", "network"} <= set(checks)
    assert re.search(r"^ok +network: all-reduce \d+ µs small, \S+ GB/s with \S+ MB", done.stdout, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []

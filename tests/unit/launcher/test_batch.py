"""sbatch's argument list for every stage, hostile values refused, and a stand-in sbatch that is really called."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dstrain.base.errors import ConfigError, StorageError
from dstrain.launcher.batch import SCRIPTS, BatchOptions, batch_command, check_options, script_of, submit

BIN = str(Path(sys.executable).parent)


def argv(options: BatchOptions, *words: str, stage: str = "pretrain", on_cpu: bool = False) -> list[str]:
    return list(batch_command(options, words, stage=stage, on_cpu=on_cpu, path="/bin").argv)


def test_options_come_before_the_script_and_its_arguments_behind() -> None:
    options = BatchOptions(nodes=4, gpus_per_node="a100:8", time="12:00:00", partition="gpu,big", account="lab", job_name="bert-1",
                           dependency="singleton")  # fmt: skip
    assert argv(options, "/c/run.yaml", "data.path=a b") == [
        "sbatch", "--parsable", "--nodes=4", "--gpus-per-node=a100:8", "--ntasks-per-node=8", "--time=12:00:00", "--partition=gpu,big",
        "--account=lab", "--job-name=bert-1", "--dependency=singleton", str(SCRIPTS / "pretrain.sbatch"), "/c/run.yaml", "data.path=a b",
    ]  # fmt: skip


def test_a_run_on_cpus_asks_for_no_gpu_and_a_short_job_for_a_late_signal() -> None:
    assert argv(BatchOptions(time="4"), "r", stage="finetune", on_cpu=True)[2:5] == [
        "--gpus-per-node=0", "--time=4", "--signal=USR1@60",
    ]  # fmt: skip
    assert "--ntasks-per-node=2" in argv(BatchOptions(gpus_per_node="4", ntasks_per_node=2), "r")


def test_shards_are_an_array_and_an_export_is_one_task() -> None:
    assert argv(BatchOptions(array="0-63%8", cpus_per_task=4), "--out=o", stage="shards", on_cpu=True) == [
        "sbatch", "--parsable", "--cpus-per-task=4", "--array=0-63%8", str(SCRIPTS / "build_shards.sbatch"), "--out=o",
    ]  # fmt: skip
    assert argv(BatchOptions(), "runs/x", stage="export", on_cpu=True) == [
        "sbatch", "--parsable", str(SCRIPTS / "export.sbatch"), "runs/x",
    ]  # fmt: skip


def test_the_job_finds_this_dstrain_first() -> None:
    added = batch_command(BatchOptions(), ("r",), stage="pretrain", on_cpu=False, path="/usr/bin").added
    assert added == {"PATH": f"{BIN}:/usr/bin"}
    again = batch_command(BatchOptions(), ("r",), stage="pretrain", on_cpu=False, path=f"{BIN}:/usr/bin").added
    assert again == added


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (BatchOptions(nodes=0), "--nodes 0: at least 1"),
        (BatchOptions(gpus_per_node="a100:4,v100:4"), "--gpus-per-node .*one type"),
        (BatchOptions(time="soon"), "--time"),
        (BatchOptions(job_name="-x"), "--job-name"),
        (BatchOptions(job_name="a/../b"), "--job-name"),
        (BatchOptions(job_name="%j"), "--job-name"),
        (BatchOptions(partition="gpu;id"), "--partition"),
        (BatchOptions(account="a b"), "--account"),
        (BatchOptions(array="0-3"), "--array: only shards"),
        (BatchOptions(dependency="afterok"), "--dependency"),
        (BatchOptions(dependency="afterok:1 --wrap=id"), "--dependency"),
    ],
)
def test_a_value_that_sbatch_or_a_shell_could_misread_is_refused(options: BatchOptions, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_options(options, stage="pretrain")


def test_one_process_takes_no_nodes() -> None:
    with pytest.raises(ConfigError, match="--nodes 2: shards is no job of several nodes; shards take --array"):
        check_options(BatchOptions(nodes=2), stage="shards")


@pytest.mark.parametrize(
    "value",
    ["singleton", "afterok:1", "afterok:1:2,afterany:3", "after:7+5", "aftercorr:9_3?singleton", "afternotok:1"],
)
def test_dependencies_of_the_manual_are_taken(value: str) -> None:
    assert check_options(BatchOptions(dependency=value), stage="pretrain").dependency == value


@given(
    field=st.sampled_from(["job_name", "partition", "account", "gpus_per_node", "array", "dependency", "time"]),
    value=st.one_of(st.text(max_size=30), st.from_regex(r"[a-z0-9:,._%=+-]{1,20}", fullmatch=True)),
)
def test_an_accepted_value_is_one_harmless_word(field: str, value: str) -> None:
    options = BatchOptions(**{field: value})
    try:
        words = argv(options, "r", stage="shards" if field == "array" else "pretrain")
    except ConfigError:
        return
    mine = [word for word in words if word.startswith(f"--{field.replace('_', '-')}=")]
    assert mine == [f"--{field.replace('_', '-')}={value}"]
    assert value[0].isalnum()
    assert set(value) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+=:,%?-")


@given(st.text(max_size=40))
def test_an_argument_of_the_script_arrives_as_it_is_or_is_refused(word: str) -> None:
    try:
        words = argv(BatchOptions(), word)
    except ConfigError:
        return
    assert words[-1] == word
    assert not any(ord(letter) < 32 for letter in word)


def test_an_edited_copy_is_submitted_and_anything_else_is_not(tmp_path: Path) -> None:
    own = tmp_path / "my own.sbatch"
    own.write_text("#!/bin/bash\ntrue\n")
    assert script_of(BatchOptions(script=own), stage="pretrain") == own
    with pytest.raises(ConfigError, match="cannot be read"):
        script_of(BatchOptions(script=tmp_path / "none"), stage="pretrain")
    own.write_text("true\n")
    with pytest.raises(ConfigError, match="not a batch script"):
        script_of(BatchOptions(script=own), stage="pretrain")


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def make(code: str) -> None:
        program = tmp_path / "sbatch"
        program.write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


def test_the_number_of_the_job_comes_back_and_the_job_gets_what_was_said(tmp_path: Path, sbatch) -> None:
    sbatch(
        f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps([sys.argv[1:], dict(os.environ)])); print('4711;main')"
    )
    command = batch_command(
        BatchOptions(nodes=2), ("/c/a b.yaml", "k=$(id)"), stage="pretrain", on_cpu=False, path="/bin"
    )
    assert submit(command, {"A": "1"}) == "4711"
    words, environment = json.loads((tmp_path / "seen").read_text())
    assert words == list(command.argv[1:])
    assert environment["A"] == "1"
    assert "HOME" not in environment


def test_sbatchs_own_words_are_the_fault(sbatch) -> None:
    sbatch(
        "sys.stderr.write('sbatch: error: invalid partition specified: x\\nsbatch: error: Batch job submission failed\\n'); sys.exit(1)"
    )
    command = batch_command(BatchOptions(), ("r",), stage="pretrain", on_cpu=False, path="/bin")
    with pytest.raises(
        ConfigError, match="sbatch refused the job: invalid partition specified: x Batch job submission failed"
    ):
        submit(command, {})


def test_an_answer_without_a_number_and_a_missing_sbatch_are_told(
    tmp_path: Path, sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch("print('hello')")
    command = batch_command(BatchOptions(), ("r",), stage="pretrain", on_cpu=False, path="/bin")
    with pytest.raises(StorageError, match="without a job number"):
        submit(command, {})
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="not on PATH"):
        submit(command, {})

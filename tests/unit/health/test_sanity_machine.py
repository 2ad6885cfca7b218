from dataclasses import replace

import pytest

from dstrain.health.sanity_machine import MachineFacts, driver_version, judge_machine, look_at_machine

SOUND = MachineFacts(
    installed={"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "numpy": "2.4.0"},
    required=["torch>=2.11", "deepspeed<0.20,>=0.19.8", "colorama; sys_platform == 'win32'"], python="3.11.7", cuda_of_torch="12.8",
    gpus=8, driver=550, shm_bytes=1 << 36, open_files=65536, locked_memory=-1, has_infiniband=True, clock_synchronised=True,
    host="node1", address="10.0.0.1", interfaces=["eth0 25 Gb/s"], tools=["ssh", "nvidia-smi"], scratch_bytes=1 << 40,
)  # fmt: skip


def test_a_sound_machine_has_nothing_to_mend():
    findings = judge_machine(SOUND)
    assert {finding.level for finding in findings} == {"ok"}
    assert [finding.check for finding in findings] == [
        "packages",
        "accelerator",
        "shared memory",
        "limits",
        "clock",
        "network",
        "tools",
    ]


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"installed": {**SOUND.installed, "torch": "2.4.0"}}, "failed", "torch>=2.11 is needed: pip install 'torch>=2.11'"),
        ({"installed": {"torch": "2.13.0"}}, "failed", "deepspeed is not installed"),
        ({"gpus": 0, "cuda_of_torch": None}, "failed", "is a CPU build: install a CUDA build of torch"),
        ({"gpus": 0, "cuda_of_torch": "13.0"}, "failed", "built for CUDA 13.0, which needs driver 580 or newer; 550 is loaded"),
        ({"gpus": 0}, "failed", "sees no GPU: check CUDA_VISIBLE_DEVICES"),
        ({"shm_bytes": 64 << 20}, "warning", "has 64 MiB free, 1024 are wanted: start the container with --shm-size=1g"),
        ({"open_files": 1024}, "warning", "may open 1024 files, 4096 are wanted"),
        ({"locked_memory": 8 << 20}, "warning", "may lock 8192 KiB of memory, and there is InfiniBand"),
        ({"clock_synchronised": False}, "warning", "nothing keeps this host's clock in step: start chronyd"),
        ({"address": ""}, "warning", "the name node1 is not known on its own host: add node1"),
        ({"scratch_bytes": 1 << 20}, "warning", "the temporary folder has 1 MiB free"),
        ({"stale_locks": ["/c/lock"]}, "warning", "1 locks in the cache of compiled ops belong to no process: /c/lock: remove"),
    ],
)  # fmt: skip
def test_each_fault_is_one_line_with_its_fix(changes, level, said):
    findings = [
        finding for finding in judge_machine(replace(SOUND, **changes)) if finding.level not in ("ok", "skipped")
    ]
    assert [finding.level for finding in findings] == [level]
    assert said in findings[0].line()
    assert findings[0].fix


def test_a_machine_without_gpus_is_sound_when_it_has_no_driver_either():
    findings = judge_machine(replace(SOUND, gpus=0, driver=None, cuda_of_torch=None))
    assert {finding.level for finding in findings} == {"ok"}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12", 550),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", 580),
        ("", None),
    ],
)
def test_the_drivers_version_is_read_from_the_kernel(text, version):
    assert driver_version(text) == version


def test_this_very_machine_can_be_looked_at():
    findings = look_at_machine()
    (packages,) = [finding for finding in findings if finding.check == "packages"]
    assert packages.level == "ok", packages.line()
    assert {"shared memory", "limits", "clock", "network", "tools"} <= {finding.check for finding in findings}

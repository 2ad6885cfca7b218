"""nvidia-smi's answers read and judged, and a product that a flipped element cannot pass."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dstrain.health.sanity_gpu import (
    Product,
    ask_nvidia_smi,
    is_product,
    judge_host,
    judge_products,
    judge_state,
    multiply,
    parse_processes,
    parse_states,
    parse_xids,
)

SOUND = "GPU-1a2b, NVIDIA H100 80GB HBM3, 550.54.15, 34, 80995, 81559, 0, No, No, Not Active, Not Active, Not Active, Not Active"


def state(**changes):
    names = (
        "uuid",
        "name",
        "driver",
        "temperature",
        "free",
        "total",
        "errors",
        "pending",
        "failure",
        "slow",
        "hot",
        "soft",
        "brake",
    )
    fields = dict(zip(names, SOUND.split(", ")))
    (found,) = parse_states(", ".join({**fields, **changes}.values()))
    return found


def test_a_sound_gpu_is_read_and_nothing_is_said_of_it():
    found = state()
    assert (found.uuid, found.driver, found.temperature_c, found.uncorrected_errors) == (
        "GPU-1a2b",
        "550.54.15",
        34.0,
        0.0,
    )
    assert judge_state(found) == []


@pytest.mark.parametrize(
    ("changes", "level", "said"),
    [
        ({"errors": "2"}, "failed", "2 uncorrected memory errors"),
        ({"pending": "Yes"}, "failed", "waits to be remapped"),
        ({"failure": "Yes"}, "failed", "remapping a row of its memory has failed"),
        ({"brake": "Active"}, "warning", "slowed down by hw_power_brake_slowdown"),
        ({"temperature": "91"}, "warning", "91 °C before any work"),
        ({"free": "20000"}, "warning", "only 20000 of 81559 MiB are free"),
    ],
)
def test_each_fault_is_said_with_a_fix(changes, level, said):
    ((found, what, fix),) = judge_state(state(**changes))
    assert (found, said in what, bool(fix)) == (level, True, True)


def test_what_a_gpu_does_not_tell_is_no_fault():
    silent = state(temperature="[N/A]", errors="[N/A]", free="[N/A]", pending="[N/A]", failure="[N/A]", slow="[N/A]")
    assert judge_state(silent) == []
    assert parse_states("No devices were found\n\n") == []


FAKE = """#!/bin/sh
case "$1" in
  *query-compute-apps*) echo "GPU-1a2b, 4711, 600";;
  *remapped_rows.failure*) echo 'Field "remapped_rows.failure" is not a valid field to query.'; exit 2;;
  *clocks_event_reasons*) echo 'Field "clocks_event_reasons.hw_slowdown" is not a valid field to query.'; exit 2;;
  *) echo "GPU-1a2b, NVIDIA A100, 470.1, 34, 80995, 81559, 0, Yes, Not Active, Active, Not Active, Not Active";;
esac
"""


def test_fields_that_an_older_driver_does_not_know_are_asked_by_their_old_name_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(FAKE)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (found,), processes = ask_nvidia_smi()
    assert (found.name, found.remap_pending, found.remap_failed) == ("NVIDIA A100", True, False)
    assert found.slowed_by == ("hw_thermal_slowdown",)
    assert processes == {"GPU-1a2b": ["4711 (600 MiB)"]}
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho NVIDIA-SMI has failed because it could not reach the driver; exit 9\n"
    )
    assert "could not reach the driver" in ask_nvidia_smi()
    monkeypatch.setenv("PATH", "")
    assert ask_nvidia_smi() == "nvidia-smi is not installed"


def test_processes_of_others_are_named_and_ours_are_not():
    processes = parse_processes("GPU-1a2b, 4711, 600\nGPU-1a2b, 815, 300\nGPU-ffff, 1, [N/A]\nnonsense\n")
    assert processes == {"GPU-1a2b": ["4711 (600 MiB)", "815 (300 MiB)"], "GPU-ffff": ["1 ([N/A] MiB)"]}
    ((level, what, _),) = judge_state(state(), processes["GPU-1a2b"], own=[815])
    assert (level, what) == ("warning", "other processes use it: 4711 (600 MiB)")
    assert judge_state(state(), processes["GPU-1a2b"], own=[815, 4711]) == []


def test_the_kernels_word_on_a_gpu_reaches_the_report_with_its_host():
    log = "[1.0] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\n[2.0] NVRM: Xid (PCI:0000:3b:00): 79, x\nXid 13"
    xids = parse_xids(log + "\n[3.0] NVRM: Xid (PCI:0000:af:00): 13, Graphics Exception")
    assert xids == {"0000:3b:00": [79]}, "and what a program's own fault causes is left out"
    (finding,) = judge_host([state()], {}, xids, rank=8, host="node2")
    assert (finding.ranks, finding.hosts) == ((8,), ("node2",))
    assert "XID 79 (the GPU has fallen off the bus)" in finding.text
    assert judge_host([state()], {}, None, rank=8, host="node2") == []


@given(st.lists(st.floats(600, 700), min_size=3, max_size=8), st.integers(0, 7), st.sampled_from([0.3, 0.7]))
def test_a_slow_gpu_is_named_among_its_kind(speeds, place, factor):
    slow = place % len(speeds)
    products = [Product(True, speed * (factor if rank == slow else 1), "H100") for rank, speed in enumerate(speeds)]
    products.append(Product(True, 90.0, "L4"))  # another kind is compared with itself only
    hosts = [f"h{rank}" for rank in range(len(products))]
    (finding,) = judge_products(products, hosts, share=0.5)
    assert (finding.level, finding.ranks) == ("failed" if factor == 0.3 else "warning", (slow,))


def test_a_gpu_that_calculates_wrongly_fails():
    (finding,) = judge_products([Product(True, 1, "x"), Product(False, 1, "x")], ["a", "b"], share=0.5)
    assert (finding.level, finding.ranks, finding.code) == ("failed", (1,), 77)
    (finding,) = judge_products([Product(True, 600, "H100")], ["a"], share=0.5)
    assert (finding.level, finding.text) == ("ok", "products are right, H100 600 TFLOP/s")


def test_a_right_product_passes_and_one_changed_element_does_not():
    assert multiply("cpu", size=64, depth=1024).right
    make = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-1, 2, (32, 32), generator=make).double() for _ in range(2))
    x = torch.randint(-1, 2, (32, 16), generator=make)
    product = a @ b
    assert is_product(product, x, product @ x.double())
    seen = 0
    for place in range(32):
        broken = product.clone()
        broken[place, place] += 1
        seen += not is_product(broken, x, product @ x.double())
    assert seen == 32

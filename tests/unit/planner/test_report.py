"""A plan as text and as data says the same."""

from __future__ import annotations

import json
import re

from dstrain.planner.devices import DEVICES
from dstrain.planner.plan import make_plan
from dstrain.planner.report import plan_json, plan_text, scaling_text, suggestions_text
from dstrain.planner.scaling import simulate_scaling
from dstrain.planner.search import Budget, search
from dstrain.planner.simulate import Noise
from tests.support.planned import site, workload


def test_text_and_json_agree() -> None:
    plan = make_plan(workload(), site(gpus=16))
    text, data = plan_text(plan), json.loads(json.dumps(plan_json(plan)))
    assert f"{data['model']['parameters']:,} parameters" in text
    assert f"{data['memory']['total_bytes'] / 2**30:.2f} GiB of" in text
    assert re.search(rf"{data['cost']['gpu_hours']:.2f}|{data['cost']['gpu_hours']:,.0f} GPU-hours", text)
    assert data["memory"]["total_bytes"] == sum(
        part["num_bytes"] for part in data["memory"]["parts"] if part["moment"] in ("always", data["memory"]["peak"])
    )
    assert len(data["stages"]) == 4
    assert data["step"]["total"] == sum(v for k, v in data["step"].items() if k != "total")


def test_parts_of_the_step_in_the_text_add_up_to_it() -> None:
    plan = make_plan(workload(), site(gpus=16))
    shares = [float(share) for share in re.findall(r" ms +([\d.]+)%", plan_text(plan))]
    assert len(shares) == 7
    assert abs(sum(shares) - 100) < 0.5


def test_what_does_not_fit_gets_advice() -> None:
    text = plan_text(make_plan(workload(micro_batch=1024), site("l40s", gpus=1)))
    assert "DOES NOT FIT" in text
    rows = re.search(r"set train\.micro_batch to (\d+) or less", text)
    assert rows
    assert make_plan(workload(), site("l40s", gpus=1), micro_batch=int(rows[1])).fits
    other = plan_text(make_plan(workload("MPT-1B", micro_batch=1, stage=0), site("4090")))
    assert "set engine.zero_stage to 2" in other or "set engine.zero_stage to 1" in other
    assert "no stage fits" in plan_text(make_plan(workload("MPT-3B", micro_batch=1), site("4090", gpus=1)))


def test_suggestions_name_the_setting_and_what_to_type() -> None:
    budget = Budget(money=1000, hours=10)
    found = search(workload(), site(), budget, devices=(DEVICES["h100"],), most_gpus=64)
    text = suggestions_text(found, budget)
    best = found.best[0]
    assert f"engine.zero_stage={best.sharding.stage} train.micro_batch={best.micro_batch}" in text
    assert text.count("h100") >= len(found.best)
    nothing = Budget(money=0.01)
    assert "nothing is within" in suggestions_text(
        search(workload(), site(), nothing, devices=(DEVICES["h100"],), most_gpus=8), nothing
    )


def test_a_simulation_is_one_line_a_size() -> None:
    rows = simulate_scaling(workload(), site(), [8, 64], noise=Noise(), replications=5)
    text = scaling_text(rows, seed=0)
    assert len(text.splitlines()) == 2 + 2
    assert re.search(r"^ +64 +8 ", text, re.MULTILINE)


def test_a_run_of_minutes_does_not_cost_nothing() -> None:
    text = plan_text(make_plan(workload(max_steps=10, global_batch=8), site(gpus=1)))
    run = next(line for line in text.splitlines() if line.startswith("run "))
    assert not re.search(r" 0(\.0+)? (hours|GPU-hours|USD|billion)", run)
